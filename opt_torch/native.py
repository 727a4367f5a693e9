"""The products of `opt_common.native` on PyTorch's tensors."""

import ctypes

import torch
from torch import Tensor

from opt_common.native import MAX_ROWS, Kind, library

FUNCTION = None if (_loaded := library()) is None else _loaded.opt_product


def openmp() -> int | None:
    """The address of the function that runs another on the threads of the OpenMP that PyTorch has, or None.

    Its threads wait for work for a while before they sleep. Others would have to share the processors with them.
    """
    try:
        # The name of the library finds the one that is loaded already.
        return ctypes.cast(ctypes.CDLL("libgomp.so.1").GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


TEAM = openmp()

SUITING = {
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16,),
    torch.int8: (torch.float32, torch.bfloat16),
}
"""The dtypes of inputs that a product takes, by the dtype of the matrix."""

BIASES = (torch.float32, torch.bfloat16)
"""The dtypes of biases that a product takes."""


def suits(inputs: Tensor, matrix_FD: Tensor, bias_F: Tensor | None) -> bool:
    """Whether the library is to multiply inputs (…, D): some rows on a CPU of which nobody keeps a record."""
    return (
        FUNCTION is not None
        and inputs.dtype in SUITING.get(matrix_FD.dtype, ())
        and 0 < inputs.numel() <= MAX_ROWS * inputs.shape[-1]
        and inputs.device.type == "cpu"
        and matrix_FD.device.type == "cpu"
        and inputs.shape[-1] == matrix_FD.shape[1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and type(inputs) is Tensor
        and matrix_FD.is_contiguous()
        and (bias_F is None or (bias_F.dtype in BIASES and bias_F.is_contiguous()))
        and not watched()
    )


def watched() -> bool:
    """Whether calls of PyTorch's are compiled, traced, counted or stand for many: they would miss one of the library's."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def product(
    kind: Kind, inputs: Tensor, matrix_FD: Tensor, scales_F: Tensor | None = None, bias_F: Tensor | None = None
) -> Tensor:
    """Inputs (…, D) times the transposed matrix, and the bias, (…, F) in the dtype of the inputs."""
    assert FUNCTION is not None
    F, D = matrix_FD.shape
    inputs = inputs.contiguous()
    outputs = inputs.new_empty((*inputs.shape[:-1], F))
    is_bfloat16 = inputs.dtype is torch.bfloat16
    result = FUNCTION(
        kind,
        torch.get_num_threads(),
        TEAM,
        inputs.numel() // D,
        D,
        F,
        inputs.data_ptr(),
        is_bfloat16,
        matrix_FD.data_ptr(),
        None if scales_F is None else scales_F.data_ptr(),
        None if bias_F is None else bias_F.data_ptr(),
        bias_F is not None and bias_F.dtype is torch.bfloat16,
        outputs.data_ptr(),
        is_bfloat16,
    )
    if result != 0:
        raise MemoryError(f"A product of {inputs.numel() // D} rows with a matrix of {F} x {D} found no memory.")
    return outputs
