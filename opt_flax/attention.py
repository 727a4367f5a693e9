"""Attention proper: the mask rule and the kernels that compute it.

The rule, the scaling and the value added to a masked score are those of `opt_common.reference`.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from opt_common.errors import InputError, MissingFrameworkError
from opt_flax import native
from opt_flax.cache import append

IMPLEMENTATIONS = ("xla", "eager", "cudnn")
"""Values of `attn_implementation`. Attention probabilities, when asked for, always come from "eager"."""

DEFAULT_IMPLEMENTATION = "xla"


@dataclasses.dataclass(frozen=True)
class Masking:
    """What a query may attend to.

    Attributes:
        bias_BNTS: added to the scores, shape (B or 1, 1, T, S): 0 or the most negative number of the dtype. None
            means that each of the T queries attends to every key up to its own, the last query to all of them.
    """

    bias_BNTS: Array | None = None


def check_implementation(implementation: str) -> str:
    """The name of an implementation that can run here.

    Raises:
        InputError: for a name that is not in `IMPLEMENTATIONS`.
        MissingFrameworkError: for one whose device is absent.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"attn_implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise MissingFrameworkError(
            f"attn_implementation='cudnn' needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}. Use 'xla'."
        )
    return implementation


def attention_bias(attention_mask_BS: Array | None, T: int, S: int, offset: int | Array, like: Array) -> Array:
    """The mask rule as a number to add: query t, in slot `offset + t`, sees key s up to that slot unless s is padding.

    Args:
        attention_mask_BS: (B, S) of ones and zeros, or None for all ones.
        T: number of queries.
        S: number of key slots.
        offset: slot of the first query.
        like: array whose dtype the bias gets.
    """
    slots_S = jnp.arange(S)
    allowed_BNTS = (slots_S <= offset + jnp.arange(T)[:, None])[None, None]
    if attention_mask_BS is not None:
        allowed_BNTS = allowed_BNTS & (attention_mask_BS != 0)[:, None, None]
    return jnp.where(allowed_BNTS, 0, jnp.finfo(like.dtype).min).astype(like.dtype)


def attend(
    q_BTNH: Array,
    k_BTNH: Array,
    v_BTNH: Array,
    masking: Masking,
    past: tuple[Array, Array] | None,
    offset: int | Array,
    *,
    implementation: str,
    dropout: Callable[[Array], Array] | None,
    need_probs: bool,
) -> tuple[Array, tuple[Array, Array], Array | None]:
    """Attention of scaled queries.

    Args:
        q_BTNH: queries, already scaled.
        k_BTNH: keys of the same tokens.
        v_BTNH: their values.
        masking: what each query may attend to.
        past: buffers of the keys and values before them, (B, S, N, H) each.
        offset: number of tokens in the buffers.
        implementation: one of `IMPLEMENTATIONS`.
        dropout: drops attention probabilities; None where none is dropped. Only "eager" can.
        need_probs: whether the probabilities are wanted, which only "eager" has.

    Returns:
        The context (B, T, N, H), the buffers with the new keys and values appended (without buffers, those alone), and,
        if wanted, the probabilities (B, N, T, S).
    """
    # The fused kernels sum in float32 whatever they are given: too little for float64. On a CPU, float16 has none.
    unfused = q_BTNH.dtype == jnp.float64 or (q_BTNH.dtype == jnp.float16 and jax.default_backend() == "cpu")
    eager = need_probs or implementation == "eager" or dropout is not None or unfused
    bias_BNTS = masking.bias_BNTS
    if past is not None and bias_BNTS is not None and not eager and native.suits_attention(q_BTNH, past):
        return *native.attention(q_BTNH, k_BTNH, v_BTNH, bias_BNTS, past, offset), None
    if past is not None and not eager and q_BTNH.shape[1] == 1 and jax.default_backend() == "cpu":
        return *_side_by_side(q_BTNH, k_BTNH, v_BTNH, masking, past, offset), None
    present = (k_BTNH, v_BTNH)
    if past is not None:
        present = (append(past[0], k_BTNH, offset), append(past[1], v_BTNH, offset))
    if eager:
        context_BTNH, probs_BNTS = _eager(q_BTNH, *present, masking, dropout)
        return context_BTNH, present, probs_BNTS if need_probs else None
    return _fused(q_BTNH, *present, masking, implementation), present, None


def _eager(
    q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, masking: Masking, dropout: Callable[[Array], Array] | None
) -> tuple[Array, Array]:
    T, S = q_BTNH.shape[1], k_BSNH.shape[1]
    bias_BNTS = masking.bias_BNTS if masking.bias_BNTS is not None else attention_bias(None, T, S, S - T, q_BTNH)
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH)
    # Softmax sums in float32 at least, whatever the model computes in.
    scores_BNTS = scores_BNTS.astype(jnp.promote_types(scores_BNTS.dtype, jnp.float32)) + bias_BNTS
    probs_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
    if dropout is not None:
        probs_BNTS = dropout(probs_BNTS)
    return jnp.einsum("bnts,bsnh->btnh", probs_BNTS, v_BSNH), probs_BNTS


def _fused(q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, masking: Masking, implementation: str) -> Array:
    T = q_BTNH.shape[1]
    if implementation == "cudnn" and q_BTNH.dtype not in (jnp.float16, jnp.bfloat16):
        raise InputError(f"attn_implementation='cudnn' computes in float16 or bfloat16, got {q_BTNH.dtype}. Use 'xla'.")
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        bias=masking.bias_BNTS,
        is_causal=masking.bias_BNTS is None and T > 1,
        scale=1.0,
        implementation=cast(Literal["xla", "cudnn"], implementation),
    )


def _side_by_side(
    q_B1NH: Array, k_B1NH: Array, v_B1NH: Array, masking: Masking, past: tuple[Array, Array], offset: int | Array
) -> tuple[Array, tuple[Array, Array]]:
    """One query a row, with all heads in one product: the context and the buffers with the new token appended.

    On a CPU, XLA multiplies many small matrices ten times slower than one large one, though that one is mostly zeros:
    a head's query stands beside zeros for the other heads.

    The buffers are read as they were, and written to afterwards, in place. Were they read after the write, XLA would
    make copies of them for it.
    """
    B, S, N, H = past[0].shape
    dtype = q_B1NH.dtype
    own_NN1 = jnp.eye(N, dtype=dtype)[..., None]
    q_BND = (q_B1NH * own_NN1).reshape(B, N, N * H)
    k_BSD, v_BSD = (buffer_BSNH.reshape(B, S, N * H).astype(dtype) for buffer_BSNH in past)
    is_new_S = jnp.arange(S) == offset
    scores_BSN = jnp.einsum("bsd,bnd->bsn", k_BSD, q_BND, preferred_element_type=jnp.float32)
    new_scores_BN1 = (q_B1NH * k_B1NH).astype(jnp.float32).sum(-1).reshape(B, N, 1)
    scores_BNS = jnp.where(is_new_S, new_scores_BN1, scores_BSN.swapaxes(1, 2))
    if masking.bias_BNTS is not None:
        scores_BNS = scores_BNS + masking.bias_BNTS[:, :, 0]
    probs_BNS = jax.nn.softmax(scores_BNS, axis=-1)
    new_prob_BN1 = jnp.where(is_new_S, probs_BNS, 0).sum(-1, keepdims=True)
    probs_BNS = jnp.where(is_new_S, 0, probs_BNS).astype(dtype)
    context_BND = jnp.einsum("bns,bsd->bnd", probs_BNS, v_BSD, preferred_element_type=jnp.float32)
    context_BNH = jnp.einsum("bnnh->bnh", context_BND.reshape(B, N, N, H)) + new_prob_BN1 * v_B1NH[:, 0]
    context_B1NH = context_BNH.astype(dtype)[:, None]
    slot = offset + _zero_after(context_B1NH)
    return context_B1NH, (append(past[0], k_B1NH, slot), append(past[1], v_B1NH, slot))


def _zero_after(array: Array) -> Array:
    """0, which XLA does not know before it has computed an array."""
    bits = lax.bitcast_convert_type(array.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return (bits & 1) >> 1
