"""The part of the HDF5 file format that Keras's weight files are made of, read from a mapped file.

Our own parser, because the HDF5 library is not made for untrusted files: a few changed bytes make it loop for ever in
C. It knows the original layout (superblock 0 and 1, object headers 1, groups as symbol tables), which h5py writes
unless it is told otherwise, and refuses everything else; see the "HDF5 File Format Specification" of the HDF Group,
sections II to IV. Every address is checked against the file, and the number of structures that are read is bounded.
"""

import dataclasses
import functools
import mmap
import struct
from collections.abc import Iterator, Mapping
from typing import cast

from conversion.dtypes import BY_NAME, DType
from conversion.tensors import TensorInfo, is_shape

Attribute = str | list[str] | None
"""A text, a list of texts, or None for anything else, such as a text that is too long for a name."""

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = (1 << 64) - 1
_MAX_STRUCTURES = 500_000  # the largest OPT takes a third of this
_MAX_HEAP_OBJECTS = 100_000
_LONGEST_NAME = 500
_MAX_TREE_LEVEL = 8

# Types of the messages in an object header.
_DATASPACE, _DATATYPE, _EXTERNAL, _LAYOUT, _FILTERS, _ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = (
    0x01, 0x03, 0x07, 0x08, 0x0B, 0x0C, 0x10, 0x11,
)  # fmt: skip
_LINK_INFO, _LINK, _ATTRIBUTE_INFO = 0x02, 0x06, 0x15

_CONTIGUOUS = 1
_FIXED_TEXT, _OPAQUE, _VARIABLE = 3, 5, 9
_SOFT_LINK = 2


class DamagedError(Exception):
    """Bytes that are not the HDF5 which Keras writes; the text says what is wrong with them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One message of an object header: its type, and where its data lie."""

    kind: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where the numbers of a dataset lie."""

    dtype: DType
    shape: tuple[int, ...]
    start: int


class File:
    """A mapped HDF5 file."""

    def __init__(self, buffer: mmap.mmap | memoryview) -> None:
        self._buffer = buffer
        self._left = _MAX_STRUCTURES
        self._heaps: dict[int, dict[int, tuple[int, int]]] = {}
        self._heap_objects_left = _MAX_HEAP_OBJECTS
        self._texts: dict[tuple[int, int], str | None] = {}
        self._objects: dict[int, Object] = {}
        version = self.take(0, 9)[8] if self.take(0, 8) == _SIGNATURE else None
        if version is None:
            raise DamagedError("it does not begin as an HDF5 file")
        if version not in (0, 1) or self.take(13, 2) != b"\x08\x08":
            raise DamagedError("it is HDF5 of a later layout; `h5repack --low=0 --high=1` writes the one of Keras")
        base = 24 if version == 0 else 28
        if self.unsigned(base) != 0:
            raise DamagedError("it begins with a user block")
        if (end := self.unsigned(base + 16)) > len(buffer):
            raise DamagedError(f"it should have {end} bytes but has {len(buffer)}")
        self.root = self.object(self.unsigned(base + 32 + 8))

    def object(self, address: int) -> "Object":
        """The group or dataset at an address, read once."""
        if address not in self._objects:
            self._objects[address] = Object(self, address)
        return self._objects[address]

    def take(self, start: int, size: int) -> bytes:
        """Some bytes of the file, all of which must be there."""
        self._left -= 1
        if self._left < 0:
            raise DamagedError("it has more structures than any OPT model needs")
        if start > len(self._buffer) - size or size < 0:
            raise DamagedError(f"a structure at byte {start} does not lie in the file of {len(self._buffer)}")
        return bytes(self._buffer[start : start + size])

    def unsigned(self, start: int, size: int = 8) -> int:
        """A number of the file."""
        return int.from_bytes(self.take(start, size), "little")

    def signed_by(self, start: int, signature: bytes) -> None:
        """Make sure that a structure is of the kind that its place says."""
        if self.take(start, len(signature)) != signature:
            raise DamagedError(f"no {signature.decode()} at byte {start}")

    def heap_text(self, address: int, index: int) -> str | None:
        """A text of variable length, from a global heap; None if it is too long for a name."""
        # Once for all: any number of attributes can name the same long text.
        if (address, index) not in self._texts:
            self._texts[address, index] = self._read_heap_text(address, index)
        return self._texts[address, index]

    def _read_heap_text(self, address: int, index: int) -> str | None:
        if address not in self._heaps:
            self._heaps[address] = dict(self._heap_objects(address))
        if index not in self._heaps[address]:
            raise DamagedError(f"the heap at byte {address} has no object {index}")
        start, size = self._heaps[address][index]
        return text(self.take(start, size)) if size <= _LONGEST_NAME else None

    def _heap_objects(self, address: int) -> Iterator[tuple[int, tuple[int, int]]]:
        self.signed_by(address, b"GCOL\x01")
        end = address + self.unsigned(address + 8)
        position = address + 16
        while position + 16 <= end:
            index, _, _, size = struct.unpack("<HHIQ", self.take(position, 16))
            if index == 0:  # the free space at the end
                return
            self._heap_objects_left -= 1
            if self._heap_objects_left < 0:
                raise DamagedError("it has more texts than any OPT model needs")
            yield index, (position + 16, size)
            position += 16 + _padded(size)


class Object:
    """A group or a dataset."""

    def __init__(self, file: File, address: int) -> None:
        self._file = file
        self._messages = list(self._read_messages(address))

    def _read_messages(self, address: int) -> Iterator[Message]:
        if self._file.unsigned(address, 1) != 1:
            raise DamagedError(f"the object at byte {address} has a header of a later layout")
        left = self._file.unsigned(address + 2, 2)
        blocks = [(address + 16, self._file.unsigned(address + 8, 4))]
        while blocks:
            position, size = blocks.pop()
            end = position + size
            while left and position + 8 <= end:
                kind, length, flags, _ = struct.unpack("<HHB3s", self._file.take(position, 8))
                message = Message(kind, position + 8, length)
                position += 8 + length
                left -= 1
                if position > end or flags & 2:
                    raise DamagedError(f"a message at byte {message.start} is shared or too long")
                if kind == _CONTINUATION:
                    blocks.append((self._file.unsigned(message.start), self._file.unsigned(message.start + 8)))
                else:
                    yield message

    def _only(self, kind: int) -> Message | None:
        """The one message of a kind, or None."""
        found = [message for message in self._messages if message.kind == kind]
        if len(found) > 1:
            raise DamagedError(f"an object has {len(found)} messages of type {kind}")
        return found[0] if found else None

    @property
    def is_group(self) -> bool:
        """Whether this is a group and no dataset."""
        return self._only(_SYMBOL_TABLE) is not None

    @functools.cached_property
    def children(self) -> dict[str, int]:
        """The address of each member of a group.

        Raises:
            DamagedError: if one of them is a link to another place.
        """
        if any(message.kind in (_LINK, _LINK_INFO) for message in self._messages):
            raise DamagedError("a group holds links to other places, or is of a later layout")
        message = self._only(_SYMBOL_TABLE)
        if message is None:
            raise DamagedError("a dataset stands where a group is expected")
        heap = self._file.unsigned(message.start + 8)
        self._file.signed_by(heap, b"HEAP\0")
        names = self._file.unsigned(heap + 24), self._file.unsigned(heap + 8)
        return dict(self._entries(self._file.unsigned(message.start), names, _MAX_TREE_LEVEL))

    def _entries(self, node: int, names: tuple[int, int], level: int) -> Iterator[tuple[str, int]]:
        """The members below one node of a group's tree, all of whose children are of a lower level."""
        self._file.signed_by(node, b"TREE\0")
        own = self._file.unsigned(node + 5, 1)
        if own >= level:
            raise DamagedError("the tree of a group is no tree")
        for index in range(self._file.unsigned(node + 6, 2)):
            child = self._file.unsigned(node + 24 + 8 + 16 * index)
            yield from self._leaf(child, names) if own == 0 else self._entries(child, names, own)

    def _leaf(self, node: int, names: tuple[int, int]) -> Iterator[tuple[str, int]]:
        self._file.signed_by(node, b"SNOD\x01")
        start, size = names
        for index in range(self._file.unsigned(node + 6, 2)):
            offset, address, cache = struct.unpack("<QQI", self._file.take(node + 8 + 40 * index, 20))
            # An empty name would be no name, and one without end would run into the next structure.
            longest = max(0, min(_LONGEST_NAME, size - offset))
            name, end, _ = self._file.take(start + offset, longest).partition(b"\0")
            if not name or not end:
                raise DamagedError("the name of a member does not lie in its heap")
            if cache == _SOFT_LINK or address == _UNDEFINED:
                raise DamagedError(f"{text(name)!r} is a link to another place")
            yield text(name), address

    def child(self, name: str) -> "Object | None":
        """A member of a group, or None."""
        address = self.children.get(name)
        return None if address is None else self._file.object(address)

    @functools.cached_property
    def attributes(self) -> dict[str, Attribute]:
        """The attributes by name."""
        info = self._only(_ATTRIBUTE_INFO)
        if info is not None:
            raise DamagedError("its attributes are of a later layout")
        return dict(self._attribute(message) for message in self._messages if message.kind == _ATTRIBUTE)

    def _attribute(self, message: Message) -> tuple[str, Attribute]:
        version, flags, name_size, type_size, space_size = struct.unpack("<BBHHH", self._file.take(message.start, 8))
        if version not in (1, 2, 3) or (version > 1 and flags):
            raise DamagedError("an attribute is of a later layout or shared")
        fill = _padded if version == 1 else int
        position = message.start + (9 if version == 3 else 8)
        name = text(self._file.take(position, name_size))
        datatype = self._file.take(position + fill(name_size), type_size)
        space = position + fill(name_size) + fill(type_size)
        shape = self._shape(space)
        data = space + fill(space_size)
        return name, self._texts(datatype, shape, data, message.start + message.size)

    def _texts(self, datatype: bytes, shape: tuple[int, ...], data: int, end: int) -> Attribute:
        """The value of an attribute, if it is text."""
        kind, size = datatype[:1] and datatype[0] & 0x0F, int.from_bytes(datatype[4:8], "little")
        is_variable = kind == _VARIABLE and datatype[1] & 0x0F == 1 and size == 16
        count = TensorInfo(BY_NAME["uint8"].numpy, shape).size
        if not (is_variable or kind == _FIXED_TEXT) or len(shape) > 1 or not 0 < size <= _LONGEST_NAME:
            return None
        if data + count * size > end:
            raise DamagedError("an attribute is longer than its message")
        values: list[str | None] = []
        for position in range(data, data + count * size, size):
            if is_variable:
                _, address, index = struct.unpack("<IQI", self._file.take(position, size))
                values.append(self._file.heap_text(address, index) if address else "")
            else:
                values.append(text(self._file.take(position, size)))
        if not shape:
            return values[0]
        if None in values:
            raise DamagedError(f"a list of names has one of more than {_LONGEST_NAME} bytes")
        return cast("list[str]", values)

    def _shape(self, start: int) -> tuple[int, ...]:
        """The shape in a dataspace."""
        version, rank, _, kind = struct.unpack("<4B", self._file.take(start, 4))
        if version not in (1, 2) or (version == 2 and kind > 1):
            raise DamagedError("a dataspace is empty or of a later layout")
        first = start + (8 if version == 1 else 4)
        shape = struct.unpack(f"<{rank}Q", self._file.take(first, 8 * rank))
        if not is_shape(shape):
            raise DamagedError(f"a shape of {rank} axes is none that a weight can have")
        return shape

    def dataset(self) -> Dataset:
        """Where the numbers of a dataset lie; they do lie in the file.

        Raises:
            DamagedError: for anything but one plain run of numbers.
        """
        space, datatype, layout = map(self._only, (_DATASPACE, _DATATYPE, _LAYOUT))
        if space is None or datatype is None or layout is None:
            raise DamagedError("it is no dataset")
        if self._only(_FILTERS) or self._only(_EXTERNAL):
            raise DamagedError("it is compressed or in another file, which Keras never does to weights")
        version, kind = self._file.take(layout.start, 2)
        if version != 3 or kind != _CONTIGUOUS:  # the version of the layout message
            raise DamagedError("it is chunked, virtual or of a later layout; `h5repack -l CONTI -f NONE` undoes that")
        dtype = _DATATYPES.get(_without_version(self._file.take(datatype.start, datatype.size)))
        if dtype is None and self._is_marked_pair(datatype):
            dtype = BY_NAME["bfloat16"]
        if dtype is None:
            raise DamagedError(f"its numbers are of no plain little-endian type of {', '.join(BY_NAME)}")
        shape = self._shape(space.start)
        start, size = self._file.unsigned(layout.start + 2), self._file.unsigned(layout.start + 10)
        info = TensorInfo(dtype.numpy, shape)
        if info.nbytes == 0:
            return Dataset(dtype, shape, 0)
        if start == _UNDEFINED or size < info.nbytes:
            raise DamagedError(f"its shape {list(shape)} takes {info.nbytes} bytes, which the file does not hold")
        self._file.take(start + info.nbytes - 1, 1)
        return Dataset(dtype, shape, start)

    def _is_marked_pair(self, datatype: Message) -> bool:
        """Whether numbers are Keras 3's bfloat16: two opaque bytes, with a note what they are."""
        described = self._file.take(datatype.start, 8)
        is_pair = described[0] & 0x0F == _OPAQUE and described[4:] == (2).to_bytes(4, "little")
        return is_pair and self.attributes.get("dtype") == "bfloat16"


def check_apart(runs: Mapping[str, tuple[int, int]]) -> None:
    """Make sure that no two datasets share bytes.

    Args:
        runs: where the bytes of each dataset begin, and how many they are, by its name.
    """
    position = 0
    for name, (start, size) in sorted(runs.items(), key=lambda item: item[1]):
        if size and start < position:
            raise DamagedError(f"the bytes of {name!r:.200} are those of another dataset too")
        position = max(position, start + size)


def text(data: bytes) -> str:
    """A text, which a zero byte may end."""
    try:
        return data.partition(b"\0")[0].decode()
    except UnicodeDecodeError:
        raise DamagedError("a name is not UTF-8") from None


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _without_version(datatype: bytes) -> bytes:
    """A datatype message without its version, which says nothing about numbers, and without padding."""
    length = 20 if datatype[:1] and datatype[0] & 0x0F == 1 else 12
    return bytes([datatype[0] & 0x0F]) + datatype[1:length] if datatype else b""


def _float(exponent_bits: int, mantissa_bits: int) -> bytes:
    """The datatype message of an IEEE number: sign, exponent, mantissa from the highest bit down."""
    bits = 1 + exponent_bits + mantissa_bits
    bias = (1 << (exponent_bits - 1)) - 1
    fields = (0x20, bits - 1, 0, bits // 8, 0, bits, mantissa_bits, exponent_bits, 0, mantissa_bits, bias)
    return b"\x01" + struct.pack("<BBBIHHBBBBI", *fields)


def _integer(bits: int, *, signed: bool) -> bytes:
    return b"\0" + struct.pack("<BBBIHH", 8 if signed else 0, 0, 0, bits // 8, 0, bits)


_DATATYPES = {
    _float(5, 10): BY_NAME["float16"],
    _float(8, 23): BY_NAME["float32"],
    _float(11, 52): BY_NAME["float64"],
    **{_integer(bits, signed=True): BY_NAME[f"int{bits}"] for bits in (8, 16, 32, 64)},
    **{_integer(bits, signed=False): BY_NAME[f"uint{bits}"] for bits in (8, 16, 32, 64)},
}
