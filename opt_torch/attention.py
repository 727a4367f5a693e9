"""Attention proper: the mask rule and the kernels that compute it.

The rule, the scaling and the value added to a masked score are those of `opt_common.reference`.
"""

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from opt_common.errors import InputError, MissingFrameworkError
from opt_torch import native
from opt_torch.cache import append

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flex_attention")
"""Values of `attn_implementation`. Attention probabilities, when asked for, always come from "eager"."""

DEFAULT_IMPLEMENTATION = "sdpa"


@dataclasses.dataclass(frozen=True)
class Masking:
    """What a query may attend to.

    Attributes:
        padding_BS: 1 for a key that may be attended to, 0 for padding; None for all ones.
        bias_BNTS: added to the scores, shape (B or 1, 1, T, S): 0 or the most negative number of the dtype. None
            means that each of the T queries attends to every key up to its own, the last query to all of them.
        maybe_empty: whether gradients are wanted and some query may attend to nothing (left padding).
    """

    padding_BS: Tensor | None = None
    bias_BNTS: Tensor | None = None
    maybe_empty: bool = False


def check_implementation(implementation: str) -> str:
    """The name of an implementation that can run here.

    Raises:
        InputError: for a name that is not in `IMPLEMENTATIONS`.
        MissingFrameworkError: for one whose package or device is absent.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"attn_implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "flash_attention_2":
        if not torch.cuda.is_available():
            raise MissingFrameworkError(
                "attn_implementation='flash_attention_2' needs an NVIDIA GPU, and PyTorch sees none. Use 'sdpa'."
            )
        if importlib.util.find_spec("flash_attn") is None:
            raise MissingFrameworkError(
                "attn_implementation='flash_attention_2' needs the package flash-attn, which is not installed. "
                "Install it, or use 'sdpa', which has flash kernels too."
            )
    return implementation


def attention_bias(attention_mask_BS: Tensor | None, T: int, S: int, offset: int | Tensor, like: Tensor) -> Tensor:
    """The mask rule as a number to add: query t, in slot `offset + t`, sees key s up to that slot unless s is padding.

    Args:
        attention_mask_BS: (B, S) of ones and zeros, or None for all ones.
        T: number of queries.
        S: number of key slots.
        offset: slot of the first query.
        like: tensor whose dtype and device the bias gets.
    """
    slots_S = torch.arange(S, device=like.device)
    allowed_BNTS = (slots_S <= offset + torch.arange(T, device=like.device)[:, None])[None, None]
    if attention_mask_BS is not None:
        allowed_BNTS = allowed_BNTS & (attention_mask_BS != 0)[:, None, None]
    return torch.zeros_like(allowed_BNTS, dtype=like.dtype).masked_fill_(~allowed_BNTS, torch.finfo(like.dtype).min)


def attend(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    v_BTNH: Tensor,
    masking: Masking,
    past: tuple[Tensor, Tensor] | None,
    offset: int | Tensor,
    *,
    implementation: str,
    dropout: float,
    need_probs: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """Attention of scaled queries.

    Args:
        q_BTNH: queries, already scaled.
        k_BTNH: keys of the same tokens.
        v_BTNH: their values.
        masking: what each query may attend to.
        past: buffers of the keys and values before them, (B, S, N, H) each, whose dtype attention computes in.
        offset: number of tokens in the buffers; where it is a tensor, queries look at whole buffers, and a bias masks.
        implementation: one of `IMPLEMENTATIONS`.
        dropout: probability of dropping an attention probability.
        need_probs: whether the probabilities are wanted, which only "eager" has.

    Returns:
        The context (B, T, N, H), the buffers with the new keys and values appended (without buffers, those alone), and,
        if wanted, the probabilities (B, N, T, S).
    """
    fused = implementation == "sdpa" and not need_probs and dropout == 0
    if (
        past is not None
        and (isinstance(offset, int) or native.recording.tape is not None)
        and fused
        and native.suits_attention(q_BTNH, k_BTNH, v_BTNH, masking.bias_BNTS, past)
    ):
        # It looks at no later slots: without padding, it needs no bias.
        bias_BNTS = None if masking.padding_BS is None else masking.bias_BNTS
        return native.attention(q_BTNH, k_BTNH, v_BTNH, bias_BNTS, past, offset), past, None
    present = k_BSNH, v_BSNH = (k_BTNH, v_BTNH)
    if past is not None:
        present = (append(past[0], k_BTNH, offset), append(past[1], v_BTNH, offset))
        # The first tokens need not be read out of the buffers, which may be of more bits than what is put into them.
        if isinstance(offset, Tensor) or offset > 0:
            q_BTNH, k_BSNH, v_BSNH = q_BTNH.to(past[0].dtype), *present
        if isinstance(offset, int) and offset > 0:
            k_BSNH, v_BSNH = (buffer_BSNH[:, : offset + q_BTNH.shape[1]] for buffer_BSNH in present)
    at_first = past is None or (isinstance(offset, int) and offset == 0)
    if fused and at_first and masking.bias_BNTS is None and native.suits_prompt(q_BTNH, k_BTNH, v_BTNH):
        return native.prompt_attention(q_BTNH, k_BTNH, v_BTNH), present, None
    # A fused kernel's backward pass rebuilds probabilities from log-sum-exp, which rounds away the logarithm of the
    # number of keys where every score is at the masked minimum: gradients come out that many times too large.
    if need_probs or implementation == "eager" or masking.maybe_empty:
        context_BTNH, probs_BNTS = _eager(q_BTNH, k_BSNH, v_BSNH, masking, dropout)
        return context_BTNH.to(k_BTNH.dtype), present, probs_BNTS if need_probs else None
    context_BTNH = _KERNELS[implementation](q_BTNH, k_BSNH, v_BSNH, masking, dropout)
    return context_BTNH.to(k_BTNH.dtype), present, None


def _eager(q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, masking: Masking, dropout: float) -> tuple[Tensor, Tensor]:
    T, S = q_BTNH.shape[1], k_BSNH.shape[1]
    bias_BNTS = masking.bias_BNTS if masking.bias_BNTS is not None else attention_bias(None, T, S, S - T, q_BTNH)
    scores_BNTS = torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH)
    # Softmax sums in float32 at least, whatever the model computes in.
    scores_BNTS = scores_BNTS.to(torch.promote_types(scores_BNTS.dtype, torch.float32)) + bias_BNTS
    probs_BNTS = torch.softmax(scores_BNTS, dim=-1).to(q_BTNH.dtype)
    probs_BNTS = functional.dropout(probs_BNTS, dropout, training=dropout > 0)
    return torch.einsum("bnts,bsnh->btnh", probs_BNTS, v_BSNH), probs_BNTS


def _sdpa(q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, masking: Masking, dropout: float) -> Tensor:
    T = q_BTNH.shape[1]
    bias_BNTS = masking.bias_BNTS
    if bias_BNTS is not None and bias_BNTS.dtype != q_BTNH.dtype:
        # Under autocast, float32's most negative number becomes minus infinity.
        bias_BNTS = bias_BNTS.to(q_BTNH.dtype).clamp(min=torch.finfo(q_BTNH.dtype).min)
    context_BNTH = functional.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSNH.transpose(1, 2),
        v_BSNH.transpose(1, 2),
        attn_mask=bias_BNTS,
        dropout_p=dropout,
        is_causal=bias_BNTS is None and T > 1,
        scale=1.0,
    )
    return context_BNTH.transpose(1, 2)


def _flex_attention(q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, masking: Masking, dropout: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if dropout > 0:
        raise InputError(
            "attn_implementation='flex_attention' has no attention dropout. Use 'sdpa', or attention_dropout=0."
        )
    if torch.is_grad_enabled() and q_BTNH.requires_grad and not q_BTNH.is_cuda:
        raise InputError(
            "attn_implementation='flex_attention' has no gradients on a CPU. Use 'sdpa', or torch.no_grad()."
        )
    T, S = q_BTNH.shape[1], k_BSNH.shape[1]
    bias_BNTS = masking.bias_BNTS if masking.bias_BNTS is not None else attention_bias(None, T, S, S - T, q_BTNH)
    shared_by_rows = bias_BNTS.shape[0] == 1

    def add_bias(score: Tensor, b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score + bias_BNTS[b * 0 if shared_by_rows else b, n * 0, t, s]

    # Compiled on a GPU, where the compiled kernel is what flex_attention is for; elsewhere its plain form runs.
    kernel = _compiled_flex_attention() if q_BTNH.is_cuda else flex_attention
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        context_BNTH = kernel(
            q_BTNH.transpose(1, 2), k_BSNH.transpose(1, 2), v_BSNH.transpose(1, 2), score_mod=add_bias, scale=1.0
        )
    return context_BNTH.transpose(1, 2)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flash_attention_2(q_BTNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, masking: Masking, dropout: float) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    if q_BTNH.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(
            f"attn_implementation='flash_attention_2' computes in float16 or bfloat16, got {q_BTNH.dtype}. Use 'sdpa'."
        )
    if masking.padding_BS is None:
        return flash_attn_func(q_BTNH, k_BSNH, v_BSNH, dropout_p=dropout, softmax_scale=1.0, causal=True)
    # Padding is cut out, and rows of unequal length go end to end; outputs of masked queries are zero.
    B, T, N, H = q_BTNH.shape
    key_mask_BS = masking.padding_BS != 0
    query_mask_BT = key_mask_BS[:, -T:]
    context_BTNH = q_BTNH.new_zeros((B, T, N, H))
    context_BTNH[query_mask_BT] = flash_attn_varlen_func(
        q_BTNH[query_mask_BT],
        k_BSNH[key_mask_BS],
        v_BSNH[key_mask_BS],
        cu_seqlens_q=_row_starts(query_mask_BT),
        cu_seqlens_k=_row_starts(key_mask_BS),
        max_seqlen_q=T,
        max_seqlen_k=key_mask_BS.shape[1],
        dropout_p=dropout,
        softmax_scale=1.0,
        causal=True,
    )
    return context_BTNH


def _row_starts(mask_BS: Tensor) -> Tensor:
    return functional.pad(mask_BS.sum(1).cumsum(0), (1, 0)).to(torch.int32)


_KERNELS = {"sdpa": _sdpa, "flex_attention": _flex_attention, "flash_attention_2": _flash_attention_2}
