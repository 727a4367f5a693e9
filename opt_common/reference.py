"""The OPT model in plain NumPy, float64: the definition that the three backends are held to. Written to be read.

    ids BT ── embed_tokens ──▶ BTE ── project_in ──▶ BTD ─┐
    positions BT ── embed_positions ───────────────▶ BTD ─┴ + ─▶ layers ─▶ final_layer_norm ─▶ project_out ─▶ BTE
    BTE ── head (token table, unless untied) ──▶ logits BTV
    BTE ── pooled position ──▶ BE ── score ──▶ logits BC           BTE ── qa_outputs ──▶ logits of start and end BT

Axis letters: B batch, T query length, S key length, D hidden_size, N heads, H head_dim, F ffn_dim,
E word_embed_proj_dim, V vocabulary, C labels. Weights are canonical (`opt_common.params`): a linear weight is
(out, in).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from opt_common.config import LAYER_NORM_EPS, POSITION_OFFSET, OPTConfig, problem_type_of

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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceClassification:
    """Result of `classify`, float64.

    Attributes:
        logits: (B, C).
        positions: (B,), the position that each row's logits are from.
        loss: the loss of the labels, or None without labels.
    """

    logits: Array
    positions: Array
    loss: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceAnswer:
    """Result of `answer`, float64.

    Attributes:
        start_logits: (B, T).
        end_logits: (B, T).
        loss: the loss of the positions, or None without them.
    """

    start_logits: Array
    end_logits: Array
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
    hidden_states, attentions = decode(
        config, params, input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds
    )
    weights = _Weights(params)
    head_VE = weights["model.decoder.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits_BTV = hidden_states[-1] @ head_VE.T
    return ReferenceOutput(
        logits=logits_BTV,
        last_hidden_state=hidden_states[-1],
        hidden_states=hidden_states,
        attentions=attentions,
        loss=None if labels is None else causal_lm_loss(logits_BTV, np.asarray(labels)),
    )


def classify(
    config: OPTConfig,
    params: Params,
    input_ids: Array | None = None,
    attention_mask: Array | None = None,
    *,
    position_ids: Array | None = None,
    inputs_embeds: Array | None = None,
    labels: Array | None = None,
) -> ReferenceClassification:
    """A sequence classifier without dropout.

    Args:
        labels: (B,) integers from 0 to C - 1 or `IGNORED_LABEL`, (B, C) of 0 and 1, or (B, C) of any numbers (with one
            label, (B,)), as `problem_type_of` says.

    The other arguments are those of `forward`.
    """
    hidden_states, _ = decode(
        config, params, input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds
    )
    hidden_BTE = hidden_states[-1]
    B, T = hidden_BTE.shape[:2]
    positions_B = np.broadcast_to(pooled_positions(config, T, input_ids, attention_mask), (B,))
    pooled_BE = np.take_along_axis(hidden_BTE, positions_B[:, None, None], axis=1)[:, 0]
    logits_BC = linear(pooled_BE, _Weights(params, "score."))
    loss = None if labels is None else sequence_classification_loss(config, logits_BC, np.asarray(labels))
    return ReferenceClassification(logits=logits_BC, positions=positions_B, loss=loss)


def answer(
    config: OPTConfig,
    params: Params,
    input_ids: Array | None = None,
    attention_mask: Array | None = None,
    *,
    position_ids: Array | None = None,
    inputs_embeds: Array | None = None,
    start_positions: Array | None = None,
    end_positions: Array | None = None,
) -> ReferenceAnswer:
    """Extractive question answering without dropout.

    Args:
        start_positions: (B,) integers, where each answer begins; see `question_answering_loss`.
        end_positions: (B,) integers, where each answer ends.

    The other arguments are those of `forward`.
    """
    hidden_states, _ = decode(
        config, params, input_ids, attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds
    )
    logits_BT2 = linear(hidden_states[-1], _Weights(params, "qa_outputs."))
    start_BT, end_BT = logits_BT2[..., 0], logits_BT2[..., 1]
    loss = None
    if start_positions is not None and end_positions is not None:
        loss = question_answering_loss(start_BT, end_BT, np.asarray(start_positions), np.asarray(end_positions))
    return ReferenceAnswer(start_logits=start_BT, end_logits=end_BT, loss=loss)


def decode(
    config: OPTConfig,
    params: Params,
    input_ids: Array | None,
    attention_mask: Array | None,
    *,
    position_ids: Array | None = None,
    inputs_embeds: Array | None = None,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The bare decoder: `hidden_states` and `attentions` of `ReferenceOutput`. Arguments are those of `forward`."""
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
    return tuple(hidden_states), tuple(attentions)


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


def pooled_positions(
    config: OPTConfig, length: int, input_ids: Array | None, attention_mask: Array | None
) -> npt.NDArray[np.int64]:
    """THE pooling rule, (B,) or, where nothing tells the rows apart, (1,): the position that a sequence is judged by.

    It is the rightmost one that is attended to and does not hold the pad id, whichever side the padding is on. Without
    a mask every position counts as attended to; without ids, or without a pad id, every one as no padding. A row that
    is nothing but pad ids is judged by the first position attended to.

    Hugging Face looks at the ids alone. The two agree unless the mask hides an ordinary token at the end of a row, or
    there are embeddings in place of ids: then Hugging Face takes the last column, padding or not.

    Args:
        config: the model's configuration; its `pad_token_id` is used.
        length: T.
        input_ids: (B, T) integers, or None.
        attention_mask: (B, T) of 1 and 0, or None.
    """
    attended_BT = np.ones((1, length), dtype=bool) if attention_mask is None else np.asarray(attention_mask) != 0
    counted_BT = attended_BT
    if input_ids is not None and config.pad_token_id is not None:
        counted_BT = attended_BT & (np.asarray(input_ids) != config.pad_token_id)
    attended_BT = np.broadcast_to(attended_BT, counted_BT.shape)

    def choose(counted_T: Array, attended_T: Array) -> int:
        return int(np.flatnonzero(counted_T)[-1]) if counted_T.any() else int(attended_T.argmax())

    return np.array(
        [choose(counted_T, attended_T) for counted_T, attended_T in zip(counted_BT, attended_BT, strict=True)]
    )


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
    return cross_entropy(logits_BTV[:, :-1], labels_BT[:, 1:])


def sequence_classification_loss(config: OPTConfig, logits_BC: Array, labels: Array) -> float:
    """The loss of a sequence classifier, by `problem_type_of`: a mean over rows, and over labels where each counts.

    Single-label: cross-entropy, `IGNORED_LABEL` not counted. Multi-label: binary cross-entropy of each label's logit.
    Regression: squared error.
    """
    kind = problem_type_of(config, labels.dtype)
    if kind == "single_label_classification":
        return cross_entropy(logits_BC, labels.reshape(-1))
    labels_BC = labels.reshape(logits_BC.shape).astype(np.float64)
    if kind == "regression":
        return float(((logits_BC - labels_BC) ** 2).mean())
    # -log(sigmoid(x)) = log(1 + exp(-x)), and -log(1 - sigmoid(x)) is x more.
    return float((np.logaddexp(0.0, -logits_BC) + (1.0 - labels_BC) * logits_BC).mean())


def question_answering_loss(start_BT: Array, end_BT: Array, start_positions: Array, end_positions: Array) -> float:
    """Mean of the cross-entropies of start and end over all T positions, those that a mask hides included.

    Hugging Face's rule: a position before the first is taken for the first, and one behind the last does not count, as
    of an answer that was cut off. A side where none counts makes the loss NaN.
    """
    T = start_BT.shape[1]

    def one(logits_BT: Array, positions: Array) -> float:
        positions_B = np.maximum(positions.reshape(-1), 0)
        return cross_entropy(logits_BT, np.where(positions_B < T, positions_B, IGNORED_LABEL))

    return (one(start_BT, start_positions) + one(end_BT, end_positions)) / 2


def cross_entropy(logits: Array, labels: Array) -> float:
    """Mean of -log softmax(logits) at the labels, over those that are not `IGNORED_LABEL`; NaN if all are.

    Args:
        logits: (…, classes).
        labels: (…) integers.
    """
    counted = labels != IGNORED_LABEL
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probs, np.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return -float(picked[counted].sum()) / count if (count := int(counted.sum())) else math.nan


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
