"""Layers whose weights are integers: `opt_common.quantization` in PyTorch.

They stand where linear layers and tables of embeddings stand. Their integers are buffers, so that no optimiser moves
them; gradients flow through them to what comes before.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from opt_common.errors import CheckpointError
from opt_common.native import Kind
from opt_common.quantization import GROUP_SIZE, INT8_LIMIT, OUTLIER, Rows, pack, quantize_groups, quantize_rows, unpack
from opt_torch import native

AVAILABLE = ("int8-dynamic", "int8", "int4")
"""Values of `OPTConfig.quantization` that this backend has."""

KERNEL_WIDTH = 16
"""PyTorch's kernels for few bits on a CPU take matrices of multiples of this alone, without a check of their own."""

KERNEL_ROWS = 15
"""Rows up to which PyTorch's product by 8-bit integers on a CPU is faster than one by the same in bfloat16: it is made
for decoding, and takes two and a half times as long for a prompt."""

KERNEL_BLOCK = 64
"""Rows that PyTorch's 4-bit kernel orders on their own."""

BLOCK_ROWS = 16 * KERNEL_BLOCK
"""Rows of 4-bit integers that are taken over at a time. PyTorch's threads wait for each other after each block
that they bring into the order of its kernel, which costs seconds in all where the processor is busy."""

CUDA_ROWS = 17
"""PyTorch's product of 8-bit integers takes no fewer rows than this on CUDA."""


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights.

    Attributes:
        codes_FD: the integers.
        scales_F: what a row of them is multiplied by.
        bias: (F,) or None.
        dynamic: whether inputs are rounded too.
        kind: the library's name for the product.
    """

    codes_FD: Tensor
    scales_F: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool, dynamic: bool, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dynamic = dynamic
        self.kind = Kind.INT8_DYNAMIC_ROWS if dynamic else Kind.INT8_ROWS
        self.register_buffer("codes_FD", torch.zeros((out_features, in_features), dtype=torch.int8, device=device))
        self.register_buffer("scales_F", torch.zeros(out_features, device=device))
        bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if use_bias else None
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, D) to outputs (…, F)."""
        if native.suits(inputs, self.codes_FD, self.bias):
            return native.product(self.kind, inputs, self.codes_FD, self.scales_F, bias_F=self.bias)
        inputs_MD = inputs.reshape(-1, self.in_features)
        multiply = self.multiply_rounded if self.dynamic else self.multiply
        outputs_MF = multiply(inputs_MD)
        outputs_MF = outputs_MF if self.bias is None else outputs_MF + self.bias
        return outputs_MF.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def multiply_rounded(self, inputs_MD: Tensor) -> Tensor:
        """The product with rounded inputs."""
        return int8_product(inputs_MD, self.codes_FD, self.scales_F)

    def multiply(self, inputs_MD: Tensor) -> Tensor:
        """The product with inputs as they are."""
        kernel = inputs_MD.device.type == "cpu" and self.in_features % KERNEL_WIDTH == 0
        if not kernel or inputs_MD.requires_grad or inputs_MD.dtype == torch.float64:
            return functional.linear(inputs_MD, self.codes_FD.to(inputs_MD.dtype)) * self.scales_F
        if len(inputs_MD) > KERNEL_ROWS and not native.HAS_BFLOAT16:
            return native.wide_product(inputs_MD, self.codes_FD) * self.scales_F
        if len(inputs_MD) > KERNEL_ROWS:
            return functional.linear(inputs_MD.bfloat16(), self.codes_FD.bfloat16()) * self.scales_F
        # The kernel is fast on bfloat16 alone.
        return torch.ops.aten._weight_int8pack_mm(inputs_MD.bfloat16(), self.codes_FD, self.scales_F.bfloat16())

    def assign_rounded(self, weight_FD: Rows, device: Any, dtype: torch.dtype) -> None:
        """Take over the numbers of a matrix, (F, D)."""
        self.assign_stored(list(map(torch.from_numpy, quantize_rows(weight_FD))), device, dtype)

    def assign_stored(self, parts: Sequence[Tensor], device: Any, dtype: torch.dtype) -> None:
        """Take over the parts of a matrix, as `opt_common.quantization.stored_parts` names them."""
        del dtype  # that of the inputs is kept
        self.codes_FD, self.scales_F = (part.to(device) for part in parts)

    def stored(self, index: int) -> Tensor:
        """One of those parts."""
        return (self.codes_FD, self.scales_F)[index]

    @property
    def weight(self) -> Tensor:
        """The matrix, (F, D), float32, made anew each time."""
        return self.codes_FD * self.scales_F[:, None]


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights.

    Attributes:
        codes: the integers, two to a byte, (F, D / 2).
        groups: scale and offset of each group, (F, D / 32, 2).
        bias: (F,) or None.
        kind: the library's name for the product.
    """

    kind = Kind.INT4_ROWS

    codes: Tensor
    groups: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8, device=device))
        self.register_buffer("groups", torch.empty(0, dtype=torch.bfloat16, device=device))
        bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if use_bias else None
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, D) to outputs (…, F)."""
        if native.suits(inputs, self.codes, self.bias):
            return native.product(self.kind, inputs, self.codes, self.groups, bias_F=self.bias)
        # Inputs are rounded to bfloat16 on every path.
        rounded = inputs.bfloat16().float()
        if native.suits(rounded, self.codes, None):
            outputs = native.product(self.kind, rounded, self.codes, self.groups)
        else:
            outputs = functional.linear(rounded, self.weight)
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs.to(inputs.dtype)

    def assign_rounded(self, weight_FD: Rows, device: Any, dtype: torch.dtype) -> None:
        """Take over the numbers of a matrix, (F, D).

        Raises:
            CheckpointError: for a shape or a device that PyTorch's kernel does not take.
        """
        del dtype  # that of the inputs is kept
        F, D = weight_FD.shape
        self.start(F, D, device)
        for block in blocks(F, BLOCK_ROWS):
            codes_FD, scales_FG, offsets_FG = quantize_groups(weight_FD[block])
            self.assign_rows(block, *map(torch.from_numpy, (pack(codes_FD), scales_FG, offsets_FG)))

    def assign_stored(self, parts: Sequence[Tensor], device: Any, dtype: torch.dtype) -> None:
        """Take over the parts of a matrix, as `opt_common.quantization.stored_parts` names them.

        Raises:
            CheckpointError: as `assign_rounded`.
        """
        del dtype  # that of the inputs is kept
        codes_FX, scales_FG, offsets_FG = parts
        self.start(len(codes_FX), 2 * codes_FX.shape[1], device)
        for block in blocks(len(codes_FX), BLOCK_ROWS):
            self.assign_rows(block, codes_FX[block], scales_FG[block], offsets_FG[block])

    def stored(self, index: int) -> Tensor:
        """One of those parts."""
        return self.codes if index == 0 else self.groups[:, :, index - 1].contiguous()

    def start(self, rows: int, columns: int, device: Any) -> None:
        """Make room for a matrix."""
        self.codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device=device)
        self.groups = torch.empty((rows, columns // GROUP_SIZE, 2), dtype=torch.bfloat16, device=device)

    def assign_rows(self, block: slice, codes_FX: Tensor, scales_FG: Tensor, offsets_FG: Tensor) -> None:
        """Take over some rows."""
        self.codes[block] = codes_FX
        self.groups[block] = torch.stack((scales_FG, offsets_FG), dim=-1)

    @property
    def weight(self) -> Tensor:
        """The matrix, (F, D), float32, made anew each time."""
        codes_FX2 = torch.stack((self.codes & 15, self.codes >> 4), dim=-1)
        groups_FG2 = self.groups.float()
        codes_FGC = (codes_FX2.float() - 8).view(*groups_FG2.shape[:2], GROUP_SIZE)
        return (codes_FGC * groups_FG2[..., :1] + groups_FG2[..., 1:]).flatten(1)


class KernelInt4Linear(Int4Linear):
    """The same by PyTorch's own kernel, in whose order its parts are, where there is no library in C."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, D) to outputs (…, F)."""
        inputs_MD = inputs.reshape(-1, self.in_features)
        if inputs_MD.requires_grad:
            outputs_MF = functional.linear(inputs_MD, self.weight.to(inputs.dtype))
        else:
            outputs_MF = self.multiply(inputs_MD)
        outputs_MF = outputs_MF if self.bias is None else outputs_MF + self.bias
        return outputs_MF.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def multiply(self, inputs_MD: Tensor) -> Tensor:
        """The product with inputs rounded to bfloat16."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(inputs_MD.bfloat16(), self.codes, GROUP_SIZE, self.groups)

    def stored(self, index: int) -> Tensor:
        """One of the parts of a matrix."""
        if index > 0:
            return self.groups[:, :, index - 1].T.contiguous()
        codes_FX = torch.empty_like(self.codes)
        for block in blocks(len(codes_FX), KERNEL_BLOCK):
            kernel_FD = unpack(self.codes[block].numpy())
            codes_FD = kernel_FD.reshape(-1)[kernel_order(*kernel_FD.shape)].reshape(kernel_FD.shape)
            codes_FX[block] = torch.from_numpy(pack(codes_FD))
        return codes_FX

    def start(self, rows: int, columns: int, device: Any) -> None:
        """Make room for a matrix."""
        if torch.device(device).type != "cpu":
            raise CheckpointError(
                'quantization="int4" computes on a CPU alone where there is no library in C. Use "int8-dynamic", or '
                'device="cpu".'
            )
        super().start(rows, columns, device)
        if rows % KERNEL_WIDTH:
            raise CheckpointError(
                f'quantization="int4" needs matrices whose height is a multiple of {KERNEL_WIDTH}, got {rows}. '
                'Use "int8".'
            )
        self.groups = torch.empty((columns // GROUP_SIZE, rows, 2), dtype=torch.bfloat16)

    def assign_rows(self, block: slice, codes_FX: Tensor, scales_FG: Tensor, offsets_FG: Tensor) -> None:
        """Take over some rows, which the kernel orders on their own."""
        codes_FD = torch.from_numpy(unpack(codes_FX.numpy())).int()
        self.codes[block] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_FD, 1)
        self.groups[:, block] = torch.stack((scales_FG.T, offsets_FG.T), dim=-1)

    @property
    def weight(self) -> Tensor:
        """The matrix, (F, D), bfloat16, made anew each time: what the kernel makes of each unit vector."""
        return self.multiply(torch.eye(self.in_features, dtype=torch.bfloat16)).T.contiguous()


class Int8Embedding(nn.Module):
    """A table of embeddings with 8-bit rows; attributes are those of `Int8Linear`."""

    codes_FD: Tensor
    scales_F: Tensor

    def __init__(self, rows: int, features: int, *, dynamic: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.dtype = dtype or torch.get_default_dtype()
        self.register_buffer("codes_FD", torch.zeros((rows, features), dtype=torch.int8, device=device))
        self.register_buffer("scales_F", torch.zeros(rows, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (…,) to rows (…, D)."""
        return (self.codes_FD[ids] * self.scales_F[ids][..., None]).to(self.dtype)

    def assign_rounded(self, weight_FD: Rows, device: Any, dtype: torch.dtype) -> None:
        """Take over the numbers of a table, (V, D), whose rows are to be of a dtype."""
        self.assign_stored(list(map(torch.from_numpy, quantize_rows(weight_FD))), device, dtype)

    def assign_stored(self, parts: Sequence[Tensor], device: Any, dtype: torch.dtype) -> None:
        """Take over the parts of a table, as `opt_common.quantization.stored_parts` names them."""
        self.dtype = dtype
        self.codes_FD, self.scales_F = (part.to(device) for part in parts)

    def stored(self, index: int) -> Tensor:
        """One of those parts."""
        return (self.codes_FD, self.scales_F)[index]

    def head(self) -> Int8Linear:
        """The same table as a linear layer from embeddings to the vocabulary; nothing is copied."""
        V, D = self.codes_FD.shape
        layer = Int8Linear(D, V, use_bias=False, dynamic=self.dynamic, device="meta", dtype=None)
        layer.codes_FD, layer.scales_F = self.codes_FD, self.scales_F
        return layer

    @property
    def weight(self) -> Tensor:
        """The table, (V, D), made anew each time."""
        return (self.codes_FD * self.scales_F[:, None]).to(self.dtype)


def int4_linear(in_features: int, out_features: int, **options: Any) -> Int4Linear:
    """A linear layer with 4-bit weights, of the kind that is fast here."""
    return (KernelInt4Linear if native.PRODUCT is None else Int4Linear)(in_features, out_features, **options)


def blocks(rows: int, step: int) -> Iterator[slice]:
    """Stretches of rows."""
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@functools.lru_cache(maxsize=4)
def kernel_order(rows: int, columns: int) -> np.ndarray:
    """Where each 4-bit integer of a block, counted row by row, is in what `unpack` reads of the kernel's bytes.

    PyTorch has a function that orders integers and none that puts them back, and orders them otherwise on other
    processors. So the numbers of their places are ordered, four bits at a time.
    """
    places = torch.arange(rows * columns, dtype=torch.int32)
    ordered = np.zeros(rows * columns, np.int64)
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        digits = (places >> shift & 15).view(rows, columns)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits, 1)
        ordered |= unpack(packed.numpy()).reshape(-1).astype(np.int64) << shift
    order = np.empty_like(ordered)
    order[ordered] = places.numpy()
    return order


def int8_product(inputs_MD: Tensor, codes_FD: Tensor, scales_F: Tensor) -> Tensor:
    """The product of "int8-dynamic", (M, F) in float32; its gradient is that of the product with `codes * scales`."""
    if torch.is_grad_enabled() and inputs_MD.requires_grad:
        return Int8Product.apply(inputs_MD, codes_FD, scales_F)
    inputs_MD = inputs_MD.float()
    rounded_MD, steps_M = round_rows(inputs_MD)
    # A GPU would have to be waited for to see whether there are any.
    has_large = inputs_MD.is_cuda or (len(inputs_MD) > 0 and float(steps_M.max()) > OUTLIER / INT8_LIMIT)
    if not has_large:
        return multiply_integers(rounded_MD, codes_FD) * steps_M * scales_F
    large_MD = inputs_MD * (inputs_MD.abs() > OUTLIER)
    large_rounded_MD, large_steps_M = round_rows(large_MD)
    rounded_MD, steps_M = round_rows(inputs_MD - large_rounded_MD * large_steps_M)
    products_MF = multiply_integers(large_rounded_MD, codes_FD) * large_steps_M
    return (products_MF + multiply_integers(rounded_MD, codes_FD) * steps_M) * scales_F


class Int8Product(torch.autograd.Function):
    """`int8_product` where gradients are wanted."""

    @staticmethod
    def forward(ctx: Any, inputs_MD: Tensor, codes_FD: Tensor, scales_F: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(codes_FD, scales_F)
        ctx.dtype = inputs_MD.dtype
        return int8_product(inputs_MD.detach(), codes_FD, scales_F)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the inputs."""
        codes_FD, scales_F = ctx.saved_tensors
        return ((gradients[0] * scales_F) @ codes_FD.float()).to(ctx.dtype), None, None


def round_rows(inputs_MD: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit integers and the step of each row, (M, 1)."""
    peaks_M = inputs_MD.abs().amax(-1, keepdim=True)
    # The smallest normal number keeps rows of zeros from being divided by zero.
    steps_M = (peaks_M / INT8_LIMIT).clamp_min_(torch.finfo(torch.float32).tiny)
    return (inputs_MD / steps_M).round_().to(torch.int8), steps_M


def multiply_integers(rounded_MD: Tensor, codes_FD: Tensor) -> Tensor:
    """The product of integers with a transposed matrix of them, (M, F)."""
    M = len(rounded_MD)
    if not rounded_MD.is_cuda and M > KERNEL_ROWS and not native.HAS_INT8:
        return native.wide_product(rounded_MD, codes_FD)
    if rounded_MD.is_cuda and M < CUDA_ROWS:
        rounded_MD = functional.pad(rounded_MD, (0, 0, 0, CUDA_ROWS - M))
    products_MF = torch._int_mm(rounded_MD, codes_FD.T)  # pyright: ignore[reportPrivateImportUsage]
    return products_MF[:M]
