"""Flax's `flax_model.msgpack`: a nested map whose leaves are arrays, as `flax.serialization` packs them.

The reader walks the bytes of the mapped file and notes where each array lies, without unpacking anything; the writer
gives the bytes that `flax.serialization.to_bytes` gives for the same tree, one array at a time.

An array is an extension of code 1 that holds [shape, name of the dtype, bytes]; one of more than 2**30 bytes is cut
into chunks, a map of "__msgpack_chunked_array__", "shape" and "chunks".
"""

import dataclasses
import itertools
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from conversion.dtypes import BY_NAME, BY_NUMPY
from conversion.tensors import (
    Array,
    ReadNative,
    TensorInfo,
    TensorSpec,
    damaged,
    frozen,
    is_shape,
    joined,
    map_file,
    pieces,
    view,
)
from opt_common.params import Scheme

SCHEME: Scheme = "nnx"

MAX_CHUNK_BYTES = 1 << 30
"""Flax cuts arrays of more bytes than this into chunks of this size."""

_T = TypeVar("_T")

_CHUNKED = "__msgpack_chunked_array__"
_ARRAY_CODES = (1, 3)  # an array; a NumPy scalar, packed as an array without axes
_MAX_DEPTH = 32
_MAX_KEYS = 50_000  # the largest OPT has three thousand
_LONGEST_NAME = 500  # of all keys on the way to an array: each array has them in its name

# Arrays saved with a NumPy that did not know bfloat16 name it by its size.
_OLD_NAMES = {"V2": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array of the file: its description, and the offset and bytes of each of its chunks."""

    info: TensorInfo
    chunks: tuple[tuple[int, int], ...]


class MsgpackReader:
    """An open msgpack file."""

    def __init__(self, path: Path) -> None:
        self._buffer = map_file(path)
        self.scheme: Scheme = SCHEME
        try:
            self._stored = dict(_Scanner(self._buffer).arrays())
        except _DamagedError as error:
            raise damaged(path, str(error)) from None
        self.tensors: Mapping[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}

    def read(self, name: str) -> Array:
        stored = self._stored[name]
        if len(stored.chunks) == 1:
            return view(self._buffer, stored.chunks[0][0], stored.info)
        itemsize = stored.info.dtype.itemsize
        parts = [
            view(self._buffer, start, TensorInfo(stored.info.dtype, (size // itemsize,)))
            for start, size in stored.chunks
        ]
        return frozen(joined(parts, stored.info.dtype).reshape(stored.info.shape))

    def close(self) -> None:
        # The map itself goes when the last array that looks into it does.
        del self._buffer


def open_reader(path: Path) -> MsgpackReader:
    """Open a file, find its arrays and validate them against the size of the file.

    Raises:
        CheckpointError: for anything but a nested map of arrays.
    """
    return MsgpackReader(path)


def stored_bytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes in a file."""
    return info.nbytes


def write(path: Path, tensors: Sequence[TensorSpec], read: ReadNative) -> None:
    """Write a nested map, one array at a time: the bytes that `flax.serialization.to_bytes` would give.

    Args:
        path: the new file.
        tensors: what to write; "/" parts the levels of a name.
        read: gives the array of a name; it is called once for each, in the order of the tree.
    """
    tree: dict[str, Any] = {}
    for tensor in tensors:
        *parents, leaf = tensor.name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = tensor
    with path.open("xb") as file:
        _write_tree(file, tree, read)


# Reading


class _DamagedError(Exception):
    """Bytes that are not what `flax.serialization` writes; the text says what is wrong with them."""


class _Scanner:
    """A position in the mapped file. Every length is checked against the end before anything is taken."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self._position = 0
        self._end = len(buffer)
        self._count = 0

    def arrays(self) -> Iterator[tuple[str, _Stored]]:
        """Every array by its "/"-joined path, in the order of the file."""
        yield from self._map(())
        if self._position != self._end:
            raise _DamagedError(f"{self._end - self._position} bytes follow the last array")

    def _map(self, path: tuple[str, ...]) -> Iterator[tuple[str, _Stored]]:
        if len(path) > _MAX_DEPTH:
            raise _DamagedError(f"maps are nested more than {_MAX_DEPTH} deep")
        seen: set[str] = set()
        for _ in range(self._map_length()):
            key = self._key(seen)
            if not path and not seen and key == _CHUNKED:
                raise _DamagedError("the file is a single array")
            self._count_key()
            if sum(map(len, path)) + len(key) > _LONGEST_NAME:
                raise _DamagedError(f"the name of an array has more than {_LONGEST_NAME} characters")
            kind = self._peek()
            if not _is_map(kind):
                yield "/".join((*path, key)), self._array()
            elif (chunked := self._chunked()) is not None:
                yield "/".join((*path, key)), chunked
            else:
                yield from self._map((*path, key))

    def _count_key(self) -> None:
        self._count += 1
        if self._count > _MAX_KEYS:
            raise _DamagedError(f"it has more than {_MAX_KEYS} keys, far more than any OPT model")

    def _key(self, seen: set[str]) -> str:
        key = self._text()
        if "/" in key or not key or key in seen:
            raise _DamagedError(f"the key {key!r:.80} is empty, holds a slash, or occurs twice in a map")
        seen.add(key)
        return key

    def _array(self) -> _Stored:
        """An extension of code 1 or 3."""
        end = self._extension_end()
        if self._byte() != _SHORT_LIST | 3:
            raise _DamagedError("an array is not packed as [shape, dtype, bytes]")
        shape = self._integers()
        name = self._text()
        row = BY_NAME.get(_OLD_NAMES.get(name, name))
        if row is None:
            raise _DamagedError(f"an array has dtype {name!r:.40}, expected one of {', '.join(BY_NAME)}")
        size = self._bytes_length()
        start = self._position
        info = TensorInfo(row.numpy, tuple(shape))
        if start + size != end or not is_shape(shape) or info.nbytes != size:
            raise _DamagedError(f"an array of shape {shape!r:.80} and dtype {name} is said to take {size} bytes")
        self._position = end
        return _Stored(info, ((start, size),))

    def _extension_end(self) -> int:
        """Read the head of an array's extension; the end of its payload, which lies inside the file."""
        kind = self._byte()
        if kind in _FIXED_EXTENSIONS:
            size = _FIXED_EXTENSIONS[kind]
        elif kind in _EXTENSION_LENGTHS:
            size = self._unsigned(_EXTENSION_LENGTHS[kind])
        else:
            raise _DamagedError(f"a value of msgpack type 0x{kind:02x} stands where an array is expected")
        code = self._byte()
        if code not in _ARRAY_CODES:
            raise _DamagedError(f"an extension has code {code}, which is no array")
        if size > self._end - self._position:
            raise _DamagedError(f"an array claims {size} bytes of the {self._end - self._position} that are left")
        return self._position + size

    def _chunked(self) -> _Stored | None:
        """The array that the map here describes in chunks; None, with nothing taken, if it is another map."""
        start = self._position
        if self._map_length() != 3 or not self._is_text() or self._text() != _CHUNKED:
            self._position = start
            return None
        if self._take(1) != _TRUE or self._text() != "shape":
            raise _DamagedError("a chunked array has no shape")
        shape = self._numbered(self._integer)
        if self._text() != "chunks":
            raise _DamagedError("a chunked array has no chunks")
        chunks = self._numbered(self._array)
        dtypes = {chunk.info.dtype for chunk in chunks}
        if len(dtypes) != 1 or not is_shape(shape):
            raise _DamagedError("the chunks of an array are absent or differ in dtype")
        info = TensorInfo(dtypes.pop(), tuple(shape))
        if info.size != sum(chunk.info.size for chunk in chunks):
            raise _DamagedError(f"the chunks of an array do not add up to its shape {shape}")
        return _Stored(info, tuple(itertools.chain.from_iterable(chunk.chunks for chunk in chunks)))

    def _numbered(self, read: Callable[[], _T]) -> list[_T]:
        """The values of a map with the keys "0", "1", …, which is how Flax packs a tuple."""
        values: list[_T] = []
        for index in range(self._map_length()):
            self._count_key()
            if self._text() != str(index):
                raise _DamagedError("the parts of a chunked array are not numbered in order")
            values.append(read())
        return values

    def _integers(self) -> list[int]:
        kind = self._byte()
        if kind & 0xF0 != _SHORT_LIST:  # arrays have few axes, so the short form is the only one
            raise _DamagedError("the shape of an array is no short list")
        return [self._integer() for _ in range(kind & 0x0F)]

    def _integer(self) -> int:
        kind = self._byte()
        if kind < 0x80:
            return kind
        if kind in _UNSIGNED_LENGTHS:
            return self._unsigned(_UNSIGNED_LENGTHS[kind])
        raise _DamagedError("a length is no unsigned integer")

    def _map_length(self) -> int:
        kind = self._byte()
        if not _is_map(kind):
            raise _DamagedError(f"a value of msgpack type 0x{kind:02x} stands where a map is expected")
        return kind & 0x0F if kind in _SHORT_MAPS else self._unsigned(_MAP_LENGTHS[kind])

    def _is_text(self) -> bool:
        kind = self._peek()
        return kind in _SHORT_TEXTS or kind in _TEXT_LENGTHS

    def _text(self) -> str:
        if not self._is_text():
            raise _DamagedError(f"a value of msgpack type 0x{self._peek():02x} stands where a text is expected")
        kind = self._byte()
        size = kind & 0x1F if kind in _SHORT_TEXTS else self._unsigned(_TEXT_LENGTHS[kind])
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            raise _DamagedError("a text is not UTF-8") from None

    def _bytes_length(self) -> int:
        kind = self._byte()
        if kind not in _BYTES_LENGTHS:
            raise _DamagedError("an array's data are no bytes")
        return self._unsigned(_BYTES_LENGTHS[kind])

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _peek(self) -> int:
        if self._position >= self._end:
            raise _DamagedError("it ends in the middle")
        return self._buffer[self._position]

    def _byte(self) -> int:
        value = self._peek()
        self._position += 1
        return value

    def _take(self, size: int) -> bytes:
        if size > self._end - self._position:
            raise _DamagedError("it ends in the middle")
        data = self._buffer[self._position : self._position + size]
        self._position += size
        return data


# First bytes of msgpack values: the short forms hold the length, the others say how many bytes of length follow.
_TRUE = b"\xc3"
_SHORT_LIST = 0x90
_SHORT_MAPS = range(0x80, 0x90)
_MAP_LENGTHS = {0xDE: 2, 0xDF: 4}
_SHORT_TEXTS = range(0xA0, 0xC0)
_TEXT_LENGTHS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BYTES_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_UNSIGNED_LENGTHS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_EXTENSION_LENGTHS = {0xC7: 1, 0xC8: 2, 0xC9: 4}


def _is_map(kind: int) -> bool:
    return kind in _SHORT_MAPS or kind in _MAP_LENGTHS


# Writing


def _write_tree(file: BinaryIO, tree: Mapping[str, Any], read: ReadNative) -> None:
    file.write(_map_head(len(tree)))
    for key, value in tree.items():
        file.write(_text(key))
        if isinstance(value, TensorSpec):
            _write_array(file, value, read)
        else:
            _write_tree(file, value, read)


def _write_array(file: BinaryIO, tensor: TensorSpec, read: ReadNative) -> None:
    info = tensor.info
    parts = pieces(read(tensor.name), info.dtype, tensor.name)
    if info.nbytes <= MAX_CHUNK_BYTES:
        _write_extension(file, info, parts)
        return
    lengths = b"".join(_text(str(axis)) + _integer(length) for axis, length in enumerate(info.shape))
    file.write(_map_head(3) + _text(_CHUNKED) + _TRUE)
    file.write(_text("shape") + _map_head(len(info.shape)) + lengths + _text("chunks"))
    elements = max(1, MAX_CHUNK_BYTES // info.dtype.itemsize)
    count = -(-info.size // elements)
    file.write(_map_head(count))
    rest = _Cutter(parts)
    for index in range(count):
        chunk = TensorInfo(info.dtype, (min(elements, info.size - index * elements),))
        file.write(_text(str(index)))
        _write_extension(file, chunk, rest.take(chunk.size))


class _Cutter:
    """A sequence of short arrays, taken a given number of elements at a time."""

    def __init__(self, parts: Iterator[Array]) -> None:
        self._parts = parts
        self._left: Array = np.empty(0)

    def take(self, size: int) -> Iterator[Array]:
        """The next `size` elements."""
        while size:
            if not self._left.size:
                self._left = next(self._parts).reshape(-1)
            part, self._left = self._left[:size], self._left[size:]
            size -= part.size
            yield part


def _write_extension(file: BinaryIO, info: TensorInfo, parts: Iterator[Array]) -> None:
    shape = bytes([_SHORT_LIST | len(info.shape)]) + b"".join(map(_integer, info.shape))
    head = bytes([_SHORT_LIST | 3]) + shape + _text(BY_NUMPY[info.dtype].name)
    head += _sized(_BYTES_LENGTHS, info.nbytes)
    file.write(_extension_head(_ARRAY_CODES[0], len(head) + info.nbytes) + head)
    for part in parts:
        file.write(part.view("u1").data)


def _sized(kinds: Mapping[int, int], size: int) -> bytes:
    """The shortest head, of the given kinds, that can hold a length (or a number)."""
    for kind, length in kinds.items():
        if size < 1 << 8 * length:
            return bytes([kind]) + size.to_bytes(length, "big")
    raise AssertionError(size)


def _map_head(length: int) -> bytes:
    return bytes([_SHORT_MAPS[length]]) if length < len(_SHORT_MAPS) else _sized(_MAP_LENGTHS, length)


def _text(text: str) -> bytes:
    data = text.encode()
    short = len(data) < len(_SHORT_TEXTS)
    return (bytes([_SHORT_TEXTS[len(data)]]) if short else _sized(_TEXT_LENGTHS, len(data))) + data


def _integer(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else _sized(_UNSIGNED_LENGTHS, number)


def _extension_head(code: int, size: int) -> bytes:
    """The head of msgpack's shortest form for an extension of so many bytes."""
    for kind, fixed in _FIXED_EXTENSIONS.items():
        if size == fixed:
            return bytes([kind, code])
    return _sized(_EXTENSION_LENGTHS, size) + bytes([code])
