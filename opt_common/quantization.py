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

A quantised checkpoint (`opt_common.hub.QUANTIZED`) holds, in place of each such matrix, its parts, named as the matrix
with a dot and the part's name behind it; `_PARTS` is their one definition. "int8-dynamic" and "int8" are stored alike.
Of 4-bit integers two share a byte: those of even columns are the low four bits.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError
from opt_common.params import Parameter, Scheme, head_of

INT8_LIMIT = 127
"""The largest 8-bit integer used; -128 is not, so that the sign costs nothing."""

GROUP_SIZE = 32
"""How many neighbours in a row share a scale and an offset in "int4"."""

OUTLIER = 6.0
"""Inputs of a larger magnitude have a scale of their own in "int8-dynamic"."""

STORAGES: Mapping[str, str] = {"int8-dynamic": "int8", "int8": "int8", "int4": "int4"}
"""Quantisation -> how its matrices are stored; the token table and the head always as "int8"."""

_PARTS: Mapping[str, tuple[tuple[str, type, Callable[[int, int], tuple[int, ...]]], ...]] = {
    "int8": (
        ("int8_codes", np.int8, lambda F, D: (F, D)),
        ("int8_scales", np.float32, lambda F, D: (F,)),
    ),
    "int4": (
        ("int4_codes", np.uint8, lambda F, D: (F, D // 2)),
        ("int4_scales", ml_dtypes.bfloat16, lambda F, D: (F, D // GROUP_SIZE)),
        ("int4_offsets", ml_dtypes.bfloat16, lambda F, D: (F, D // GROUP_SIZE)),
    ),
}
"""Storage -> name, type and shape of each tensor that a matrix (F, D) is stored as."""

_STORAGE_OF_PART = {name: storage for storage, parts in _PARTS.items() for name, _, _ in parts}

_BLOCK_BYTES = 1 << 20
# Rows are rounded in blocks that stay in a processor's cache.


class Rows(Protocol):
    """A matrix, of which a stretch of rows is asked for at a time: an array, or a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> npt.NDArray[Any]: ...


@dataclasses.dataclass(frozen=True)
class StoredPart(Parameter):
    """One of the tensors that a quantised matrix is stored as; `name` is the one in the file.

    Attributes:
        whole: the matrix.
        index: the part's place among the matrix's parts.
        dtype: its type.
    """

    whole: Parameter
    index: int
    dtype: np.dtype[Any]

    def path(self, scheme: Scheme) -> tuple[str, ...]:
        """The parts of the name; they are the matrix's own, and the part's."""
        return (*self.whole.path(scheme), self.name.rpartition(".")[2])


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


def choose_quantization(
    config: OPTConfig, requested: str | None, storage: str | None, available: Sequence[str]
) -> OPTConfig:
    """The configuration that a loaded model gets.

    Args:
        config: that of the checkpoint.
        requested: the quantisation that is asked for, or None for what the configuration says.
        storage: how the checkpoint's matrices are stored, a value of `STORAGES`; None for numbers, which any fits.
        available: what the backend has.

    Raises:
        CheckpointError: if the matrices are stored in other bits than those of the quantisation.
        ConfigError: for a quantisation that the backend does not have.
    """
    config = config if requested is None else config.replace(quantization=requested)
    if storage is None:
        check_quantization(config, available)
        return config
    if problem := storage_problem(config, storage):
        raise CheckpointError(problem)
    if config.quantization not in available:
        fitting = [name for name in available if STORAGES[name] == storage]
        advice = (
            f"Pass quantization={fitting[0]!r}, or set it in config.json: its weights are the same."
            if fitting
            else "Use PyTorch, or write its numbers first: opt-convert convert --dequantize."
        )
        raise ConfigError(f"The checkpoint is in {config.quantization!r}, which this framework does not have. {advice}")
    return config


def storage_problem(config: OPTConfig, storage: str) -> str | None:
    """Why a configuration does not fit matrices that are stored so, or None if it does."""
    if config.quantization is not None and STORAGES[config.quantization] == storage:
        return None
    fitting = " or ".join(repr(name) for name, stored in STORAGES.items() if stored == storage)
    return (
        f"The weights are stored in {storage}, but quantization is {config.quantization!r}, expected {fitting}. "
        f"Pass that, or load the checkpoint that they were rounded from."
    )


def is_quantized(parameter: Parameter) -> bool:
    """Whether a row of the parameter table is stored in fewer bits."""
    return _is_table(parameter) or (parameter.kind == "linear.weight" and head_of(parameter.name) in (None, "lm"))


def never_quantized(table: Sequence[Parameter]) -> Parameter:
    """A row of a parameter table that every model has, and none rounds: its dtype is the model's."""
    return next(parameter for parameter in table if not is_quantized(parameter))


def _is_table(parameter: Parameter) -> bool:
    return parameter.name == "model.decoder.embed_tokens.weight"


# How quantised matrices are stored


def storage_of(parameter: Parameter, storage: str) -> str | None:
    """How a checkpoint of a storage holds a row of the parameter table; None for as numbers."""
    if not is_quantized(parameter):
        return None
    return "int8" if _is_table(parameter) or head_of(parameter.name) == "lm" else storage


def stored_table(table: Sequence[Parameter], storage: str) -> tuple[Parameter, ...]:
    """A parameter table with the parts of quantised matrices in their place: what a checkpoint of a storage holds."""
    rows: list[Parameter] = []
    for parameter in table:
        own = storage_of(parameter, storage)
        rows += [parameter] if own is None else stored_parts(parameter, own)
    return tuple(rows)


def stored_parts(parameter: Parameter, storage: str) -> tuple[StoredPart, ...]:
    """The tensors that a matrix is stored as, in the order in which `dequantize` and the backends' layers take them."""
    F, D = parameter.shape
    return tuple(
        StoredPart(
            name=f"{parameter.name}.{part}",
            kind=parameter.kind,
            axes=parameter.axes[: len(shape_of(F, D))],
            shape=shape_of(F, D),
            whole=parameter,
            index=index,
            dtype=np.dtype(dtype),
        )
        for index, (part, dtype, shape_of) in enumerate(_PARTS[storage])
    )


def split_part(name: str) -> tuple[str, str | None]:
    """The name of a matrix and of its part, from the name of a stored tensor; another tensor's name and None."""
    whole, _, part = name.rpartition(".")
    return (whole, part) if part in _STORAGE_OF_PART else (name, None)


def recognise_parts(
    name: str, found: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
    """What a file's parts of a matrix are.

    Args:
        name: the matrix.
        found: dtype and shape of each part that the file holds, by the part's name.

    Returns:
        The storage, the shape of the matrix, and the names of its parts in order.

    Raises:
        CheckpointError: for an absent part, and for dtypes or shapes that do not go together.
    """
    storages = {_STORAGE_OF_PART[part] for part in found}
    if len(storages) > 1:
        raise CheckpointError(f"{name} is stored both in int8 and in int4. Fetch the checkpoint again.")
    storage = storages.pop()
    parts = _PARTS[storage]
    if missing := [part for part, _, _ in parts if part not in found]:
        raise CheckpointError(f"{name} has no {' and no '.join(missing)}. Fetch the checkpoint again.")
    _, codes_shape = found[parts[0][0]]
    shape = codes_shape if storage == "int8" or len(codes_shape) != 2 else (codes_shape[0], 2 * codes_shape[1])
    fits = len(shape) == 2 and min(shape) > 0 and (storage == "int8" or shape[1] % GROUP_SIZE == 0)
    for part, dtype, shape_of in parts:
        has_dtype, has_shape = found[part]
        if not fits or has_dtype != dtype or has_shape != shape_of(*shape):
            wanted = (
                f"{np.dtype(dtype).name} {list(shape_of(*shape))}" if fits else f"{np.dtype(dtype).name} of a matrix"
            )
            raise CheckpointError(
                f"{name}.{part} is {has_dtype.name} {list(has_shape)}, expected {wanted}. Fetch the checkpoint again."
            )
    return storage, shape, tuple(part for part, _, _ in parts)


def check_parts(name: str, parts: Sequence[npt.NDArray[Any]]) -> None:
    """Make sure that the scales and offsets of a matrix out of a file are numbers.

    Raises:
        CheckpointError: if one of them is none.
    """
    if not all(np.isfinite(part).all() for part in parts[1:]):
        raise CheckpointError(f"{name} has scales or offsets that are not finite. Fetch the checkpoint again.")


def dequantize(parts: Sequence[Rows], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The matrix that stored parts stand for, of a shape."""
    weight_FD = np.empty(shape, dtype=np.float32)
    step = max(1, _BLOCK_BYTES // weight_FD[:1].nbytes)
    for start in range(0, len(weight_FD), step):
        codes, *others = (part[start : start + step] for part in parts)
        if len(parts) == len(_PARTS["int8"]):
            weight_FD[start : start + step] = dequantize_rows(codes, others[0])
        else:
            scales_FG, offsets_FG = (part.astype(np.float32) for part in others)
            weight_FD[start : start + step] = dequantize_groups(unpack(codes), scales_FG, offsets_FG)
    return weight_FD


def pack(codes_FD: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """4-bit integers (F, D), two to a byte, (F, D / 2)."""
    return np.bitwise_or(codes_FD[:, ::2], codes_FD[:, 1::2] << 4, dtype=np.uint8)


def unpack(codes_FX: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The 4-bit integers (F, D) in bytes (F, D / 2)."""
    F, X = codes_FX.shape
    codes_FD = np.empty((F, 2 * X), dtype=np.uint8)
    codes_FD[:, ::2], codes_FD[:, 1::2] = codes_FX & 15, codes_FX >> 4
    return codes_FD


# Rounding


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
