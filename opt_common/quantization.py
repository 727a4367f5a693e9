"""Weights in 8 or 4 bits: which matrices, how they are rounded, and what a product with them is.

NumPy, to be read; the file `quantized.py` in each backend computes the same in its layers.

- "int8": each row of a matrix is stored as integers from -127 to 127 and one scale. Inputs stay as they are.
- "int8-dynamic": the same weights; each row of inputs is rounded likewise at the moment of the product, which then is a
  product of integers. Inputs beyond `OUTLIER` have a scale of their own, and what their rounding leaves is rounded with
  the rest: large models have a few such columns, and one of them would cost all other inputs of its row their precision
  (Dettmers et al. 2022, "LLM.int8()", whose threshold this is).
- "int4": each `GROUP_SIZE` neighbours in a row are stored as integers from 0 to 15, a scale and an offset, both rounded
  to bfloat16. Inputs are rounded to bfloat16. The token table is stored as in "int8".

Quantised are the matrices of the decoder, the token table and the head of a language model; position embeddings, layer
norms, biases and the heads of other tasks stay as they are.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError
from opt_common.params import Parameter, head_of

INT8_LIMIT = 127
"""The largest 8-bit integer used; -128 is not, so that the sign costs nothing."""

GROUP_SIZE = 32
"""How many neighbours in a row share a scale and an offset in "int4"."""

OUTLIER = 6.0
"""Inputs of a larger magnitude have a scale of their own in "int8-dynamic"."""

_BLOCK_BYTES = 1 << 20
# Rows are rounded in blocks that stay in a processor's cache.


class Rows(Protocol):
    """A matrix of floating-point numbers, of which a stretch of rows is asked for at a time: an array, or a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> npt.NDArray[Any]: ...


def check_quantization(config: OPTConfig, available: Sequence[str]) -> None:
    """Refuse a configuration whose quantisation a backend does not have.

    Args:
        config: the model's configuration.
        available: what the backend has.

    Raises:
        ConfigError: if it has another.
    """
    if config.quantization is not None and config.quantization not in available:
        raise ConfigError(
            f"quantization is {config.quantization!r}, which this framework does not have: it has "
            f"{', '.join(map(repr, available))}. Use one of them, or PyTorch."
        )


def is_quantized(parameter: Parameter) -> bool:
    """Whether a row of the parameter table is stored in fewer bits."""
    if parameter.name == "model.decoder.embed_tokens.weight":
        return True
    return parameter.kind == "linear.weight" and head_of(parameter.name) in (None, "lm")


def quantize_rows(weight_FD: Rows) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round a matrix to 8-bit integers, one scale a row.

    Args:
        weight_FD: floating-point numbers.

    Returns:
        Integers (F, D) and scales (F,): `weight ≈ integers * scales[:, None]`. A row of zeros has the scale 0.
    """
    F, D = weight_FD.shape
    codes_FD = np.empty((F, D), dtype=np.int8)
    scales_F = np.empty(F, dtype=np.float32)
    step = max(1, _BLOCK_BYTES // (4 * D))
    for start in range(0, F, step):
        rows_FD = weight_FD[start : start + step].astype(np.float32)
        peaks_F = np.abs(rows_FD).max(axis=1)
        scales_F[start : start + step] = peaks_F / INT8_LIMIT
        inverse_F = np.divide(INT8_LIMIT, peaks_F, out=np.zeros_like(peaks_F), where=peaks_F > 0)
        codes_FD[start : start + step] = np.rint(rows_FD * inverse_F[:, None])
    return codes_FD, scales_F


def quantize_groups(
    weight_FD: Rows,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Round a matrix to 4-bit integers, one scale and one offset for each `GROUP_SIZE` neighbours in a row.

    Args:
        weight_FD: floating-point numbers, D a multiple of `GROUP_SIZE`.

    Returns:
        Integers (F, D) from 0 to 15, scales (F, D / GROUP_SIZE) and offsets, likewise, which are bfloat16 numbers:
        `weight ≈ (integers - 8) * scale + offset`.

    Raises:
        CheckpointError: if D is no multiple of `GROUP_SIZE`.
    """
    F, D = weight_FD.shape
    if D % GROUP_SIZE:
        raise CheckpointError(
            f'quantization="int4" needs matrices whose width is a multiple of {GROUP_SIZE}, got {D}. Use "int8".'
        )
    codes_FD = np.empty((F, D), dtype=np.uint8)
    scales_FG, offsets_FG = (np.empty((F, D // GROUP_SIZE), dtype=np.float32) for _ in range(2))
    step = max(1, _BLOCK_BYTES // (4 * D))
    for start in range(0, F, step):
        block = slice(start, start + step)
        groups_FGK = weight_FD[block].astype(np.float32).reshape(-1, D // GROUP_SIZE, GROUP_SIZE)
        low_FG, high_FG = groups_FGK.min(axis=2), groups_FGK.max(axis=2)
        scales_FG[block] = _bfloat16((high_FG - low_FG) / 15)
        offsets_FG[block] = _bfloat16(low_FG + 8 * scales_FG[block])
        # A group of equal numbers is all offset.
        divisor_FG = np.where(scales_FG[block] > 0, scales_FG[block], 1)
        steps_FGK = np.rint((groups_FGK - offsets_FG[block][:, :, None]) / divisor_FG[:, :, None])
        codes_FD[block] = (np.clip(steps_FGK, -8, 7) + 8).reshape(-1, D)
    return codes_FD, scales_FG, offsets_FG


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def dequantize_rows(codes_FD: npt.NDArray[np.int8], scales_F: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The matrix that `quantize_rows` stands for."""
    return codes_FD * scales_F[:, None]


def dequantize_groups(
    codes_FD: npt.NDArray[np.uint8], scales_FG: npt.NDArray[np.float32], offsets_FG: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The matrix that `quantize_groups` stands for."""
    steps_FGK = codes_FD.reshape(len(codes_FD), -1, GROUP_SIZE).astype(np.float32) - 8
    return (steps_FGK * scales_FG[:, :, None] + offsets_FG[:, :, None]).reshape(codes_FD.shape)


def int8_product(
    inputs_MD: npt.NDArray[Any], codes_FD: npt.NDArray[np.int8], scales_F: npt.NDArray[np.float32]
) -> npt.NDArray[Any]:
    """The product of "int8-dynamic": inputs (M, D) with the transpose of a matrix, (M, F).

    A row's result depends on that row alone.
    """
    large_MD, large_steps_M = round_rows(np.where(np.abs(inputs_MD) > OUTLIER, inputs_MD, 0))
    small_MD, small_steps_M = round_rows(inputs_MD - large_MD * large_steps_M)
    codes_DF = codes_FD.T.astype(np.int64)
    return ((large_MD @ codes_DF) * large_steps_M + (small_MD @ codes_DF) * small_steps_M) * scales_F


def round_rows(inputs_MD: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Integers from -127 to 127 and the step of each row, (M, 1): `inputs ≈ integers * steps`."""
    peaks_M = np.abs(inputs_MD).max(axis=1, keepdims=True)
    steps_M = np.where(peaks_M > 0, peaks_M, 1) / INT8_LIMIT
    return np.rint(inputs_MD / steps_M).astype(np.int64), steps_M
