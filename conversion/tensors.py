"""What every file format shares: the description of a tensor, the reader's interface, mapped files, pieces of arrays.

A format module knows only *its bytes <-> (native name, native array)*. Each exports the same three names:

    SCHEME                                     whose leaf names and layouts the files that it writes have
    open_reader(path) -> Reader                validates the whole structure; reads no tensor
    write(path, tensors, read) -> None         pulls one array at a time, in the order given
    stored_bytes(dtype, shape) -> int          what one tensor takes in a file of this format
"""

import collections
import dataclasses
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from conversion.identity import changed_meanwhile
from opt_common.errors import CheckpointError
from opt_common.params import Scheme

PIECE_BYTES = 2 << 20
"""Bytes that are read and converted at a time: small beside a tensor, large beside a system call."""

_WRITE_BYTES = 1 << 20
"""Bytes that are written at a time. Linux looks for memory in one piece for them: 8 MB took ten times as long."""

_WORKERS = 2
"""Threads that read, transpose and convert pieces while the caller writes one: the GIL is let go of meanwhile."""

_TILE = 256
"""Rows and columns that are transposed at a time: they and their copy fit in a core's own cache."""

_LINE_BYTES = 64
"""Bytes of a cache line."""

_MAX_DIMENSIONS = 8
_FILL_BYTES = 1 << 18
_READ_BYTES = 1 << 30
"""Bytes to ask the system for at a time; it gives no more than two gigabytes."""

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


class MappedFile(mmap.mmap):
    """A file mapped into memory, read-only, whose bytes can also be copied out without touching the map.

    Who touches a map that has become longer than its file is killed by the system, and touched pages count as memory
    of the process, with up to two megabytes around each. Readers therefore get copies by `buffer[start:end]`, and a
    conversion takes their arrays for what they say of places in the file, and copies the bytes out with `fetch`.
    """

    _path: Path
    _descriptor: int
    _address: int
    _private: mmap.mmap | None = None

    @classmethod
    def of(cls, path: Path, descriptor: int) -> "MappedFile":
        """The map of an open file; the descriptor stays that of the caller."""
        mapped = cls(descriptor, 0, access=mmap.ACCESS_READ)
        mapped._path = path
        mapped._descriptor = os.dup(descriptor)
        weakref.finalize(mapped, os.close, mapped._descriptor)
        mapped._address = np.frombuffer(mapped, np.uint8, 1).ctypes.data
        return mapped

    def __getitem__(self, key: Any) -> Any:
        """A byte or bytes, copied out.

        Raises:
            CheckpointError: if the file has become too short for them.
        """
        if not hasattr(os, "pread"):  # Windows
            return super().__getitem__(key)  # pyright: ignore[reportUnknownVariableType]
        if isinstance(key, int):
            return self[key : key + 1][0]
        start, stop, step = cast("slice", key).indices(len(self))
        assert step == 1
        size = max(0, stop - start)
        data = os.pread(self._descriptor, size, start)
        if len(data) < size:
            raise CheckpointError(changed_meanwhile([self._path]))
        return data

    def writable(self, array: Array) -> Array:
        """A contiguous array of this file, to be written to: what is written is the process's own, never the file's."""
        if self._private is None:
            self._private = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        offset = array.ctypes.data - self._address
        return np.frombuffer(self._private, array.dtype, array.size, offset).reshape(array.shape)

    def copy_out(self, address: int, size: int) -> Array:
        """The bytes that are mapped at an address.

        Raises:
            CheckpointError: if the file has become too short for them.
        """
        result = np.empty(size, np.uint8)
        offset, done = address - self._address, 0
        if not hasattr(os, "preadv"):  # Windows, where a mapped file can't be cut either
            result[:] = np.frombuffer(self, np.uint8, size, offset)
            return result
        while done < size:
            count = os.preadv(self._descriptor, [result[done : done + _READ_BYTES].data], offset + done)
            if count == 0:
                raise CheckpointError(changed_meanwhile([self._path]))
            done += count
        return result


def map_file(path: Path) -> MappedFile:
    """Map a file into memory, read-only.

    Raises:
        CheckpointError: if it is absent, not a regular file, or empty.
    """
    # Before it is opened: opening a pipe would wait for its writer.
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a regular file. Name a weight file.")
    try:
        with path.open("rb") as file:
            return MappedFile.of(path, file.fileno())
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
    return array if array.flags.aligned else frozen(fetch(array))


def frozen(array: Array) -> Array:
    """The array, which nobody can write to from now on."""
    if array.flags.writeable:
        array.flags.writeable = False
    return array


def fetch(array: Array) -> Array:
    """A copy in memory of an array that lies in a mapped file, of the same strides; any other array itself.

    It takes as many bytes as lie in the file from the array's first byte to its last.

    Raises:
        CheckpointError: if the file has become too short.
    """
    home = _home(array)
    if home is None or array.size == 0:
        return array
    reach = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    before, after = sum(step for step in reach if step < 0), sum(step for step in reach if step > 0)
    data = home.copy_out(array.ctypes.data + before, after - before + array.itemsize)
    return np.ndarray(array.shape, array.dtype, data.data, -before, array.strides)


def borrowed(array: Array) -> Array:
    """The array of a mapped file where it lies, but writable, as `MappedFile.writable` says; of others, a copy.

    The file may be replaced as long as the array is in use, but not be cut short.
    """
    home = _home(array)
    if home is None or array.size == 0 or not array.flags.c_contiguous:
        return fetch(array)
    return home.writable(array)


class FileRows:
    """The rows of an array that lies in a mapped file; they are fetched when they are asked for."""

    def __init__(self, array: Array) -> None:
        # The rows of a transpose lie all over the file.
        self._array = array if array.flags.c_contiguous else fetch(array)
        self.shape = array.shape

    def __getitem__(self, rows: slice) -> Array:
        return fetch(self._array[rows])


def _home(array: Array) -> MappedFile | None:
    """The mapped file in which an array lies."""
    place: Any = array
    while place is not None and not isinstance(place, MappedFile):
        place = place.obj if isinstance(place, memoryview) else getattr(place, "base", None)
    return place


def joined(arrays: Sequence[Array], dtype: np.dtype[Any]) -> Array:
    """Flat arrays one after the other in a new one; mapped files are read piece by piece."""
    whole = np.empty(sum(array.size for array in arrays), dtype)
    start = 0
    for array in arrays:
        fill(whole[start : start + array.size], array)
        start += array.size
    return whole


def fill(target: Array, source: Array) -> None:
    """Copy an array into another of the same shape; a mapped file is read piece by piece."""
    if not source.ndim or not source.flags.c_contiguous:
        target[...] = fetch(source)
        return
    step = max(1, _FILL_BYTES // max(1, source[:1].nbytes))
    for start in range(0, len(source), step):
        target[start : start + step] = fetch(source[start : start + step])


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
    for piece in _large_pieces(array, dtype, name):
        flat = piece.reshape(-1)
        step = max(1, _WRITE_BYTES // dtype.itemsize)
        for start in range(0, flat.size, step):
            yield flat[start : start + step]


def _large_pieces(array: Array, dtype: np.dtype[Any], name: str) -> Iterator[Array]:
    """The same in the pieces that are read and transposed at a time."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        step = max(1, PIECE_BYTES // max(1, array.dtype.itemsize))
        starts = range(0, flat.size, step)
        yield from _in_order(lambda start: to_dtype(fetch(flat[start : start + step]), dtype, name), starts)
        return
    array = fetch(array)
    row_bytes = max(1, array[:1].size * array.dtype.itemsize)
    # A stripe narrower than a tile would fetch each cache line of the source more than once.
    step = max(_TILE, PIECE_BYTES // row_bytes)
    starts = range(0, len(array), step)
    yield from _in_order(lambda start: to_dtype(contiguous(array[start : start + step]), dtype, name), starts)


def _in_order(make: Callable[[int], Array], starts: range) -> Iterator[Array]:
    """What `make` gives for each start, in order; the next ones are made while the caller is busy with one."""
    if len(starts) < 2:
        yield from map(make, starts)
        return
    with ThreadPoolExecutor(_WORKERS) as pool:
        waiting: collections.deque[Future[Array]] = collections.deque()
        for start in starts:
            waiting.append(pool.submit(make, start))
            if len(waiting) > _WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def contiguous(array: Array) -> Array:
    """A C-contiguous copy, transposed tile by tile so that neither side is walked against its grain."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    rows, columns = array.shape
    # Rows of a model's matrices are a power of two apart, or nearly: a cache would keep few of a tile's rows at once.
    # In a copy whose rows are a cache line further apart it keeps all of them.
    copied = np.empty((_TILE, _TILE + _LINE_BYTES // array.itemsize), array.dtype)
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            tile = array[row : row + _TILE, column : column + _TILE]
            near = copied[: tile.shape[1], : tile.shape[0]]
            near[...] = tile.T
            result[row : row + _TILE, column : column + _TILE] = near.T
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
