"""What every file format shares: the description of a tensor, the reader's interface, mapped files, pieces of arrays.

A format module knows only *its bytes <-> (native name, native array)*. Each exports the same three names:

    SCHEME                                     whose leaf names and layouts the files that it writes have
    open_reader(path) -> Reader                validates the whole structure; reads no tensor
    write(path, tensors, read) -> None         pulls one array at a time, in the order given
    stored_bytes(dtype, shape) -> int          what one tensor takes in a file of this format
"""

import dataclasses
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from opt_common.errors import CheckpointError
from opt_common.params import Scheme

PIECE_BYTES = 8 << 20
"""Bytes that a writer converts and writes at a time: small beside a tensor, large beside a system call."""

_TILE = 128
_MAX_DIMENSIONS = 8

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of one tensor, known without reading it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor that a writer is to write.

    Attributes:
        name: native name.
        info: its dtype in the file, and its native shape.
        shares: native name of an earlier tensor whose bytes this one is, or None. Only PyTorch's files can say that.
    """

    name: str
    info: TensorInfo
    shares: str | None = None


ReadNative = Callable[[str], Array]
"""Gives the array of a native name, in the native layout, as a view of any strides; any floating dtype."""


class Reader(Protocol):
    """One open weight file.

    Attributes:
        scheme: whose names and layouts the tensors have.
        tensors: every tensor of the file by native name, in the order of the file.
    """

    scheme: Scheme
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> Array:
        """The array of a native name: native layout, read-only, a view of the mapped file where possible."""
        ...

    def close(self) -> None:
        """Let go of the file. Arrays that were read stay valid."""
        ...


class Writer(Protocol):
    """The `write` of a format module."""

    def __call__(self, path: Path, tensors: Sequence[TensorSpec], read: ReadNative) -> None:
        """Write a new file at `path`."""
        ...


def damaged(path: Path, problem: str) -> CheckpointError:
    """The error for a file that is not what its name says."""
    return CheckpointError(f"{path}: {problem}. The file is damaged or not what its name says; fetch it again.")


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, read-only.

    Raises:
        CheckpointError: if it is absent, not a regular file, or empty.
    """
    # Before it is opened: opening a pipe would wait for its writer.
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a regular file. Name a weight file.")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}. Check the path and its permissions.") from None
    except ValueError:
        raise CheckpointError(f"{path} is empty. Fetch the file again.") from None


def view(buffer: mmap.mmap | memoryview, offset: int, info: TensorInfo) -> Array:
    """The array at an offset of a mapped file. The caller has checked that it lies inside."""
    if info.size == 0:
        return frozen(np.empty(info.shape, info.dtype))
    array = np.frombuffer(buffer, info.dtype, info.size, offset).reshape(info.shape)
    # Formats with a header of any length can put numbers at odd addresses, which frameworks do not take.
    return array if array.flags.aligned else frozen(array.copy())


def frozen(array: Array) -> Array:
    """The array, which nobody can write to from now on."""
    if array.flags.writeable:
        array.flags.writeable = False
    return array


def is_shape(value: object) -> bool:
    """Whether a value out of a file is a list or tuple of lengths that an array can have."""
    # NumPy multiplies the other axes even where one of length zero leaves no elements.
    return are_lengths(value) and math.prod(max(1, length) for length in cast("list[int]", value)) < 1 << 60


def are_lengths(value: object) -> bool:
    """Whether a value out of a file is a short list or tuple of lengths, offsets or strides."""
    if not isinstance(value, list | tuple):
        return False
    lengths = cast("list[object] | tuple[object, ...]", value)
    return len(lengths) <= _MAX_DIMENSIONS and all(map(is_length, lengths))


def is_length(value: object) -> bool:
    """Whether a value out of a file is an integer that a length, an offset or a count can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def pieces(array: Array, dtype: np.dtype[Any], name: str) -> Iterator[Array]:
    """The elements of an array in C order and in `dtype`, as a sequence of short contiguous arrays.

    Args:
        array: any strides; typically a mapped file or its transpose.
        dtype: type of the pieces.
        name: what an error calls the array.

    Raises:
        CheckpointError: if a finite number is too large for `dtype`.
    """
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        step = max(1, PIECE_BYTES // max(1, array.dtype.itemsize))
        for start in range(0, flat.size, step):
            yield to_dtype(flat[start : start + step], dtype, name)
        return
    row_bytes = max(1, array[:1].size * array.dtype.itemsize)
    # A stripe narrower than a tile would fetch each cache line of the source more than once.
    step = max(_TILE, PIECE_BYTES // row_bytes)
    for start in range(0, len(array), step):
        yield to_dtype(contiguous(array[start : start + step]), dtype, name)


def contiguous(array: Array) -> Array:
    """A C-contiguous copy, transposed tile by tile so that neither side is walked against its grain."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    rows, columns = array.shape
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            result[tile] = array[tile]
    return result


def to_dtype(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    """`array` in another floating dtype; the array itself where it already has it.

    Raises:
        CheckpointError: if a finite number is too large for `dtype`.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(result)
    if lost.any():
        largest = float(np.abs(array[lost].astype(np.float64)).max())
        raise CheckpointError(
            f"{name}: {largest:g} is too large for {dtype.name}. Choose a dtype with a wider range, such as bfloat16."
        )
    return result
