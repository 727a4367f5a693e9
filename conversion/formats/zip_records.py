"""Where the records of a zip archive lie, such that they can be mapped: all stored as they are, none over another.

Our own reader of the archive's directory, after section 4.3 of PKWARE's APPNOTE, because Python's takes ten times the
directory's bytes for an archive that consists of nothing else.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conversion.tensors import damaged
from opt_common.errors import CheckpointError

MAGIC = b"PK\x03\x04"
"""How an archive with records begins."""

LOCAL_HEADER_BYTES = 30
"""Length of a record's header, without the record's name and what else comes between it and the bytes."""

_ENTRY, _END, _END_64, _LOCATOR = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY_FIELDS = struct.Struct("<4s4xHH8xIIHHH4xII")
_END_FIELDS = struct.Struct("<4s4xHHIIH")
_END_64_FIELDS = struct.Struct("<4s20xQQQQ")
_LOCATOR_FIELDS = struct.Struct("<4s4xQ4x")
_LONGEST_COMMENT = 65535

_STORED = 0
_ENCRYPTED = 1
_FOLDER = 0x10
_MAX_RECORDS = 50_000  # a state dict has one for each tensor, and the largest OPT fifteen hundred of them
_MAX_NAME_BYTES = 1000
_IN_EXTRA = (1 << 32) - 1
_EXTRA_64 = 1


class Record(NamedTuple):
    """Where the bytes of a record begin, and how many there are."""

    start: int
    size: int


class _Entry(NamedTuple):
    """What the directory says of a record."""

    name: str
    header: int
    size: int


def records(path: Path, buffer: mmap.mmap) -> dict[str, Record]:
    """The records of an archive by name.

    Args:
        path: the archive.
        buffer: the same, mapped.

    Raises:
        CheckpointError: if it is no whole archive, or a record is compressed, encrypted, there twice, overlaps another
            one or reaches beyond the file.
    """
    found: dict[str, Record] = {}
    for entry in _entries(path, buffer):
        if entry.name in found:
            raise damaged(path, f"the record {entry.name!r} occurs twice")
        found[entry.name] = Record(_payload_start(path, buffer, entry), entry.size)
    position = 0
    for name, record in sorted(found.items(), key=lambda item: item[1].start):
        if record.start < position or record.start + record.size > len(buffer):
            raise damaged(path, f"the record {name!r} overlaps another one or the end of the file")
        position = record.start + record.size
    return found


def _entries(path: Path, buffer: mmap.mmap) -> Iterator[_Entry]:
    """The entries of the directory."""
    position, end, count = _directory(path, buffer)
    if count > _MAX_RECORDS:
        raise damaged(path, f"the archive has {count} records, far more than any state dict")
    for _ in range(count):
        if position + _ENTRY_FIELDS.size > end:
            raise damaged(path, "the archive's directory ends in the middle")
        fields = _ENTRY_FIELDS.unpack(buffer[position : position + _ENTRY_FIELDS.size])
        signature, flags, method, packed, size, name_bytes, extra_bytes, comment_bytes, attributes, header = fields
        start = position + _ENTRY_FIELDS.size
        position = start + name_bytes + extra_bytes + comment_bytes
        if signature != _ENTRY or position > end or name_bytes > _MAX_NAME_BYTES:
            raise damaged(path, f"the archive's directory has no entry at byte {start - _ENTRY_FIELDS.size}")
        try:
            name = buffer[start : start + name_bytes].decode()
        except UnicodeDecodeError:
            raise damaged(path, "the name of a record is not UTF-8") from None
        extra = buffer[start + name_bytes : start + name_bytes + extra_bytes]
        size, packed, header = _wide(path, (size, packed, header), extra)
        if attributes & _FOLDER:
            raise damaged(path, f"the record {name!r} is marked as a folder, which PyTorch would not read")
        if method != _STORED or size != packed or flags & _ENCRYPTED:
            raise CheckpointError(
                f"{path}: record {name!r} is compressed or encrypted, which no framework does to weights. "
                f"Don't trust this file."
            )
        yield _Entry(name, header, size)
    if position != end:
        raise damaged(path, "the archive's directory is longer than its entries")


def _directory(path: Path, buffer: mmap.mmap) -> tuple[int, int, int]:
    """Where the directory begins and ends, and the number of its entries."""
    tail = max(0, len(buffer) - _END_FIELDS.size - _LONGEST_COMMENT)
    in_tail = buffer[tail:].rfind(_END)
    at = tail + in_tail
    if in_tail < 0 or at + _END_FIELDS.size > len(buffer):
        raise damaged(path, "it is not a whole zip archive: it has no directory")
    _, here, count, size, start, comment_bytes = _END_FIELDS.unpack(buffer[at : at + _END_FIELDS.size])
    end = at
    locator = at - _LOCATOR_FIELDS.size
    if locator >= 0 and buffer[locator : locator + 4] == _LOCATOR:
        _, end = _LOCATOR_FIELDS.unpack(buffer[locator:at])
        if end + _END_64_FIELDS.size > locator or buffer[end : end + 4] != _END_64:
            raise damaged(path, "it is not a whole zip archive: the end of its directory is not where it says")
        _, here, count, size, start = _END_64_FIELDS.unpack(buffer[end : end + _END_64_FIELDS.size])
    if at + _END_FIELDS.size + comment_bytes != len(buffer) or here != count or start + size != end:
        raise damaged(path, "it is not a whole zip archive: its directory does not fit the file")
    return start, end, count


def _wide(path: Path, numbers: tuple[int, int, int], extra: bytes) -> tuple[int, int, int]:
    """Numbers of an entry, of which those that take more than 32 bits stand among what is extra."""
    if _IN_EXTRA not in numbers:
        return numbers
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        if kind == _EXTRA_64:
            held = extra[position + 4 : position + 4 + size]
            values = iter([int.from_bytes(held[at : at + 8], "little") for at in range(0, len(held) - 7, 8)])
            wide = tuple(next(values, None) if number == _IN_EXTRA else number for number in numbers)
            if None not in wide:
                return wide  # pyright: ignore[reportReturnType]
            break
        position += 4 + size
    raise damaged(path, "a record of the archive has no length")


def _payload_start(path: Path, buffer: mmap.mmap, entry: _Entry) -> int:
    """Where the bytes of a record start, by its local header."""
    header = buffer[entry.header : entry.header + LOCAL_HEADER_BYTES]
    if len(header) < LOCAL_HEADER_BYTES or not header.startswith(MAGIC):
        raise damaged(path, f"the record {entry.name!r} is not where the archive says")
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
