"""Hugging Face's `tf_model.h5`, in the layout that Keras 2 gave it.

One file: the root's attribute `layer_names` lists groups; each group's `weight_names` lists the datasets in it, named
`<scope>/model/decoder/…/kernel:0`. A shard: the root's `layer_names` lists the datasets themselves, without scope.
A list that is too long for an HDF5 attribute is split over `name0`, `name1`, ….

HDF5 as Keras uses it has no bfloat16. Such a tensor is stored as float32, which holds each of its values exactly, with
an attribute `dtype` = "bfloat16" on the dataset: Keras and `transformers` read the right numbers, and the reader here
gives back the very bits.
"""

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conversion.dtypes import BY_NAME
from conversion.formats.hdf5_structure import DamagedError, File, Object, check_apart
from conversion.tensors import (
    PIECE_BYTES,
    Array,
    ReadNative,
    TensorInfo,
    TensorSpec,
    damaged,
    fetch,
    frozen,
    map_file,
    pieces,
    view,
)
from opt_common.params import HEAD_MODULES, Scheme

SCHEME: Scheme = "keras"

ATTRIBUTE_BYTES = 64512
"""Longest list of names in one attribute; Keras's own limit, a little below HDF5's 64 KiB."""

_KERAS_VERSION = "2.15.0"  # the last release of the Keras 2 whose layout this is
_DTYPE_ATTRIBUTE = "dtype"
_MAX_DEPTH = 32
_ERRNO = re.compile(r"\berrno = (\d{1,4})")
_BFLOAT16 = BY_NAME["bfloat16"].numpy
_FLOAT32 = BY_NAME["float32"].numpy


def h5py() -> Any:
    """The library, imported when a file of this format is met; it comes without types."""
    import h5py as library  # pyright: ignore[reportMissingTypeStubs]

    return library


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A dataset: what it stands for, what the file holds, and where."""

    info: TensorInfo
    raw: TensorInfo
    start: int


class Hdf5Reader:
    """An open HDF5 file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = map_file(path)
        self.scheme: Scheme = SCHEME
        self._stored: dict[str, _Stored] = {}
        try:
            root = File(self._buffer).root
            for name, where in _names(root).items():
                self._stored[name] = _stored(name, _descend(root, where))
            check_apart({name: (stored.start, stored.raw.nbytes) for name, stored in self._stored.items()})
        except DamagedError as error:
            raise damaged(path, str(error)) from None
        self.tensors: Mapping[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}

    def read(self, name: str) -> Array:
        stored = self._stored[name]
        raw = view(self._buffer, stored.start, stored.raw)
        if stored.info == stored.raw:
            return raw
        bits = raw.view(np.uint32).reshape(-1)
        upper = np.empty(bits.size, np.uint16)
        step = PIECE_BYTES // bits.itemsize
        for start in range(0, bits.size, step):
            piece = fetch(bits[start : start + step])
            if (piece & 0xFFFF).any():
                raise damaged(self._path, f"{name!r} is marked as bfloat16 but holds numbers that are not")
            upper[start : start + step] = piece >> 16
        return frozen(upper.view(stored.info.dtype).reshape(stored.info.shape))

    def close(self) -> None:
        # The map itself goes when the last array that looks into it does.
        del self._buffer


def open_reader(path: Path) -> Hdf5Reader:
    """Open a file, find its datasets and validate them against the size of the file.

    Raises:
        CheckpointError: for anything but plain datasets in the layout above; links to other places, virtual, chunked
            and compressed datasets are refused.
    """
    return Hdf5Reader(path)


def stored_bytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes in a file: bfloat16 is widened."""
    return _raw_info(info).nbytes


def write(path: Path, tensors: Sequence[TensorSpec], read: ReadNative) -> None:
    """Write datasets one at a time; the same tensors give the same bytes.

    Args:
        path: the new file.
        tensors: what to write. Names that have a scope (`<scope>/model/decoder/…`) make the layout of a single file,
            names without one (`model/decoder/…`) that of a shard.
        read: gives the array of a name; it is called once for each, in order.
    """
    single = _is_single(tensors)
    with _system_errors(path), h5py().File(path, "x", libver=("earliest", "v108")) as file:
        offsets = {tensor.name: _create(file, _where(tensor.name, single), tensor.info) for tensor in tensors}
        _write_lists(file, [tensor.name for tensor in tensors], single)
    fill(path, offsets, tensors, read, lambda info: _raw_info(info).dtype)


def allocate(file: Any, where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Create a dataset in an open file of the library's and give it its place, without any bytes."""
    plan = h5py().h5p.create(h5py().h5p.DATASET_CREATE)
    plan.set_alloc_time(h5py().h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py().h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)  # else the bytes depend on the time of day
    return file.create_dataset(where, shape, dtype, dcpl=plan)


def fill(
    path: Path,
    offsets: Mapping[str, int],
    tensors: Sequence[TensorSpec],
    read: ReadNative,
    stored_dtype: Callable[[TensorInfo], np.dtype[Any]] = lambda info: info.dtype,
) -> None:
    """Put the bytes of datasets that have their places into a closed file, without passing through HDF5."""
    with path.open("r+b") as file:
        for tensor in tensors:
            file.seek(offsets[tensor.name])
            for piece in pieces(read(tensor.name), tensor.info.dtype, tensor.name):
                file.write(piece.astype(stored_dtype(tensor.info), copy=False).view("u1").data)


# Reading


def _names(root: Object) -> dict[str, str]:
    """Native name -> path in the file, of every tensor that the file lists."""
    layers = _list(root, "layer_names")
    if layers is None:
        raise DamagedError("it has no list layer_names, so that no transformers TF model has saved it")
    found: dict[str, str] = {}
    for layer in layers:
        where = _descend(root, layer)
        weights = _list(where, "weight_names") if where.is_group else None
        pairs = [(layer, layer)] if weights is None else [(name, f"{layer}/{name}") for name in weights]
        for name, full in pairs:
            if name in found:
                raise DamagedError(f"the weight {name!r} is listed twice")
            found[name] = full
    return found


def _list(where: Object, name: str) -> list[str] | None:
    """A list of names in one attribute or split over several; None if there is none."""
    if name in where.attributes:
        return _part(where, name)
    names: list[str] = []
    for number in itertools.count():
        part = f"{name}{number}"
        if part not in where.attributes:
            return names if number else None
        names += _part(where, part)
    raise AssertionError


def _part(where: Object, name: str) -> list[str]:
    value = where.attributes[name]
    if isinstance(value, list):
        return value
    # Keras saves the empty list of a group without weights as an empty array of numbers.
    if value is None and name.startswith("weight_names"):
        return []
    raise DamagedError(f"the attribute {name} is no list of names")


def _descend(root: Object, path: str) -> Object:
    """The object at a path; no part of it can be a link."""
    where = root
    parts = path.split("/")
    if len(parts) > _MAX_DEPTH:
        raise DamagedError(f"{path!r:.80} is nested more than {_MAX_DEPTH} deep")
    for part in parts:
        child = where.child(part)
        if child is None:
            raise DamagedError(f"the weight {path!r:.200} is absent")
        where = child
    return where


def _stored(name: str, where: Object) -> _Stored:
    try:
        dataset = where.dataset()
    except DamagedError as error:
        raise DamagedError(f"{name!r:.200}: {error}") from None
    raw = TensorInfo(dataset.dtype.numpy, dataset.shape)
    if _DTYPE_ATTRIBUTE not in where.attributes:
        return _Stored(raw, raw, dataset.start)
    mark = where.attributes[_DTYPE_ATTRIBUTE]
    if mark != _BFLOAT16.name or raw.dtype != _FLOAT32:
        raise DamagedError(f"{name!r} of dtype {raw.dtype} is marked as {mark!r:.40}")
    return _Stored(TensorInfo(_BFLOAT16, raw.shape), raw, dataset.start)


# Writing


@contextlib.contextmanager
def _system_errors(path: Path) -> Generator[None]:
    """HDF5 has what the system refuses in the text of a RuntimeError; here it is an OSError, as everywhere else."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = _ERRNO.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


def _raw_info(info: TensorInfo) -> TensorInfo:
    return TensorInfo(_FLOAT32, info.shape) if info.dtype == _BFLOAT16 else info


def _is_single(tensors: Sequence[TensorSpec]) -> bool:
    """Whether native names have a scope in front of the top module, as in the layout of a single file."""
    return all(tensor.name.split("/")[0] not in {"model", *HEAD_MODULES} for tensor in tensors)


def _where(name: str, single: bool) -> str:
    """Path of a tensor in the file. In a single file each top module is a group of its own."""
    return f"{name.split('/')[1]}/{name}" if single else name


def _create(file: Any, where: str, info: TensorInfo) -> int:
    """Create a dataset, give it its place in the file, and return the offset of that."""
    raw = _raw_info(info)
    dataset = allocate(file, where, raw.shape, raw.dtype)
    if raw != info:
        dataset.attrs[_DTYPE_ATTRIBUTE] = info.dtype.name
    return dataset.id.get_offset() or 0


def _write_lists(file: Any, names: list[str], single: bool) -> None:
    """Write the lists by which Keras and `transformers` find the datasets."""
    if not single:
        _write_names(file, "layer_names", names)
        return
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split("/")[1], []).append(name)
    _write_names(file, "layer_names", list(groups))
    file.attrs["backend"] = "tensorflow"
    file.attrs["keras_version"] = _KERAS_VERSION
    for group, members in groups.items():
        _write_names(file[group], "weight_names", members)
    _write_names(file.create_group("top_level_model_weights"), "weight_names", [])


def _write_names(where: Any, name: str, names: list[str]) -> None:
    """Write a list of names as an attribute, split where Keras splits it."""
    longest = max((len(text.encode()) for text in names), default=1)
    per_part = ATTRIBUTE_BYTES // longest
    text = h5py().string_dtype("utf-8")
    if len(names) <= per_part:
        where.attrs.create(name, names, shape=(len(names),), dtype=text)
        return
    for number, start in enumerate(range(0, len(names), per_part)):
        part = names[start : start + per_part]
        where.attrs.create(f"{name}{number}", part, shape=(len(part),), dtype=text)
