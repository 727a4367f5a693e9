"""Attention proper: the mask rule and the arithmetic.

The rule, the scaling and the value added to a masked score are those of `opt_common.reference`.
"""

# TensorFlow's and Keras' annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from opt_common.errors import InputError
from opt_tf import native
from opt_tf.cache import append

IMPLEMENTATIONS = ("eager",)
"""Values of `attn_implementation`: TensorFlow has no fused attention kernel."""

DEFAULT_IMPLEMENTATION = "eager"


@dataclasses.dataclass(frozen=True)
class Masking:
    """What a query may attend to.

    Attributes:
        bias_BNTS: added to the scores, shape (B or 1, 1, T, S): 0 or the most negative number of the dtype. None
            means that each of the T queries attends to every key up to its own, the last query to all of them.
    """

    bias_BNTS: tf.Tensor | None = None


def check_implementation(implementation: str) -> str:
    """The name of an implementation that can run here.

    Raises:
        InputError: for a name that is not in `IMPLEMENTATIONS`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"attn_implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}.")
    return implementation


def attention_bias(
    attention_mask_BS: tf.Tensor | None, T: int, S: int, offset: int | tf.Tensor, like: tf.Tensor
) -> tf.Tensor:
    """The mask rule as a number to add: query t, in slot `offset + t`, sees key s up to that slot unless s is padding.

    Args:
        attention_mask_BS: (B, S) of ones and zeros, or None for all ones.
        T: number of queries.
        S: number of key slots.
        offset: slot of the first query.
        like: tensor whose dtype the bias gets.
    """
    slots_S = tf.range(S)
    allowed_BNTS = (slots_S <= offset + tf.range(T)[:, None])[None, None]
    if attention_mask_BS is not None:
        allowed_BNTS = allowed_BNTS & (attention_mask_BS != 0)[:, None, None]
    return tf.where(allowed_BNTS, tf.zeros((), like.dtype), like.dtype.min)


def attend(
    q_BTNH: tf.Tensor,
    k_BTNH: tf.Tensor,
    v_BTNH: tf.Tensor,
    masking: Masking,
    past: tuple[tf.Tensor, tf.Tensor] | None,
    offset: int | tf.Tensor,
    *,
    dropout: Callable[[tf.Tensor], tf.Tensor],
    need_probs: bool,
) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor], tf.Tensor | None]:
    """Attention of scaled queries.

    Args:
        q_BTNH: queries, already scaled.
        k_BTNH: keys of the same tokens.
        v_BTNH: their values.
        masking: what each query may attend to.
        past: buffers of the keys and values before them, (B, S, N, H) each.
        offset: number of tokens in the buffers.
        dropout: drops attention probabilities in training.
        need_probs: whether the probabilities are wanted.

    Returns:
        The context (B, T, N, H), the buffers with the new keys and values appended (without buffers, those alone), and,
        if wanted, the probabilities (B, N, T, S).
    """
    bias_BNTS = masking.bias_BNTS
    if past is not None and bias_BNTS is not None and not need_probs and native.suits_attention(q_BTNH, past):
        return *native.attention(q_BTNH, k_BTNH, v_BTNH, bias_BNTS, past, offset), None
    present = (k_BTNH, v_BTNH)
    if past is not None:
        present = (append(past[0], k_BTNH, offset), append(past[1], v_BTNH, offset))
        if q_BTNH.shape[1] == 1 and not need_probs:
            return _side_by_side(q_BTNH, k_BTNH, v_BTNH, masking, past, offset, dropout), present, None
    context_BTNH, probs_BNTS = _eager(q_BTNH, *present, masking, dropout)
    return context_BTNH, present, probs_BNTS if need_probs else None


def _eager(
    q_BTNH: tf.Tensor,
    k_BSNH: tf.Tensor,
    v_BSNH: tf.Tensor,
    masking: Masking,
    dropout: Callable[[tf.Tensor], tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
    T, S = tf.shape(q_BTNH)[1], tf.shape(k_BSNH)[1]
    bias_BNTS = masking.bias_BNTS if masking.bias_BNTS is not None else attention_bias(None, T, S, S - T, q_BTNH)
    # Not by einsum, whose own product takes ten times as long in bfloat16 where a processor has no instructions for it.
    scores_BNTS = tf.matmul(_swapped(q_BTNH), _swapped(k_BSNH), transpose_b=True)
    # Softmax sums in float32 at least, whatever the model computes in.
    at_least_float32 = tf.float64 if scores_BNTS.dtype == tf.float64 else tf.float32
    scores_BNTS = tf.cast(scores_BNTS, at_least_float32) + tf.cast(bias_BNTS, at_least_float32)
    probs_BNTS = tf.cast(tf.nn.softmax(scores_BNTS, axis=-1), q_BTNH.dtype)
    probs_BNTS = dropout(probs_BNTS)
    return _swapped(tf.matmul(probs_BNTS, _swapped(v_BSNH))), probs_BNTS


def _swapped(array_BTNH: tf.Tensor) -> tf.Tensor:
    """The same with heads before tokens, (B, N, T, H), or back."""
    return tf.transpose(array_BTNH, (0, 2, 1, 3))


def _side_by_side(
    q_B1NH: tf.Tensor,
    k_B1NH: tf.Tensor,
    v_B1NH: tf.Tensor,
    masking: Masking,
    past: tuple[tf.Tensor, tf.Tensor],
    offset: int | tf.Tensor,
    dropout: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """One query a row, with all heads in one product.

    On a CPU, many small matrices are multiplied several times slower than one large one, though that one is mostly
    zeros: a head's query stands beside zeros for the other heads.

    The buffers are read as they were, without the new token: products need not wait for the copies that have it.
    """
    B, S, N, H = keras.ops.shape(past[0])
    dtype = q_B1NH.dtype
    # Softmax sums in float32 at least, whatever the model computes in.
    at_least_float32 = tf.float64 if dtype == tf.float64 else tf.float32
    own_NN1 = tf.eye(N, dtype=dtype)[..., None]
    q_BND = tf.reshape(q_B1NH * own_NN1, (B, N, N * H))
    k_BSD, v_BSD = (tf.cast(tf.reshape(buffer_BSNH, (B, S, N * H)), dtype) for buffer_BSNH in past)
    is_new_S = tf.range(S) == offset
    scores_BNS = tf.cast(tf.matmul(q_BND, k_BSD, transpose_b=True), at_least_float32)
    new_scores_BN1 = tf.reshape(tf.reduce_sum(tf.cast(q_B1NH * k_B1NH, at_least_float32), axis=-1), (B, N, 1))
    scores_BNS = tf.where(is_new_S, new_scores_BN1, scores_BNS)
    if masking.bias_BNTS is not None:
        scores_BNS = scores_BNS + tf.cast(masking.bias_BNTS[:, :, 0], at_least_float32)
    probs_BNS = dropout(tf.nn.softmax(scores_BNS, axis=-1))
    new_prob_BN1 = tf.reduce_sum(tf.where(is_new_S, probs_BNS, tf.zeros_like(probs_BNS)), axis=-1, keepdims=True)
    probs_BNS = tf.cast(tf.where(is_new_S, tf.zeros_like(probs_BNS), probs_BNS), dtype)
    context_BNNH = tf.reshape(tf.matmul(probs_BNS, v_BSD), (B, N, N, H))
    context_BNH = tf.reduce_sum(context_BNNH * own_NN1, axis=1) + tf.cast(new_prob_BN1, dtype) * v_B1NH[:, 0]
    return context_BNH[:, None]
