"""A configuration out of metaseq's files, which have no `config.json`, and metaseq's options out of a configuration.

What the shapes say is taken from them. The options in the files say the rest; where they don't, and nothing else does,
a user has to.
"""

import re
from collections.abc import Mapping
from typing import Any

from conversion.tensors import TensorInfo
from opt_common.config import POSITION_OFFSET, OPTConfig
from opt_common.errors import ConfigError, join_problems
from opt_common.hub import CONFIG_FILE

_HEADS = "decoder_attention_heads"
_PRE_NORM = "decoder_normalize_before"
_NO_FINAL_NORM = "no_decoder_final_norm"
_TIED = "share_decoder_input_output_embed"

_ACTIVATIONS: Mapping[str, Any] = {"gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}
"""metaseq's names of activations for which Hugging Face has another one; both are GELU by way of tanh."""

_UNSUPPORTED = {
    "no_scale_embedding": (False, "multiplies its embeddings by the square root of their width"),
    "decoder_learned_pos": (False, "has positions that are not learned"),
    "alibi": (True, "has ALiBi in place of positions"),
    "rope": (True, "has rotary positions"),
}
"""Options whose value makes a model that is no OPT: the value, and what such a model does."""


def config_of(tensors: Mapping[str, TensorInfo], arguments: Mapping[str, Any], where: str) -> OPTConfig:
    """The configuration of the model in a metaseq checkpoint.

    Args:
        tensors: dtype and shape of every tensor, by metaseq's names with the projections apart.
        arguments: the options in the checkpoint.
        where: what an error calls the checkpoint.

    Raises:
        ConfigError: naming what neither shapes nor options say, or what no OPT model has.
    """
    problems = [
        f"the model {what} ({name}), which no OPT does."
        for name, (value, what) in _UNSUPPORTED.items()
        if arguments.get(name) is value
    ]
    if problems:
        raise ConfigError(f"{where}: {join_problems(problems)}")
    shapes = {name: info.shape for name, info in tensors.items()}
    matrices = ("decoder.embed_tokens.weight", "decoder.embed_positions.weight", "decoder.layers.0.fc1.weight")
    if missing := [name for name in matrices if len(shapes.get(name, ())) != 2]:
        raise ConfigError(
            f"{where} has no {' and no '.join(missing)}, from which the configuration could be derived. "
            f"Expected the state dict of an OPT decoder."
        )
    embeddings, positions, fc1 = (shapes[name] for name in matrices)
    layers = {int(match[1]) for name in shapes if (match := re.match(r"decoder\.layers\.(\d{1,6})\.", name))}
    has_projection = embeddings[1] != positions[1]
    affine = "decoder.layers.0.self_attn_layer_norm.weight" in shapes
    norms = _norms("decoder.layer_norm.weight" in shapes, has_projection, affine, arguments)
    heads = arguments.get(_HEADS)
    missing = [
        *(["the number of attention heads (num_attention_heads)"] if heads is None else []),
        *(["whether its layers are pre-norm (do_layer_norm_before)"] if norms is None else []),
    ]
    if norms is None or missing:
        raise ConfigError(
            f"{where} does not say {' and '.join(missing)}, and no {CONFIG_FILE} is beside it. "
            f"Name one with --config (config=…), or put one there; OPTConfig.from_size('125m').to_json() makes one."
        )
    activation: Any = arguments.get("activation_fn", OPTConfig.activation_function)
    return OPTConfig(
        vocab_size=embeddings[0],
        word_embed_proj_dim=embeddings[1],
        hidden_size=positions[1],
        max_position_embeddings=positions[0] - POSITION_OFFSET,
        num_hidden_layers=len(layers),
        ffn_dim=fc1[0],
        num_attention_heads=heads,  # pyright: ignore[reportArgumentType]  # whatever it is, OPTConfig checks it
        do_layer_norm_before=norms[0],
        _remove_final_layer_norm=norms[1],
        activation_function=_ACTIVATIONS.get(activation, activation),
        dropout=arguments.get("dropout", OPTConfig.dropout),
        attention_dropout=arguments.get("attention_dropout", OPTConfig.attention_dropout),
        enable_bias="decoder.layers.0.fc1.bias" in shapes,
        layer_norm_elementwise_affine=affine,
        tie_word_embeddings="decoder.output_projection.weight" not in shapes or arguments.get(_TIED) is not False,
        dtype=tensors["decoder.embed_tokens.weight"].dtype.name,
    )


def arguments_of(config: OPTConfig, parts: int | None) -> dict[str, Any]:
    """The options of metaseq that make a model of a configuration, and from which `config_of` derives it again.

    Args:
        config: the model's configuration.
        parts: number of model-parallel parts; None means one file without a number.
    """
    metaseq_names = {"gelu_new": "gelu_accurate"}
    return {
        "_name": "transformer_lm_megatron",
        "arch": "transformer_lm_megatron",
        "activation_fn": metaseq_names.get(config.activation_function, config.activation_function),
        "attention_dropout": float(config.attention_dropout),
        "decoder_attention_heads": config.num_attention_heads,
        "decoder_embed_dim": config.hidden_size,
        "decoder_ffn_embed_dim": config.ffn_dim,
        "decoder_input_dim": config.word_embed_proj_dim,
        "decoder_layers": config.num_hidden_layers,
        "decoder_learned_pos": True,
        _PRE_NORM: config.do_layer_norm_before,
        "decoder_output_dim": config.word_embed_proj_dim,
        "disable_affine_ln": not config.layer_norm_elementwise_affine,
        "disable_bias": not config.enable_bias,
        "dropout": float(config.dropout),
        "max_target_positions": config.max_position_embeddings,
        "model_parallel_size": parts or 1,
        _NO_FINAL_NORM: not config.has_final_layer_norm,
        "no_scale_embedding": True,
        _TIED: config.tie_word_embeddings,
        "tokens_per_sample": config.max_position_embeddings,
    }


def _norms(
    has_final: bool, has_projection: bool, affine: bool, arguments: Mapping[str, Any]
) -> tuple[bool, bool] | None:
    """Values of `do_layer_norm_before` and `_remove_final_layer_norm`, or None where nothing says them."""
    before = arguments.get(_PRE_NORM)
    if has_final:
        return True, False
    if before is True:
        # Norms without weights leave no trace in the file, so that only the option can say.
        return True, affine or arguments.get(_NO_FINAL_NORM) is True
    # The one published model with projections, 350m, is post-norm, and the only one that is; it has no final norm.
    return (False, False) if before is False or has_projection else None
