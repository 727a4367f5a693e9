"""The OPT model in plain NumPy, float64: the definition that the three backends are held to. Written to be read.

    ids BT ── embed_tokens ──▶ BTE ── project_in ──▶ BTD ─┐
    positions BT ── embed_positions ───────────────▶ BTD ─┴ + ─▶ layers ─▶ final_layer_norm ─▶ project_out ─▶ BTE
    BTE ── head (token table, unless untied) ──▶ logits BTV

Axis letters: B batch, T query length, S key length, D hidden_size, N heads, H head_dim, F ffn_dim,
E word_embed_proj_dim, V vocabulary. Weights are canonical (`opt_common.params`): a linear weight is (out, in).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from opt_common.config import LAYER_NORM_EPS, POSITION_OFFSET, OPTConfig

Array: TypeAlias = npt.NDArray[Any]
Params: TypeAlias = Mapping[str, Array]

IGNORED_LABEL = -100
"""Label of a position that does not count in the loss."""

MASKED = float(np.finfo(np.float64).min)
"""Added to a score that must not be attended to. Finite, so that a query which may attend to nothing gets the same
weight everywhere instead of NaN; the rule, and its value by dtype, is the same in every backend."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceOutput:
    """Result of `forward`, all float64.

    Attributes:
        logits: (B, T, V).
        last_hidden_state: (B, T, E), after the final norm and `project_out`.
        hidden_states: L + 1 arrays: the input of each layer (B, T, D), then `last_hidden_state`.
        attentions: L arrays (B, N, T, T).
        loss: mean cross-entropy over the labels that count, or None without labels.
    """

    logits: Array
    last_hidden_state: Array
    hidden_states: tuple[Array, ...]
    attentions: tuple[Array, ...]
    loss: float | None


def forward(
    config: OPTConfig,
    params: Params,
    input_ids: Array | None = None,
    attention_mask: Array | None = None,
    *,
    position_ids: Array | None = None,
    inputs_embeds: Array | None = None,
    labels: Array | None = None,
) -> ReferenceOutput:
    """Compute the model without dropout.

    Args:
        config: the model's configuration.
        params: canonical name -> array of any float dtype.
        input_ids: (B, T) integers; or give `inputs_embeds`.
        attention_mask: (B, T) of 1 (attend) and 0 (padding); None means all ones.
        position_ids: (B, T), before the offset; None means `positions(attention_mask)`.
        inputs_embeds: (B, T, E), in place of the rows of the token table.
        labels: (B, T) ids; position t is scored on label t + 1, and `IGNORED_LABEL` does not count.
    """
    weights = _Weights(params)
    tokens_BTE = (
        weights["model.decoder.embed_tokens.weight"][input_ids]
        if inputs_embeds is None
        else np.asarray(inputs_embeds, dtype=np.float64)
    )
    B, T = tokens_BTE.shape[:2]
    mask_BT = np.ones((B, T), dtype=np.int64) if attention_mask is None else np.asarray(attention_mask)
    positions_BT = positions(mask_BT) if position_ids is None else np.asarray(position_ids)

    hidden_BTD = tokens_BTE
    if config.has_projection:
        hidden_BTD = tokens_BTE @ weights["model.decoder.project_in.weight"].T
    hidden_BTD = hidden_BTD + weights["model.decoder.embed_positions.weight"][positions_BT + POSITION_OFFSET]
    bias_BNTS = attention_bias(mask_BT)

    hidden_states: list[Array] = []
    attentions: list[Array] = []
    for index in range(config.num_hidden_layers):
        hidden_states.append(hidden_BTD)
        layer = weights.within(f"model.decoder.layers.{index}.")
        hidden_BTD, probs_BNTS = decoder_layer(config, layer, hidden_BTD, bias_BNTS)
        attentions.append(probs_BNTS)

    if config.has_final_layer_norm:
        hidden_BTD = layer_norm(hidden_BTD, weights.within("model.decoder.final_layer_norm."))
    hidden_BTE = hidden_BTD
    if config.has_projection:
        hidden_BTE = hidden_BTD @ weights["model.decoder.project_out.weight"].T
    hidden_states.append(hidden_BTE)

    head_VE = weights["model.decoder.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits_BTV = hidden_BTE @ head_VE.T
    return ReferenceOutput(
        logits=logits_BTV,
        last_hidden_state=hidden_BTE,
        hidden_states=tuple(hidden_states),
        attentions=tuple(attentions),
        loss=None if labels is None else causal_lm_loss(logits_BTV, np.asarray(labels)),
    )


def generate_greedy(
    config: OPTConfig, params: Params, input_ids: Array, attention_mask: Array | None, max_new_tokens: int
) -> Array:
    """Append the likeliest token `max_new_tokens` times, without a cache. Ends nothing at an end-of-text id.

    Args:
        config: the model's configuration.
        params: canonical name -> array.
        input_ids: (B, T) integers, padded on the left if at all.
        attention_mask: (B, T), or None for all ones.
        max_new_tokens: how many.

    Returns:
        (B, T + max_new_tokens) integers.
    """
    ids_BT = np.asarray(input_ids)
    mask_BT = np.ones_like(ids_BT) if attention_mask is None else np.asarray(attention_mask)
    for _ in range(max_new_tokens):
        logits_BTV = forward(config, params, ids_BT, mask_BT).logits
        ids_BT = np.concatenate([ids_BT, logits_BTV[:, -1:].argmax(-1)], axis=1)
        mask_BT = np.concatenate([mask_BT, np.ones_like(mask_BT[:, :1])], axis=1)
    return ids_BT


def positions(attention_mask_BT: Array) -> Array:
    """THE position rule: attended tokens count 0, 1, 2, …; a masked slot is -1 and reads the row below position 0."""
    return np.cumsum(attention_mask_BT, axis=1) * attention_mask_BT - 1


def attention_bias(attention_mask_BT: Array) -> Array:
    """THE mask rule, (B, 1, T, S): query t may attend to key s if s <= t and key s is not masked."""
    T = attention_mask_BT.shape[1]
    causal_TS = np.tri(T, dtype=np.bool_)
    allowed_BNTS = np.logical_and(causal_TS, attention_mask_BT[:, None, None, :])
    return np.where(allowed_BNTS, 0.0, MASKED)


def decoder_layer(config: OPTConfig, weights: "_Weights", hidden_BTD: Array, bias_BNTS: Array) -> tuple[Array, Array]:
    """One layer: attention, then feed-forward, each added to its input; normed before (pre-norm) or after (350m)."""
    pre_norm = config.do_layer_norm_before
    norm_1, norm_2 = weights.within("self_attn_layer_norm."), weights.within("final_layer_norm.")

    residual_BTD = hidden_BTD
    hidden_BTD = layer_norm(hidden_BTD, norm_1) if pre_norm else hidden_BTD
    hidden_BTD, probs_BNTS = attention(config, weights.within("self_attn."), hidden_BTD, bias_BNTS)
    hidden_BTD = residual_BTD + hidden_BTD
    hidden_BTD = hidden_BTD if pre_norm else layer_norm(hidden_BTD, norm_1)

    residual_BTD = hidden_BTD
    hidden_BTD = layer_norm(hidden_BTD, norm_2) if pre_norm else hidden_BTD
    hidden_BTF = ACTIVATION_FUNCTIONS[config.activation_function](linear(hidden_BTD, weights.within("fc1.")))
    hidden_BTD = residual_BTD + linear(hidden_BTF, weights.within("fc2."))
    hidden_BTD = hidden_BTD if pre_norm else layer_norm(hidden_BTD, norm_2)
    return hidden_BTD, probs_BNTS


def attention(config: OPTConfig, weights: "_Weights", hidden_BTD: Array, bias_BNTS: Array) -> tuple[Array, Array]:
    """Multi-head attention. THE scaling rule: the query, bias included, is scaled before the product with the keys."""
    B, T, D = hidden_BTD.shape
    N, H = config.num_attention_heads, config.head_dim
    q_BTNH = (linear(hidden_BTD, weights.within("q_proj.")) * H**-0.5).reshape(B, T, N, H)
    k_BSNH = linear(hidden_BTD, weights.within("k_proj.")).reshape(B, T, N, H)
    v_BSNH = linear(hidden_BTD, weights.within("v_proj.")).reshape(B, T, N, H)
    scores_BNTS = np.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) + bias_BNTS
    probs_BNTS = softmax(scores_BNTS)
    context_BTNH = np.einsum("bnts,bsnh->btnh", probs_BNTS, v_BSNH)
    return linear(context_BTNH.reshape(B, T, D), weights.within("out_proj.")), probs_BNTS


def causal_lm_loss(logits_BTV: Array, labels_BT: Array) -> float:
    """Mean cross-entropy of label t + 1 under the logits at t, over the labels that count; NaN if none does."""
    logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    counted_BT = labels_BT != IGNORED_LABEL
    shifted_BTV = logits_BTV - logits_BTV.max(-1, keepdims=True)
    log_probs_BTV = shifted_BTV - np.log(np.exp(shifted_BTV).sum(-1, keepdims=True))
    picked_BT = np.take_along_axis(log_probs_BTV, np.where(counted_BT, labels_BT, 0)[..., None], axis=-1)[..., 0]
    return -float(picked_BT[counted_BT].sum()) / count if (count := int(counted_BT.sum())) else math.nan


def linear(x: Array, weights: "_Weights") -> Array:
    """x @ weight.T, plus the bias where there is one."""
    y = x @ weights["weight"].T
    return y + weights["bias"] if "bias" in weights else y


def layer_norm(x: Array, weights: "_Weights") -> Array:
    """Zero mean and unit variance over the last axis, then scale and shift where there are any."""
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    return normed * weights["weight"] + weights["bias"] if "weight" in weights else normed


def softmax(x: Array) -> Array:
    """Exponentials over the last axis, normalised to sum to one."""
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def _gelu(x: Array) -> Array:
    return x * 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0)))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


ACTIVATION_FUNCTIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x / (1.0 + np.exp(-1.702 * x)),
    "silu": _silu,
    "swish": _silu,
    "tanh": np.tanh,
}
"""Every value of `opt_common.config.ACTIVATIONS`."""


class _Weights:
    """The parameters under one prefix of their names, as float64."""

    def __init__(self, params: Params, prefix: str = "") -> None:
        self._params = params
        self._prefix = prefix

    def within(self, prefix: str) -> "_Weights":
        return _Weights(self._params, self._prefix + prefix)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._params

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self._params[self._prefix + name]).astype(np.float64, copy=False)
