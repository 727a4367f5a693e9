"""A checkpoint that Orbax saved of a Flax NNX state, read without JAX and without Orbax.

Orbax describes the tree in `_METADATA` and keeps each array as a compressed Zarr array, all of them in one database
(OCDBT) or each in a directory. Both are read by `tensorstore`, which Flax brings along; it is imported when such a
checkpoint is met. A state is a tree of modules and of variables, which may be wrapped once more as `value`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from conversion.dtypes import BY_NAME
from conversion.tensors import Array, TensorInfo, damaged, is_shape
from opt_common.errors import CheckpointError
from opt_common.native_files import read_json
from opt_common.params import Scheme

SCHEME: Scheme = "nnx"

DROPPED_KEYS = {"rngs": "the state of a random generator; not a weight"}
"""Branches of the tree that are left out on purpose, and why."""

_TREE = "_METADATA"
_WRAPPER = "value"
_KEY = re.compile(r"\w[\w-]*", re.ASCII)
_MAX_ARRAYS = 100_000
# Weights hardly shrink when they are compressed; arrays that claim far more than the directory holds are not weights.
_MAX_RATIO, _ALWAYS_ALLOWED_BYTES = 100, 1 << 20


class OrbaxReader:
    """An open checkpoint; `read` gets one array at a time from the disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.scheme: Scheme = SCHEME
        self._arrays: dict[str, Any] = {}
        described = read_json(directory / _TREE)
        tensors: dict[str, TensorInfo] = {}
        for keys in _keys(directory, described.get("tree_metadata")):
            name = "/".join(keys[:-1] if keys[-1] == _WRAPPER else keys)
            if name in tensors:
                raise damaged(directory / _TREE, f"{name} is there twice")
            array = _open(directory, ".".join(keys), described)
            tensors[name] = _info(directory, name, array)
            self._arrays[name] = array
        held = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        claimed = sum(info.nbytes for info in tensors.values())
        if claimed > _ALWAYS_ALLOWED_BYTES + _MAX_RATIO * held:
            raise damaged(directory, f"its arrays claim {claimed} bytes, but its files have {held}")
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, name: str) -> Array:
        try:
            array = cast("Array", np.asarray(self._arrays[name].read().result()))
        except (ValueError, OSError, MemoryError) as error:
            raise damaged(self._directory, f"{name} can't be read ({_first_line(error)})") from None
        array.flags.writeable = False
        return array

    def close(self) -> None:
        self._arrays.clear()


def open_reader(path: Path) -> OrbaxReader:
    """Open a directory, and compare what its arrays claim with the bytes that are there.

    Raises:
        CheckpointError: if it is no checkpoint of Orbax, its arrays are none that a model can have, or `tensorstore`
            is not installed.
    """
    return OrbaxReader(path)


def _keys(directory: Path, tree: Any) -> Iterator[tuple[str, ...]]:
    """The keys on the way to each array."""
    if not isinstance(tree, dict) or len(cast("dict[str, Any]", tree)) > _MAX_ARRAYS:
        raise damaged(directory / _TREE, "it describes no tree of arrays")
    for entry in cast("dict[str, Any]", tree).values():
        path: Any = cast("dict[str, Any]", entry).get("key_metadata") if isinstance(entry, dict) else None
        parts = cast("list[Any]", path) if isinstance(path, list) else [None]
        keys = tuple(str(cast("dict[str, Any]", part).get("key")) if isinstance(part, dict) else "" for part in parts)
        # The names of files are made of these: nothing in them may lead out of the directory.
        if bad := [key for key in keys if not _KEY.fullmatch(key)]:
            raise damaged(directory / _TREE, f"it names a branch {bad[0]!r:.80}")
        if not DROPPED_KEYS.keys() & set(keys):
            yield keys


def _open(directory: Path, name: str, described: Mapping[str, Any]) -> Any:
    """The array of a name, opened by `tensorstore`, which comes without types."""
    try:
        import tensorstore  # pyright: ignore[reportMissingTypeStubs, reportMissingImports]
    except ImportError:
        raise CheckpointError(
            f"{directory} is a checkpoint of Orbax, which takes tensorstore to read. Install it: "
            f"pip install 'opt-models[orbax]'."
        ) from None
    place = str(directory.resolve())
    if described.get("use_ocdbt"):
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{place}/"}, "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{place}/{name}/"}
    driver = "zarr3" if described.get("use_zarr3") else "zarr"
    module = cast("Any", tensorstore)
    try:
        return module.open({"driver": driver, "kvstore": store}, read=True, open=True).result()
    except (ValueError, OSError) as error:
        raise damaged(directory, f"the array {name} can't be opened ({_first_line(error)})") from None


def _info(directory: Path, name: str, array: Any) -> TensorInfo:
    """Dtype and shape of an array whose numbers can be had without taking much more memory than they have bytes."""
    shape, dtype = tuple(map(int, array.shape)), str(array.dtype.name)
    chunk = cast("tuple[int, ...]", tuple(array.chunk_layout.read_chunk.shape or ()))
    if not is_shape(shape) or dtype not in BY_NAME or tuple(array.domain.origin) != (0,) * len(shape):
        raise damaged(directory, f"the array {name} of dtype {dtype!r} and shape {list(shape)} is no weight")
    if math.prod(chunk) > 2 * math.prod(shape):
        raise damaged(directory, f"the array {name} of shape {list(shape)} is stored in pieces of {list(chunk)}")
    return TensorInfo(BY_NAME[dtype].numpy, shape)


def _first_line(error: Exception) -> str:
    return str(error).partition(" [")[0].splitlines()[0][:200] if str(error) else type(error).__name__
