"""THE dtype table: what each file format calls the number types that a checkpoint may hold.

The canonical name of a type is also its name in Flax's files and the name of PyTorch's attribute (`torch.float16`).
"""

import dataclasses

import ml_dtypes
import numpy as np

from opt_common.errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DType:
    """One number type.

    Attributes:
        name: canonical name, "float16".
        numpy: NumPy's type; bfloat16 comes from `ml_dtypes`.
        safetensors: its tag in a safetensors header.
        torch_storage: the class that a pickled PyTorch storage of it names; None where PyTorch never had one.
        floating: whether it holds floating-point numbers, as every parameter of a model does.
    """

    name: str
    numpy: np.dtype
    safetensors: str
    torch_storage: str | None
    floating: bool


def _row(name: str, numpy: type, safetensors: str, torch_storage: str | None, *, floating: bool = False) -> DType:
    return DType(
        name=name, numpy=np.dtype(numpy), safetensors=safetensors, torch_storage=torch_storage, floating=floating
    )


DTYPES = (
    _row("float64", np.float64, "F64", "DoubleStorage", floating=True),
    _row("float32", np.float32, "F32", "FloatStorage", floating=True),
    _row("float16", np.float16, "F16", "HalfStorage", floating=True),
    _row("bfloat16", ml_dtypes.bfloat16, "BF16", "BFloat16Storage", floating=True),
    _row("int64", np.int64, "I64", "LongStorage"),
    _row("int32", np.int32, "I32", "IntStorage"),
    _row("int16", np.int16, "I16", "ShortStorage"),
    _row("int8", np.int8, "I8", "CharStorage"),
    _row("uint64", np.uint64, "U64", None),
    _row("uint32", np.uint32, "U32", None),
    _row("uint16", np.uint16, "U16", None),
    _row("uint8", np.uint8, "U8", "ByteStorage"),
    _row("bool", np.bool_, "BOOL", "BoolStorage"),
)
"""Every type that a file may hold. Integers turn up in buffers; a parameter is always floating."""

BY_NAME = {row.name: row for row in DTYPES}
BY_NUMPY = {row.numpy: row for row in DTYPES}
BY_SAFETENSORS = {row.safetensors: row for row in DTYPES}
BY_TORCH_STORAGE = {row.torch_storage: row for row in DTYPES if row.torch_storage is not None}

FLOATING = tuple(row.name for row in DTYPES if row.floating)
"""Names of the types that a model's parameters may have."""

_SHORT_NAMES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def parse_dtype(name: str) -> DType:
    """The floating-point type that a user names: "float16", "torch.float16" or "fp16".

    Raises:
        CheckpointError: for any other name.
    """
    plain = name.strip().lower().removeprefix("torch.")
    row = BY_NAME.get(_SHORT_NAMES.get(plain, plain))
    if row is None or not row.floating:
        raise CheckpointError(f"dtype is {name!r}, expected one of {', '.join(FLOATING)}.")
    return row


def dtype_name(dtype: np.dtype) -> str:
    """Canonical name of a NumPy type of the table.

    Raises:
        CheckpointError: for a type that is not in it.
    """
    row = BY_NUMPY.get(dtype)
    if row is None:
        raise CheckpointError(f"dtype is {dtype}, expected one of {', '.join(BY_NAME)}.")
    return row.name
