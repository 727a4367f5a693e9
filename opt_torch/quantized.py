"""Layers whose weights are integers: `opt_common.quantization` in PyTorch.

They stand where `torch.nn.Linear` and `torch.nn.Embedding` stand. Their integers are buffers, so no optimiser moves
them; gradients flow through them to whatever comes before.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from opt_common.errors import CheckpointError
from opt_common.params import Parameter
from opt_common.quantization import (
    GROUP_SIZE,
    INT8_LIMIT,
    OUTLIER,
    Quantization,
    is_table,
    quantize_groups,
    quantize_rows,
)

AVAILABLE: tuple[Quantization, ...] = ("int8", "int8-dynamic", "int4")

KERNEL_WIDTH = 16
"""PyTorch's kernels for few bits on a CPU take matrices of multiples of this alone, without a check of their own."""

CUDA_ROWS = 17
"""PyTorch's product of 8-bit integers takes no fewer rows than this on CUDA."""


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights.

    Attributes:
        codes_FD: the integers.
        scales_F: what a row of them is multiplied by.
        bias: (F,) or None.
        dynamic: whether inputs are rounded too.
    """

    codes_FD: Tensor
    scales_F: Tensor

    def __init__(self, codes_FD: Tensor, scales_F: Tensor, *, dynamic: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = codes_FD.shape
        self.dynamic = dynamic
        self.register_buffer("codes_FD", codes_FD)
        self.register_buffer("scales_F", scales_F)
        self.register_parameter("bias", None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, D) to outputs (…, F)."""
        inputs_MD = inputs.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and inputs.requires_grad:
            outputs_MF = functional.linear(inputs_MD, self.weight.to(inputs.dtype))
            outputs_MF = outputs_MF if self.bias is None else outputs_MF + self.bias
        elif self.dynamic:
            outputs_MF = self.multiply_rounded(inputs_MD)
        else:
            outputs_MF = self.multiply(inputs_MD)
        return outputs_MF.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """The matrix, (F, D), float32, made anew each time."""
        return self.codes_FD * self.scales_F[:, None]

    def multiply(self, inputs_MD: Tensor) -> Tensor:
        """The product with inputs as they are."""
        if inputs_MD.is_cuda or inputs_MD.dtype == torch.float64 or self.in_features % KERNEL_WIDTH:
            outputs_MF = functional.linear(inputs_MD, self.codes_FD.to(inputs_MD.dtype)) * self.scales_F
        else:
            # The kernel is fast on bfloat16 inputs alone.
            outputs_MF = torch.ops.aten._weight_int8pack_mm(
                inputs_MD.bfloat16(), self.codes_FD, self.scales_F.bfloat16()
            )
        return outputs_MF if self.bias is None else outputs_MF + self.bias

    def multiply_rounded(self, inputs_MD: Tensor) -> Tensor:
        """The product with inputs rounded to 8 bits, a scale a row; those beyond `OUTLIER` exactly."""
        inputs_MD = inputs_MD.float()
        peaks_M = torch.linalg.vector_norm(inputs_MD, torch.inf, -1, keepdim=True)
        exact_MF: Tensor | None = None
        if float(peaks_M.max()) > OUTLIER:
            is_large_MD = inputs_MD.abs() > OUTLIER
            (columns_K,) = is_large_MD.any(0).nonzero(as_tuple=True)
            large_MK = (inputs_MD * is_large_MD)[:, columns_K]
            exact_MF = functional.linear(large_MK, self.codes_FD[:, columns_K].float())
            inputs_MD = inputs_MD.masked_fill(is_large_MD, 0)
            peaks_M = torch.linalg.vector_norm(inputs_MD, torch.inf, -1, keepdim=True)
        # The smallest normal number keeps rows of zeros from dividing by it.
        steps_M = (peaks_M / INT8_LIMIT).clamp_min_(torch.finfo(torch.float32).tiny)
        rounded_MD = (inputs_MD / steps_M).round_().to(torch.int8)
        outputs_MF = multiply_integers(rounded_MD, self.codes_FD) * steps_M
        if exact_MF is not None:
            outputs_MF += exact_MF
        return (
            outputs_MF.mul_(self.scales_F) if self.bias is None else torch.addcmul(self.bias, outputs_MF, self.scales_F)
        )


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights.

    Attributes:
        packed: the integers, in the order that the kernel reads.
        scales_GF2: scale and offset of each group.
        bias: (F,) or None.
    """

    packed: Tensor
    scales_GF2: Tensor

    def __init__(self, codes_FD: Tensor, scales_FG: Tensor, offsets_FG: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = codes_FD.shape
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_FD.int(), 1)
        self.register_buffer("packed", packed)
        scales_GF2 = torch.stack((scales_FG.T, offsets_FG.T), dim=-1).bfloat16().contiguous()
        self.register_buffer("scales_GF2", scales_GF2)
        self.register_parameter("bias", None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, D) to outputs (…, F)."""
        inputs_MD = inputs.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and inputs.requires_grad:
            outputs_MF = functional.linear(inputs_MD, self.weight.to(inputs.dtype))
        else:
            outputs_MF = self.multiply(inputs_MD)
        outputs_MF = outputs_MF if self.bias is None else outputs_MF + self.bias
        return outputs_MF.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def multiply(self, inputs_MD: Tensor) -> Tensor:
        """The product with inputs rounded to bfloat16."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            inputs_MD.bfloat16(), self.packed, GROUP_SIZE, self.scales_GF2
        )

    @property
    def weight(self) -> Tensor:
        """The matrix, (F, D), bfloat16, made anew each time: what the kernel makes of each unit vector."""
        return self.multiply(torch.eye(self.in_features, dtype=torch.bfloat16)).T


class Int8Embedding(nn.Module):
    """A table of embeddings with 8-bit rows; attributes are those of `Int8Linear`."""

    codes_FD: Tensor
    scales_F: Tensor

    def __init__(self, codes_FD: Tensor, scales_F: Tensor, *, dtype: torch.dtype, dynamic: bool) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes_FD.shape
        self.dtype = dtype
        self.dynamic = dynamic
        self.register_buffer("codes_FD", codes_FD)
        self.register_buffer("scales_F", scales_F)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (…,) to rows (…, D)."""
        return (self.codes_FD[ids] * self.scales_F[ids][..., None]).to(self.dtype)

    def head(self) -> Int8Linear:
        """The same table as a linear layer from embeddings to the vocabulary; nothing is copied."""
        return Int8Linear(self.codes_FD, self.scales_F, dynamic=self.dynamic)

    @property
    def weight(self) -> Tensor:
        """The table, (V, E), made anew each time."""
        return (self.codes_FD * self.scales_F[:, None]).to(self.dtype)


def multiply_integers(inputs_MD: Tensor, codes_FD: Tensor) -> Tensor:
    """The product of 8-bit integers with a transposed matrix of them, in 32 bits, (M, F)."""
    M = len(inputs_MD)
    if inputs_MD.is_cuda and M < CUDA_ROWS:
        inputs_MD = functional.pad(inputs_MD, (0, 0, 0, CUDA_ROWS - M))
    return torch._int_mm(inputs_MD, codes_FD.T)[:M]


def quantized_layer(
    parameter: Parameter, array: np.ndarray, quantization: Quantization, *, dtype: torch.dtype, device: Any
) -> nn.Module:
    """The layer that holds a row of the parameter table in fewer bits.

    Args:
        parameter: a row that `opt_common.quantization.is_quantized` names.
        array: its numbers.
        quantization: how they are rounded.
        dtype: dtype of what a table of embeddings gives.
        device: where the integers go.

    Raises:
        CheckpointError: for a matrix whose shape the scheme does not take.
    """
    if quantization == "int4" and not is_table(parameter):
        if len(array) % KERNEL_WIDTH:
            raise CheckpointError(
                f'quantization="int4" needs matrices whose height is a multiple of {KERNEL_WIDTH}, but '
                f'{parameter.name} has {len(array)} rows. Use "int8".'
            )
        return Int4Linear(*(torch.from_numpy(part) for part in quantize_groups(array))).to(device)
    codes_FD, scales_F = (torch.from_numpy(part).to(device) for part in quantize_rows(array))
    dynamic = quantization == "int8-dynamic"
    if parameter.kind == "embedding.weight":
        return Int8Embedding(codes_FD, scales_F, dtype=dtype, dynamic=dynamic)
    return Int8Linear(codes_FD, scales_F, dynamic=dynamic)
