"""safetensors: a JSON header with names, dtypes, shapes and offsets, then the bytes of the tensors.

Our own parser of the published format, because the `safetensors` library copies every tensor on its way to NumPy.
The key "format" of the header's metadata says whose names and layouts the tensors have ("pt", "tf" or "flax").
"""

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.dtypes import BY_NUMPY, BY_SAFETENSORS
from conversion.tensors import (
    Array,
    ReadNative,
    TensorInfo,
    TensorSpec,
    are_lengths,
    damaged,
    is_shape,
    map_file,
    pieces,
    view,
)
from opt_common.errors import CheckpointError
from opt_common.json_file import unique
from opt_common.params import Scheme

SCHEME: Scheme = "torch"

_SCHEMES: Mapping[str, Scheme] = {"pt": "torch", "tf": "keras", "flax": "nnx"}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 4_000_000  # parsed JSON takes many times its length; the largest OPT needs a twentieth of this
_ALIGNMENT = 8


class SafetensorsReader:
    """An open safetensors file."""

    def __init__(self, path: Path) -> None:
        self._buffer = map_file(path)
        header, self._start = _header(path, self._buffer)
        metadata = header.pop("__metadata__", {})
        self.scheme: Scheme = _scheme(path, metadata)
        self.metadata: Mapping[str, Any] = metadata
        self._offsets: dict[str, int] = {}
        self.tensors: Mapping[str, TensorInfo] = {}
        for name, entry in header.items():
            self.tensors[name], self._offsets[name] = _entry(path, name, entry)
        _check_cover(path, self.tensors, self._offsets, len(self._buffer) - self._start)

    def read(self, name: str) -> Array:
        return view(self._buffer, self._start + self._offsets[name], self.tensors[name])

    def close(self) -> None:
        # The map itself goes when the last array that looks into it does.
        del self._buffer


def open_reader(path: Path) -> SafetensorsReader:
    """Open a file and validate its header against its size.

    Raises:
        CheckpointError: for anything that is not a valid safetensors file.
    """
    return SafetensorsReader(path)


def stored_bytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes in a file."""
    return info.nbytes


def write(
    path: Path, tensors: Sequence[TensorSpec], read: ReadNative, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file with PyTorch's names and layouts, one tensor at a time; the same tensors give the same bytes.

    Args:
        path: the new file.
        tensors: what to write, in the order of the payload.
        read: gives the array of a name; it is called once for each, in order.
        metadata: what the header says besides; None says that the layout is PyTorch's.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.info.nbytes
        header[tensor.name] = {
            "dtype": BY_NUMPY[tensor.info.dtype].safetensors,
            "shape": list(tensor.info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for tensor in tensors:
            for piece in pieces(read(tensor.name), tensor.info.dtype, tensor.name):
                file.write(piece.view("u1").data)


def _header(path: Path, buffer: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The parsed header and the offset at which the payload starts."""
    if len(buffer) < _LENGTH_BYTES:
        raise damaged(path, f"{len(buffer)} bytes are too few for a safetensors file")
    length = int.from_bytes(buffer[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if length > _MAX_HEADER_BYTES or start > len(buffer):
        raise damaged(path, f"the header claims {length} bytes of a file of {len(buffer)}")
    try:
        header = json.loads(buffer[_LENGTH_BYTES:start], object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an integer of 4300 digits
        raise damaged(path, f"the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(path, "the header is not a JSON object")
    return header, start  # pyright: ignore[reportUnknownVariableType]


def _scheme(path: Path, metadata: object) -> Scheme:
    if not isinstance(metadata, dict):
        raise damaged(path, "__metadata__ is not a JSON object")
    if not all(isinstance(value, str) for value in metadata.values()):  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        raise damaged(path, "__metadata__ holds something else than texts")
    # No "format" at all means PyTorch, as in Hugging Face's loader.
    stored: object = metadata.get("format", "pt")  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    if not isinstance(stored, str) or stored not in _SCHEMES:
        raise CheckpointError(f"{path}: metadata format is {stored!r}, expected one of {', '.join(_SCHEMES)}.")
    return _SCHEMES[stored]


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int]:
    """Dtype, shape and offset of one entry of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:  # pyright: ignore[reportUnknownMemberType]
        raise damaged(path, f"the header's entry of {name!r} has not just dtype, shape and data_offsets")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(tag, str) or tag not in BY_SAFETENSORS:
        raise CheckpointError(f"{path}: {name!r} has dtype {tag!r}, expected one of {', '.join(BY_SAFETENSORS)}.")
    if not is_shape(shape) or not are_lengths(offsets) or len(offsets) != 2:  # pyright: ignore[reportUnknownArgumentType]
        raise damaged(path, f"{name!r} has shape {shape!r:.80} and offsets {offsets!r:.80}")
    info = TensorInfo(BY_SAFETENSORS[tag].numpy, tuple(shape))  # pyright: ignore[reportUnknownArgumentType]
    begin, end = offsets  # pyright: ignore[reportUnknownVariableType]
    if end - begin != info.nbytes:
        raise damaged(path, f"{name!r} has shape {list(info.shape)} ({info.nbytes} bytes) but offsets {begin} to {end}")
    return info, begin  # pyright: ignore[reportUnknownVariableType]


def _check_cover(path: Path, tensors: Mapping[str, TensorInfo], offsets: Mapping[str, int], size: int) -> None:
    """The tensors follow each other without gap or overlap and fill the payload, as the format demands."""
    position = 0
    for name, offset in sorted(offsets.items(), key=lambda item: (item[1], tensors[item[0]].nbytes)):
        if offset != position:
            raise damaged(path, f"{name!r} starts at byte {offset} of the payload, expected {position}")
        position += tensors[name].nbytes
    if position != size:
        raise damaged(path, f"the tensors take {position} bytes, the file holds {size}")
