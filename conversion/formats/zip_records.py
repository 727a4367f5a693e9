"""Where the records of a zip archive lie, such that they can be mapped: all stored as they are, none over another."""

import mmap
import zipfile
from pathlib import Path
from typing import NamedTuple

from conversion.tensors import damaged
from opt_common.errors import CheckpointError

MAGIC = b"PK\x03\x04"
"""How an archive with records begins."""

LOCAL_HEADER_BYTES = 30
"""Length of a record's header, without the record's name and what else comes between it and the bytes."""


class Record(NamedTuple):
    """Where the bytes of a record begin, and how many there are."""

    start: int
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
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError, IndexError) as error:
        raise damaged(path, f"it is not a whole zip archive ({error})") from None
    found: dict[str, Record] = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise CheckpointError(
                f"{path}: record {entry.filename!r} is compressed or encrypted, which no framework does to weights. "
                f"Don't trust this file."
            )
        if entry.filename in found:
            raise damaged(path, f"the record {entry.filename!r} occurs twice")
        found[entry.filename] = Record(_payload_start(path, buffer, entry), entry.file_size)
    position = 0
    for name, record in sorted(found.items(), key=lambda item: item[1].start):
        if record.start < position or record.start + record.size > len(buffer):
            raise damaged(path, f"the record {name!r} overlaps another one or the end of the file")
        position = record.start + record.size
    return found


def _payload_start(path: Path, buffer: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a record start, by its local header."""
    header = buffer[entry.header_offset : entry.header_offset + LOCAL_HEADER_BYTES]
    if entry.header_offset < 0 or len(header) < LOCAL_HEADER_BYTES or not header.startswith(MAGIC):
        raise damaged(path, f"the record {entry.filename!r} is not where the archive says")
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
