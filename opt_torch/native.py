"""The products of `opt_common.native` on PyTorch's tensors."""

import ctypes
import functools
import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from opt_common.native import MAX_ROWS, Kind, Operation, Task, library

if TYPE_CHECKING:
    from opt_torch.tape import Tape

_LIBRARY = library()
PRODUCT = None if _LIBRARY is None else _LIBRARY.opt_product
ATTENTION = None if _LIBRARY is None else _LIBRARY.opt_attention
# In plain C, it takes longer than PyTorch's.
PROMPT_ATTENTION = None if _LIBRARY is None or not _LIBRARY.opt_has_set() else _LIBRARY.opt_prompt_attention


def openmp() -> int | None:
    """The address of the function that runs another on the threads of the OpenMP that PyTorch has, or None.

    Its threads wait for work for a while before they sleep. Others would have to share the processors with them.
    """
    try:
        # Only one that is loaded already: another would be one more set of threads.
        loaded = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


TEAM = openmp()

EITHER = (torch.float32, torch.bfloat16)


class Recording(threading.local):
    """The tape that this thread records on."""

    tape: "Tape | None" = None


recording = Recording()

SUITING = {
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16,),
    torch.int8: EITHER,
    torch.uint8: EITHER,
}
"""The dtypes of inputs that a product takes, by the dtype of the matrix."""

BIASES = EITHER
"""The dtypes of biases that a product takes."""


# An operator without a promise: where a version of PyTorch lacks it, its own product serves.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

HAS_BFLOAT16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether the processor multiplies matrices in bfloat16. Without AVX-512, PyTorch takes five times as long so."""

HAS_INT8 = getattr(torch.cpu, "_is_vnni_supported", lambda: True)()
"""Whether it multiplies matrices of 8-bit integers. Without VNNI, PyTorch takes twenty times as long as in float32."""


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep the memory of activations for those that follow, up to 64 MB.

    glibc gives larger blocks back to the system, and the next ones cost a page fault for each 4 kB: a tenth of the time
    of a prompt. Once a block of almost 32 MB was freed, it takes such blocks for what comes and goes. Weights are to be
    loaded before, for they come and stay.
    """
    np.empty(2**25 - 2**16, np.uint8)


def onednn_product(inputs: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Inputs (…, D) times the transposed weight, and the bias, on a CPU: in float32, whatever the dtype of all is."""
    wide = (each if each is None else each.float() for each in (inputs, weight_FD, bias_F))
    return torch.ops.mkldnn._linear_pointwise(*wide, "none", [], "").to(inputs.dtype)


def wide_product(inputs_MD: Tensor, codes_FD: Tensor) -> Tensor:
    """Inputs, or integers in their place, times transposed integers, (M, F) in float32."""
    multiply = onednn_product if HAS_ONEDNN and not watched() else functional.linear
    return multiply(inputs_MD.float(), codes_FD.float())


def suits(inputs: Tensor, matrix_FX: Tensor, bias_F: Tensor | None) -> bool:
    """Whether the library is to multiply inputs (…, D): on a CPU, and nobody keeps a record.

    A matrix of two integers to a byte is (F, D / 2). It is multiplied whatever the number of rows is; others, by a few.
    """
    two_to_a_byte = matrix_FX.dtype is torch.uint8
    D = matrix_FX.shape[1] * (2 if two_to_a_byte else 1)
    return (
        PRODUCT is not None
        and inputs.dtype in SUITING.get(matrix_FX.dtype, ())
        and not watched()
        and inputs.numel() > 0
        and (two_to_a_byte or inputs.numel() <= MAX_ROWS * D)
        and inputs.device.type == "cpu"
        and matrix_FX.device.type == "cpu"
        and inputs.shape[-1] == D
        and not torch.is_autocast_enabled("cpu")
        and type(inputs) is Tensor
        and not (torch.is_grad_enabled() and recorded(inputs, matrix_FX, bias_F))
        and matrix_FX.is_contiguous()
        and (bias_F is None or (bias_F.dtype in BIASES and bias_F.is_contiguous()))
    )


def recorded(*tensors: Tensor | None) -> bool:
    """Whether a gradient of some of them may be asked for."""
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def watched() -> bool:
    """Whether PyTorch's calls are compiled, traced, counted, made for many at once or differentiated on their way."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > (recording.tape is not None)
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or forward_ad._current_level >= 0
    )


def product(
    kind: Kind, inputs: Tensor, matrix_FX: Tensor, scales: Tensor | None = None, *, bias_F: Tensor | None = None
) -> Tensor:
    """Inputs (…, D) times the transposed matrix, and the bias, (…, F) in the dtype of the inputs."""
    assert PRODUCT is not None
    D = inputs.shape[-1]
    F = len(matrix_FX)
    M = inputs.numel() // D
    inputs = inputs.contiguous()
    outputs = inputs.new_empty((*inputs.shape[:-1], F))
    is_bfloat16 = inputs.dtype is torch.bfloat16
    bias = (None, False) if bias_F is None else (bias_F.data_ptr(), bias_F.dtype is torch.bfloat16)
    arguments = (
        *(kind, M, D, F),
        *(inputs.data_ptr(), is_bfloat16),
        *(matrix_FX.data_ptr(), None if scales is None else scales.data_ptr()),
        *bias,
        *(outputs.data_ptr(), is_bfloat16),
    )
    if PRODUCT(kind, torch.get_num_threads(), TEAM, *arguments[1:]) != 0:
        raise MemoryError(f"A product of {M} rows with a matrix of {F} x {D} found no memory.")
    if recording.tape is not None:
        recording.tape.add_operation(
            operation(Task.PRODUCT, *arguments), (inputs, matrix_FX, scales, bias_F), (outputs,)
        )
    return outputs


def suits_attention(
    q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, bias_BNTS: Tensor | None, past: tuple[Tensor, Tensor]
) -> bool:
    """Whether the library is to compute attention of one new token a row: see `suits`."""
    B, T, _, H = q_BTNH.shape
    return (
        ATTENTION is not None
        and T == 1
        and q_BTNH.dtype in BIASES
        and q_BTNH.device.type == "cpu"
        and not (torch.is_grad_enabled() and recorded(q_BTNH, k_BTNH, v_BTNH, bias_BNTS, *past))
        and all(type(each) is Tensor and each.dtype is q_BTNH.dtype for each in (k_BTNH, v_BTNH))
        and all(each.stride()[2:] == (H, 1) for each in (q_BTNH, k_BTNH, v_BTNH))
        and (B == 1 or k_BTNH.stride(0) == v_BTNH.stride(0))
        and all(each.dtype is torch.float32 and each.is_contiguous() for each in past)
        and (bias_BNTS is None or (bias_BNTS.dtype is q_BTNH.dtype and bias_BNTS.stride(3) == 1))
        and not watched()
    )


def attention(
    q_B1NH: Tensor,
    k_B1NH: Tensor,
    v_B1NH: Tensor,
    bias_BN1S: Tensor | None,
    past: tuple[Tensor, Tensor],
    offset: int | Tensor,
) -> Tensor:
    """The context of scaled queries, (B, 1, N, H), once the keys and values are in slot `offset` of the buffers.

    Only slots up to that one are looked at, also by what is recorded, where the slot is a tensor.
    """
    assert ATTENTION is not None
    keys_BSNH, values_BSNH = past
    B, S, N, H = keys_BSNH.shape
    context_B1NH = q_B1NH.new_empty((B, 1, N, H))
    slot = offset if isinstance(offset, int) else ctypes.c_int64.from_address(offset.data_ptr()).value
    queries = (q_B1NH.data_ptr(), q_B1NH.stride(0))
    new = (k_B1NH.data_ptr(), v_B1NH.data_ptr(), k_B1NH.stride(0))
    is_bfloat16 = q_B1NH.dtype is torch.bfloat16
    bias = (None, 0)
    if bias_BN1S is not None:
        bias = (bias_BN1S.data_ptr(), 0 if len(bias_BN1S) == 1 else bias_BN1S.stride(0))
    buffers = (keys_BSNH.data_ptr(), values_BSNH.data_ptr())
    results = (*buffers, False, context_B1NH.data_ptr())
    if ATTENTION(torch.get_num_threads(), TEAM, B, N, H, S, slot, *queries, *new, is_bfloat16, *bias, *results) != 0:
        raise MemoryError(f"Attention of {B} rows to {slot + 1} tokens found no memory.")
    if recording.tape is not None:
        assert isinstance(offset, Tensor)
        arguments = (is_bfloat16, B, N, H, S, offset, *queries, *new, *bias, *buffers, context_B1NH)
        recording.tape.add_operation(
            operation(Task.ATTENTION, *arguments), (q_B1NH, k_B1NH, v_B1NH, bias_BN1S, offset), (context_B1NH,), past
        )
    return context_B1NH


def suits_prompt(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> bool:
    """Whether the library is to compute attention of a prompt's tokens, each to those up to itself: see `suits`."""
    B, T, _, H = q_BTNH.shape
    return (
        PROMPT_ATTENTION is not None
        and T > 1
        and q_BTNH.numel() > 0
        and q_BTNH.dtype in EITHER
        and k_BTNH.shape == v_BTNH.shape == q_BTNH.shape
        and not (torch.is_grad_enabled() and recorded(q_BTNH, k_BTNH, v_BTNH))
        and all(
            type(each) is Tensor
            and each.device.type == "cpu"
            and each.dtype is q_BTNH.dtype
            and each.stride()[2:] == (H, 1)
            and (B == 1 or each.stride(0) == T * each.stride(1))
            for each in (q_BTNH, k_BTNH, v_BTNH)
        )
        and not torch.is_autocast_enabled("cpu")
        and not watched()
    )


def prompt_attention(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """The context of scaled queries, (B, T, N, H), each of which attends to the tokens up to its own."""
    assert PROMPT_ATTENTION is not None
    B, T, N, H = q_BTNH.shape
    context_BTNH = q_BTNH.new_empty((B, T, N, H))
    places = [place for each in (q_BTNH, k_BTNH, v_BTNH) for place in (each.data_ptr(), each.stride(1))]
    is_bfloat16 = q_BTNH.dtype is torch.bfloat16
    if PROMPT_ATTENTION(torch.get_num_threads(), TEAM, B, T, N, H, *places, is_bfloat16, context_BTNH.data_ptr()) != 0:
        raise MemoryError(f"Attention of {B} rows of {T} tokens found no memory.")
    return context_BTNH


def operation(task: Task, *arguments: torch.dtype | Tensor | int | None, number: float = 0.0) -> Operation:
    """An operation as the library takes it: tensors by where they are, nothing as 0, and EITHER by whether bfloat16."""
    places = [
        each.data_ptr()
        if isinstance(each, Tensor)
        else each is torch.bfloat16
        if isinstance(each, torch.dtype)
        else each
        for each in arguments
    ]
    return Operation(task, tuple(int(place or 0) for place in places), number)
