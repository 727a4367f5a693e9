"""Names that published files give one and the same model: prefixes, other models around it, heads, odd configurations.

Each test that goes back to something users met names the public thread.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion import checked_parameters, convert, open_checkpoint, save_checkpoint, verify
from conversion.canonical import BLIP_2_PARTS, EMBEDDING, HEAD, WRAPPERS, to_canonical
from conversion.formats import hdf5_file, msgpack_file, safetensors_file, torch_file
from conversion.inspect import inspect
from conversion.plan import TARGETS
from conversion.tensors import TensorInfo, TensorSpec
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError
from opt_common.hub import FORMATS
from opt_common.params import LEAVES, module_kind, parameter_table
from tests.adapters import Adapter
from tests.paths import GOLDENS

MODULES = {"safetensors": safetensors_file, "torch": torch_file, "tf": hdf5_file, "flax": msgpack_file}
SEPARATORS = {"safetensors": ".", "torch": ".", "tf": "/", "flax": "/"}
TORCH_PREFIXES = (
    "model.decoder.",
    "decoder.",
    "",
    "language_model.model.decoder.",
    "module.model.decoder.",
    "_orig_mod.module.decoder.",
)
PREFIXES = {
    "safetensors": TORCH_PREFIXES,
    "torch": TORCH_PREFIXES,
    "tf": ("model/decoder/", "decoder/", "", "tfopt_for_causal_lm_3/model/decoder/"),
    "flax": ("model/decoder/", "decoder/", "", "language_model/model/decoder/"),
}
"""How names may begin in each format. No TensorFlow or Flax model has an OPT inside; a tree of Flax's can."""

ANY_MODEL = tuple(name for name in TARGETS if name != "keras-hub")
"""The targets that hold any language model; what KerasHub can't hold is in `test_keras_hub`."""

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tiny() -> OPTConfig:
    return OPTConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, ffn_dim=16, max_position_embeddings=6, num_attention_heads=2
    )


def weights(config: OPTConfig) -> Arrays:
    """Seeded tensors of a model, canonical names and layouts."""
    random = np.random.default_rng(0)
    return {row.name: random.standard_normal(row.shape).astype(np.float32) for row in parameter_table(config)}


def native(format_name: str, arrays: Arrays, prefix: str = "model.decoder.") -> Arrays:
    """The same tensors as a format has them, with another prefix in place of `model.decoder.`."""
    scheme, separator = MODULES[format_name].SCHEME, SEPARATORS[format_name]
    result: Arrays = {}
    for name, array in arrays.items():
        *module, leaf = name.split(".")
        names = LEAVES[f"{module_kind(module[-1])}.{leaf}"]
        inner = separator.join([*module, getattr(names, scheme)])
        whole = inner.replace(separator.join(["model", "decoder", ""]), prefix.replace(".", separator), 1)
        result[whole] = array.T if names.transposed and scheme != "torch" else array
    return result


def write(
    directory: Path, format_name: str, natives: Arrays, config: Mapping[str, Any], *, shards: int | None = None
) -> Path:
    """Files of a format with any names at all; with `shards`, that many and their index."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    names, files = list(natives), FORMATS[format_name]
    groups = [names] if shards is None else [names[start::shards] for start in range(shards)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = files.single if shards is None else files.shard(number, len(groups))
        specs = [TensorSpec(name=name, info=TensorInfo(natives[name].dtype, natives[name].shape)) for name in group]
        MODULES[format_name].write(directory / file, specs, natives.__getitem__)
        weight_map |= dict.fromkeys(group, file)
    if shards is not None:
        (directory / files.index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def read(path: Path) -> Arrays:
    """Every tensor of a checkpoint that fits its configuration."""
    with open_checkpoint(path) as checkpoint:
        checked_parameters(checkpoint, parameter_table(checkpoint.config, head=checkpoint.head), other_heads=False)
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.names}


def equal(found: Arrays, expected: Arrays) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


# Prefixes


@pytest.mark.parametrize("shards", [None, 3])
@pytest.mark.parametrize(("format_name", "prefix"), [(name, prefix) for name in PREFIXES for prefix in PREFIXES[name]])
def test_any_prefix_in_any_format(tmp_path: Path, tiny: OPTConfig, format_name: str, prefix: str, shards: int | None):
    """text-generation-inference#1060: the keys of opt-350m lack `model.`."""
    expected = weights(tiny)
    source = write(tmp_path / "a", format_name, native(format_name, expected, prefix), tiny.to_dict(), shards=shards)
    assert equal(read(source), expected)
    convert(source, tmp_path / "b", "safetensors")
    with open_checkpoint(tmp_path / "b") as checkpoint:
        assert {checkpoint.native_name(name) for name in checkpoint.names} == set(expected), "one prefix is written"


def test_every_wrapper_has_a_reason_and_is_no_part_of_a_name():
    assert all(WRAPPERS.values())
    for wrapper in WRAPPERS:
        assert to_canonical(f"{wrapper}.lm_head.weight", "torch").name == HEAD
    assert to_canonical("other.model.decoder.layers.0.fc1.bias", "torch").name.startswith("other."), "nothing else goes"


# BLIP-2


def blip_2(tiny: OPTConfig) -> tuple[Arrays, dict[str, Any]]:
    """Tensors and configuration of a BLIP-2 model, as transformers 4.57.6 saves one."""
    arrays = {f"language_model.{name}": array for name, array in weights(tiny).items()}
    arrays |= {
        "query_tokens": np.ones((1, 2, 8), np.float32),
        "vision_model.encoder.layers.0.self_attn.qkv.weight": np.ones((24, 8), np.float32),
        "vision_model.encoder.layers.0.mlp.fc1.weight": np.ones((8, 8), np.float32),
        "qformer.layernorm.weight": np.ones(8, np.float32),
        "language_projection.weight": np.ones((8, 8), np.float32),
    }
    config = {
        "model_type": "blip-2",
        "architectures": ["Blip2ForConditionalGeneration"],
        "image_token_index": tiny.vocab_size - 1,
        "text_config": tiny.to_dict(),
        "vision_config": {"model_type": "blip_2_vision_model", "hidden_size": 8},
        "qformer_config": {"model_type": "blip_2_qformer", "vocab_size": 10},
    }
    return arrays, config


@pytest.mark.parametrize("shards", [None, 3])
@pytest.mark.parametrize("format_name", ["safetensors", "torch"])
@pytest.mark.parametrize("head", ["table", "both", "head only"])
def test_the_language_model_of_blip_2(tmp_path: Path, tiny: OPTConfig, format_name: str, shards: int | None, head: str):
    """LAVIS#239: an OPT with a vocabulary of its own inside another model. A sentence says what is left out."""
    tiny = tiny.replace(vocab_size=43)
    arrays, config = blip_2(tiny)
    if head != "table":
        arrays[f"language_model.{HEAD}"] = arrays[f"language_model.{EMBEDDING}"]
    if head == "head only":
        del arrays[f"language_model.{EMBEDDING}"]
    source = write(tmp_path / "a", format_name, arrays, config, shards=shards)
    with pytest.warns(UserWarning, match=r"only the language model is read: 5 tensors of vision_model, qformer"):
        assert equal(read(source), weights(tiny))
    with pytest.warns(UserWarning, match="left out"):
        convert(source, tmp_path / "b", "flax")
    assert equal(read(tmp_path / "b"), weights(tiny))
    written = OPTConfig.from_json_file(tmp_path / "b/config.json")
    assert (written.vocab_size, written.extra["architectures"]) == (43, ["OPTForCausalLM"])


def test_a_backend_loads_the_language_model_of_blip_2(tmp_path: Path, tiny: OPTConfig, backend: Adapter):
    arrays, config = blip_2(tiny)
    source = write(tmp_path / "a", "safetensors", arrays, config)
    with pytest.warns(UserWarning, match="left out"):
        assert equal(backend.parameters(backend.load(source)), weights(tiny))


def test_only_what_blip_2_is_known_to_have_is_left_out(tmp_path: Path, tiny: OPTConfig):
    arrays, config = blip_2(tiny)
    strange = {**arrays, "vision_tower.weight": np.ones(3, np.float32)}
    with (
        pytest.warns(UserWarning, match="5 tensors"),
        pytest.raises(CheckpointError, match=r"unexpected: vision_tower\.weight"),
    ):
        read(write(tmp_path / "a", "safetensors", strange, config))
    for part in BLIP_2_PARTS:
        # Around no language model of BLIP-2's, the same names are as strange as any.
        plain = {**weights(tiny), f"{part}.weight": np.ones(3, np.float32)}
        with pytest.raises(CheckpointError, match=rf"unexpected: {part}\.weight"):
            read(write(tmp_path / part, "safetensors", plain, tiny.to_dict()))
    with pytest.raises(ConfigError, match="got model_type 't5', expected 'opt'"):
        OPTConfig.from_dict({**config, "text_config": {"model_type": "t5"}})


# Heads


@pytest.mark.parametrize("shards", [None, 3])
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_tied_head_without_its_table(tmp_path: Path, tiny: OPTConfig, format_name: str, shards: int | None):
    """transformers#43159, transformers#41038, text-generation-inference#1057: `lm_head.weight` is all that is there."""
    expected = weights(tiny)
    arrays = {HEAD if name == EMBEDDING else name: array for name, array in expected.items()}
    source = write(tmp_path / "a", format_name, native(format_name, arrays), tiny.to_dict(), shards=shards)
    assert equal(read(source), expected)
    for to in TARGETS:
        convert(source, tmp_path / to, to)
        assert equal(read(tmp_path / to), expected)
    with open_checkpoint(tmp_path / "safetensors") as checkpoint:
        assert checkpoint.native_name(EMBEDDING) == EMBEDDING


@pytest.mark.parametrize("format_name", FORMATS)
def test_both_names_of_a_tied_head_must_agree(tmp_path: Path, tiny: OPTConfig, format_name: str):
    """safetensors#98, #202, #304: tensors that share memory. Ties go by name and value, never by address."""
    arrays = weights(tiny)
    arrays[HEAD] = arrays[EMBEDDING].copy()
    assert equal(read(write(tmp_path / "a", format_name, native(format_name, arrays), tiny.to_dict())), weights(tiny))
    arrays[HEAD][-1, -1] += 1
    source = write(tmp_path / "b", format_name, native(format_name, arrays), tiny.to_dict())
    with pytest.raises(CheckpointError, match='"tie_word_embeddings": false'):
        read(source)


@pytest.mark.parametrize("to", ANY_MODEL)
@pytest.mark.parametrize("format_name", FORMATS)
def test_an_untied_head_is_kept_apart(tmp_path: Path, tiny: OPTConfig, format_name: str, to: str):
    """aphrodite-engine and sonar #1189: a head of its own must not be tied, not even where it is equal."""
    untied = tiny.replace(tie_word_embeddings=False)
    for name, change in (("other", 1), ("equal", 0)):
        arrays = weights(untied)
        arrays[HEAD] = arrays[EMBEDDING] + np.float32(change)
        source = write(tmp_path / name, format_name, native(format_name, arrays), untied.to_dict())
        convert(source, tmp_path / f"{name}-new", to)
        assert equal(read(tmp_path / f"{name}-new"), arrays)
        assert json.loads((tmp_path / f"{name}-new/config.json").read_text())["tie_word_embeddings"] is False


def test_a_tie_is_found_by_name_where_addresses_are_equal(tmp_path: Path, tiny: OPTConfig):
    """transformers#37786, #38014: tensors that seemed to lie at one address were taken for tied."""
    arrays = weights(tiny.replace(tie_word_embeddings=False))
    zeros = {name: np.zeros_like(array) for name, array in arrays.items()}
    source = write(tmp_path / "a", "torch", zeros, tiny.replace(tie_word_embeddings=False).to_dict())
    convert(source, tmp_path / "b", "tf")
    assert equal(read(tmp_path / "b"), zeros)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_missing_tensor_is_never_made_up(tmp_path: Path, tiny: OPTConfig, backend: Adapter, format_name: str):
    """transformers 5 fills `layers.1.fc1.weight` with random numbers and a line in the log."""
    arrays = weights(tiny)
    del arrays["model.decoder.layers.1.fc1.weight"]
    source = write(tmp_path / "a", format_name, native(format_name, arrays), tiny.to_dict())
    with pytest.raises(CheckpointError, match=r"missing: model\.decoder\.layers\.1\.fc1\.weight, of shape \[16, 8\]"):
        backend.load(source)
    with pytest.raises(CheckpointError, match="missing"):
        convert(source, tmp_path / "b", "safetensors")
    assert not (tmp_path / "b").exists()


def test_layer_norms_of_ones_are_a_model_like_any_other(tmp_path: Path, tiny: OPTConfig):
    """transformers#24243: the layer norms' weights of most sizes are exactly 1, which is no damage."""
    arrays = weights(tiny)
    arrays |= {name: np.ones_like(array) for name, array in arrays.items() if name.endswith("norm.weight")}
    source = write(tmp_path / "a", "safetensors", arrays, tiny.to_dict())
    assert verify(source).holds
    assert inspect(source).problem is None


# Configurations


PUBLISHED: Mapping[str, dict[str, Any]] = {
    "galactica-125m": {
        "activation_function": "gelu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.1,
        "bos_token_id": 0,
        "dropout": 0.1,
        "enable_bias": True,
        "eos_token_id": 2,
        "layer_norm_elementwise_affine": True,
        "learned_embeddings": True,
        "pad_token_id": 1,
        "scale_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.21.0.dev0",
        "vocab_size": 50000,
    },
    "galactica-30b": {
        "activation_function": "gelu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.1,
        "bos_token_id": 0,
        "enable_bias": False,
        "eos_token_id": 2,
        "layer_norm_elementwise_affine": False,
        "pad_token_id": 1,
        "vocab_size": 50000,
    },
    "opt-iml-1.3b": {
        "_name_or_path": "opt-iml-1.3b",
        "activation_dropout": 0.0,
        "architectures": ["OPTForCausalLM"],
        "do_layer_norm_before": True,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "vocab_size": 50272,
    },
}
"""What makes these configurations differ from OPT's, as their `config.json` spells it (transformers#20390)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_go_through_every_format(tmp_path: Path, tiny: OPTConfig, name: str):
    """transformers#20390: Galactica's flags were unknown to TensorFlow's and Flax's classes."""
    stated = {"model_type": "opt", **PUBLISHED[name]}
    config = OPTConfig.from_dict(stated)
    for key, value in PUBLISHED[name].items():
        assert config.to_dict()[key] == value, key
    shape = ("vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "max_position_embeddings")
    small = config.replace(
        **{field: getattr(tiny, field) for field in shape},
        word_embed_proj_dim=tiny.word_embed_proj_dim,
        num_attention_heads=tiny.num_attention_heads,
        dtype="float32",
    )
    arrays, source = weights(small), tmp_path / "source"
    save_checkpoint(source, small, parameter_table(small), lambda row: arrays[row.name])
    for to in ANY_MODEL:
        convert(source, tmp_path / to, to)
        source = tmp_path / to
        assert equal(read(source), arrays)
        assert OPTConfig.from_json_file(source / "config.json") == small


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_proj"])
def test_the_shape_of_350m_is_in_every_format(variant: str, format_name: str, tmp_path: Path):
    """metaseq#383, #388, keras-hub#699: post-norm with projections is how 350m was trained, and no mistake."""
    source = GOLDENS / variant / "safetensors"
    convert(source, tmp_path / "new", format_name)
    assert equal(read(tmp_path / "new"), read(source))
