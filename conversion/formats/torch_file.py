"""PyTorch's `.bin` and `.pt`: a pickled state dict and the raw bytes of its storages, without PyTorch.

Two containers: the zip archive of PyTorch 1.6 and later, and the one before, a sequence of pickles followed by the
storages. Written is the zip archive, such that `torch.load` accepts it with `weights_only=True` and with `mmap=True`.
"""

import io
import mmap
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from conversion.dtypes import BY_NUMPY
from conversion.formats import torch_pickle
from conversion.formats.torch_pickle import RefusedError, Storage, StoredTensor
from conversion.formats.zip_records import LOCAL_HEADER_BYTES, MAGIC, records
from conversion.tensors import Array, ReadNative, TensorInfo, TensorSpec, damaged, map_file, pieces, view
from opt_common.errors import CheckpointError
from opt_common.params import Scheme

SCHEME: Scheme = "torch"

_OLD_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_OLD_PROTOCOL = 1001
_OLD_COUNT_BYTES = 8

_ALIGNMENT = 64  # of the records that torch.save writes, so that they can be mapped
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)
_ZIP64_EXTRA_BYTES = 20
_ZIP64_FROM = 1 << 30


class TorchFile:
    """An open PyTorch file: the pickled object, and its tensors on demand.

    Attributes:
        path: the file.
        content: the object, with a `StoredTensor` for each tensor.
    """

    def __init__(self, path: Path, *, inert: bool = False) -> None:
        """Open a file; `inert` is that of `torch_pickle.load`."""
        self.path = path
        self._buffer = map_file(path)
        is_zip = self._buffer[: len(MAGIC)] == MAGIC
        read = _read_zip if is_zip else _read_old
        self.content, self._offsets = read(path, self._buffer, inert=inert)

    def check(self, tensor: StoredTensor) -> None:
        """Make sure that the file holds the whole storage of a tensor.

        Raises:
            CheckpointError: if it does not.
        """
        storage = tensor.storage
        if storage.key not in self._offsets:
            raise damaged(self.path, f"it has no record of storage {storage.key!r}")
        size = storage.size * storage.dtype.numpy.itemsize
        _, stored = self._offsets[storage.key]
        if size != stored:
            raise damaged(self.path, f"storage {storage.key!r} should take {size} bytes, its record has {stored}")

    def read(self, tensor: StoredTensor) -> Array:
        """The array of a tensor that was checked: read-only, a view of the mapped file where possible."""
        storage = tensor.storage
        start, _ = self._offsets[storage.key]
        flat = view(self._buffer, start, TensorInfo(storage.dtype.numpy, (storage.size,)))
        # The stride of an axis that nobody steps along may be any number, which NumPy would not take.
        walked = zip(tensor.shape, tensor.strides, strict=True)
        strides = tuple(stride * flat.itemsize if length > 1 else 0 for length, stride in walked)
        array = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)
        return cast("Array", array)

    def close(self) -> None:
        """Let go of the file. The map itself goes when the last array that looks into it does."""
        del self._buffer


class TorchReader:
    """An open PyTorch file that holds a state dict."""

    def __init__(self, path: Path) -> None:
        self._file = TorchFile(path)
        self._stored = _state_dict(path, self._file.content)
        self.scheme: Scheme = SCHEME
        self.tensors: Mapping[str, TensorInfo] = {name: tensor.info for name, tensor in self._stored.items()}
        for tensor in self._stored.values():
            self._file.check(tensor)

    def read(self, name: str) -> Array:
        return self._file.read(self._stored[name])

    def close(self) -> None:
        self._file.close()


def open_reader(path: Path) -> TorchReader:
    """Open a file; read its pickle without executing anything and validate it against the size of the file.

    Raises:
        CheckpointError: for anything but a state dict of plain tensors.
    """
    return TorchReader(path)


def stored_bytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes in a file."""
    return info.nbytes


def write(
    path: Path,
    tensors: Sequence[TensorSpec],
    read: ReadNative,
    around: Callable[[dict[str, Any]], Any] = lambda state: state,
) -> None:
    """Write a state dict as a zip archive, one tensor at a time; the same tensors give the same bytes.

    Args:
        path: the new file; the archive's folder is named after it, as `torch.save` does.
        tensors: what to write; one that `shares` the bytes of an earlier one gets no storage of its own.
        read: gives the array of a name; it is called once for each storage, in order.
        around: makes the object to be pickled of the state dict: plain values, as `torch_pickle.dump` takes them.
    """
    state: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if tensor.shares is not None:
            state[tensor.name] = state[tensor.shares]
            continue
        storage = Storage(str(len(state)), BY_NUMPY[tensor.info.dtype], tensor.info.size)
        state[tensor.name] = StoredTensor(storage, 0, tensor.info.shape, _c_strides(tensor.info.shape))
    with _WriteBehind(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, f"{path.stem}/data.pkl", [torch_pickle.dump(around(dict(state)))])
        _write_record(archive, f"{path.stem}/byteorder", [b"little"])
        for tensor in tensors:
            if tensor.shares is None:
                record = f"{path.stem}/data/{state[tensor.name].storage.key}"
                parts = (piece.view("u1").data for piece in pieces(read(tensor.name), tensor.info.dtype, tensor.name))
                _write_record(archive, record, parts, tensor.info.nbytes)
        _write_record(archive, f"{path.stem}/version", [b"3\n"])


def _state_dict(path: Path, state: Any) -> dict[str, StoredTensor]:
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict: tensors by name.")
    items = cast("dict[Any, Any]", state)
    others = [str(name) for name, value in items.items() if not isinstance(value, StoredTensor)]
    if others:
        raise CheckpointError(
            f"{path} holds things that are no tensors: {', '.join(others[:5])}. "
            f"Expected a state dict; save `model.state_dict()` alone."
        )
    return {str(name): tensor for name, tensor in items.items()}


# The zip archive


def _read_zip(path: Path, buffer: mmap.mmap, *, inert: bool) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The pickled object, and start and size in bytes of each storage by its key."""
    held = records(path, buffer)
    pickles = [name for name in held if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise damaged(path, f"the archive has {len(pickles)} records named data.pkl, expected 1")
    folder = pickles[0].removesuffix("data.pkl")
    order = held.get(f"{folder}byteorder")
    if order is not None and buffer[order.start : order.start + order.size] != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine. Save it again on a little-endian one.")
    record = held[pickles[0]]
    state = _load(path, buffer[record.start : record.start + record.size], inert=inert)
    data = f"{folder}data/"
    return state, {
        name.removeprefix(data): (record.start, record.size) for name, record in held.items() if name.startswith(data)
    }


def _load(path: Path, pickle: bytes | mmap.mmap, *, inert: bool = False) -> Any:
    try:
        return torch_pickle.load(pickle, inert=inert)
    except RefusedError as error:
        raise CheckpointError(f"{path}: {error}. Don't trust this file, or save its tensors again.") from None


class _WriteBehind(io.BufferedWriter):
    """A new file that is written in the background: meanwhile zipfile computes the checksum of the next piece."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[int] | None = None

    def write(self, buffer: Any) -> int:
        """Write once what was given before is written. An error is raised by the next call of any method."""
        self._wait()
        self._pending = self._pool.submit(super().write, buffer)
        return memoryview(buffer).nbytes

    def tell(self) -> int:
        self._wait()
        return super().tell()

    def seek(self, target: int, whence: int = io.SEEK_SET) -> int:
        self._wait()
        return super().seek(target, whence)

    def flush(self) -> None:
        self._wait()
        super().flush()

    def close(self) -> None:
        try:
            super().close()  # flushes
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _write_record(archive: zipfile.ZipFile, name: str, parts: Any, size: int | None = None) -> None:
    """Add one record whose bytes start at a multiple of `_ALIGNMENT`."""
    assert archive.fp is not None
    size = sum(map(len, parts)) if size is None else size
    large = size > _ZIP64_FROM
    entry = zipfile.ZipInfo(name, _FIRST_DATE)
    entry.create_system = 0  # else the bytes depend on the operating system
    entry.file_size = size
    start = archive.fp.tell() + LOCAL_HEADER_BYTES + len(name.encode()) + (_ZIP64_EXTRA_BYTES if large else 0)
    padding = -(start + 4) % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as record:
        for part in parts:
            record.write(part)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


# The container before PyTorch 1.6


def _read_old(path: Path, buffer: mmap.mmap, *, inert: bool) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The pickled object, and start and size in bytes of each storage by its key.

    Only state dicts are read from this container, so that there is nothing to be kept inert, whatever `inert` says.
    """
    del inert
    magic, protocol, system, state, keys = [_load(path, buffer) for _ in range(5)]
    if magic != _OLD_MAGIC_NUMBER or protocol != _OLD_PROTOCOL or not isinstance(system, dict):
        raise damaged(path, "it is neither a zip archive nor a file of torch.save")
    if cast("dict[str, Any]", system).get("little_endian") is not True:
        raise CheckpointError(f"{path} was written on a big-endian machine. Save it again on a little-endian one.")
    tensors = _state_dict(path, state).values()
    itemsizes = {tensor.storage.key: tensor.storage.dtype.numpy.itemsize for tensor in tensors}
    if not isinstance(keys, list):
        raise damaged(path, "the list of its storages is absent")
    offsets: dict[str, tuple[int, int]] = {}
    position = buffer.tell()
    for key in cast("list[Any]", keys):
        if not isinstance(key, str) or key not in itemsizes or key in offsets:
            # Nothing but a text is shown: what is nested without end can't be.
            shown = repr(key)[:40] if isinstance(key, str) else "that has no name"
            raise damaged(path, f"it lists a storage {shown} that no tensor uses, or lists it twice")
        count = int.from_bytes(buffer[position : position + _OLD_COUNT_BYTES], "little")
        start, size = position + _OLD_COUNT_BYTES, count * itemsizes[key]
        position = start + size
        if position > len(buffer):
            raise damaged(path, f"storage {key!r} ends at byte {position} of {len(buffer)}")
        offsets[key] = (start, size)
    return state, offsets
