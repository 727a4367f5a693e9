"""metaseq's files, in which OPT was first published: a state dict among the arguments and the state of its training.

A checkpoint is one file (`restored.pt`, `reshard.pt`, `consolidated.pt`), or one for each model-parallel part
(`reshard-model_part-0.pt`), or several shards of flattened parameters for each part (`…-model_part-0-shard0.pt`).
`MetaseqReader` makes one state dict of them, by three rules of the layout:

- `qkv_proj` is the rows of K, V and Q, in this order; in a part, the part's rows of each of the three.
- Of `COLUMNS` each part has some rows (weights and biases alike), of the weights of `ROWS` some columns. Of everything
  else each part has a copy.
- `flat_param_N` of a shard is a piece of several parameters laid end to end, with padding behind it.

The names that it gives are metaseq's own, with the projections apart, as its singleton files have them.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from conversion.dtypes import BY_NUMPY
from conversion.formats import torch_file
from conversion.formats.torch_file import TorchFile
from conversion.formats.torch_pickle import Inert, StoredTensor
from conversion.tensors import (
    Array,
    ReadNative,
    TensorInfo,
    TensorSpec,
    fetch,
    fill,
    frozen,
    is_length,
    is_shape,
    joined,
)
from opt_common.errors import CheckpointError, join_problems
from opt_common.hub import MetaseqName, metaseq_files
from opt_common.params import Scheme

SCHEME: Scheme = "torch"

FUSED = "qkv_proj"
FUSED_ORDER = ("k_proj", "v_proj", "q_proj")
"""What `qkv_proj` is made of, from the first row to the last."""

COLUMNS = ("embed_tokens", "output_projection", FUSED, *FUSED_ORDER, "fc1")
"""Modules of whose weights and biases each model-parallel part has some rows."""

ROWS = ("out_proj", "fc2")
"""Modules of whose weights each part has some columns; their biases are whole in each part."""

VERSION = "decoder.version"
_VERSION_NUMBER = 3.0

SINGLETON = "restored.pt"
_PART = "reshard-model_part-{}.pt"

_COPIES_TOLERANCE = 1e-3
"""By how much copies may differ, relative to the largest number in them: the parts of a training run round apart."""
_COPIES_STEPS = 4
"""The same in steps of the dtype, where those are longer."""

_LONGEST_TEXT = 1000  # of an option that is looked at

_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_fpw_module)\.")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor that can be read."""

    info: TensorInfo
    read: Callable[[], Array]


_Tensors = dict[str, _Tensor]


class MetaseqReader:
    """The open files of one metaseq checkpoint.

    Attributes:
        scheme: "torch".
        tensors: every tensor by metaseq's name for it, projections apart and parts put together.
        arguments: what the model was built with, by metaseq's names of the options; plain values only.
        parts: number of model-parallel parts.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.scheme: Scheme = SCHEME
        self._files: list[TorchFile] = []
        try:
            parts = [[self._open(path) for path in shards] for shards in _arranged(files)]
            tensors = [_apart(_from_shards(shards)) for shards in parts]
            self._tensors = _together(tensors, files[0].parent)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {name: tensor.info for name, tensor in self._tensors.items()}
        self.arguments: Mapping[str, Any] = _arguments(parts[0][0].content)
        self.parts = len(parts)

    def read(self, name: str) -> Array:
        """The array of a name: read-only; a view of the mapped file where it is in one piece there."""
        return self._tensors[name].read()

    def close(self) -> None:
        """Let go of the files. Arrays that were read stay valid."""
        while self._files:
            self._files.pop().close()

    def _open(self, path: Path) -> TorchFile:
        file = TorchFile(path, inert=True)
        self._files.append(file)
        if not is_metaseq(file.content):
            raise CheckpointError(
                f"{path} has no state dict named 'model', as files of metaseq have. Name a weight file of metaseq."
            )
        return file


def open_reader(path: Path) -> MetaseqReader:
    """Open one file as a whole checkpoint.

    Raises:
        CheckpointError: for anything but a file of metaseq.
    """
    return MetaseqReader([path])


def is_metaseq(content: object) -> bool:
    """Whether the object that a PyTorch file holds is a checkpoint of metaseq."""
    return isinstance(content, dict) and isinstance(cast("dict[str, Any]", content).get("model"), dict)


def with_siblings(path: Path) -> tuple[Path, ...] | None:
    """All files of the checkpoint that a file named by a user belongs to; None if it is not metaseq's.

    Raises:
        CheckpointError: if the file can't be read.
    """
    name = MetaseqName.parse(path.name)
    if name is not None and (name.part is not None or name.shard is not None):
        # Files of another stem are another checkpoint.
        names = (file.name for file in path.parent.iterdir() if file.is_file())
        own = [file for file in names if (other := MetaseqName.parse(file)) is not None and other.stem == name.stem]
        return tuple(path.parent / file for file in metaseq_files(own, str(path.parent)))
    file = TorchFile(path, inert=True)
    try:
        return (path,) if is_metaseq(file.content) else None
    finally:
        file.close()


def stored_bytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes in a file."""
    return info.nbytes


def file_names(parts: int | None) -> tuple[str, ...]:
    """Names of the files of a checkpoint in so many parts; None means one file without a number."""
    return (SINGLETON,) if parts is None else tuple(_PART.format(part) for part in range(parts))


def split_axis(name: str) -> int | None:
    """The axis along which the parts share a tensor, None for one of which each has a copy."""
    _, module, leaf = _place(name)
    if module in COLUMNS:
        return 0
    return 1 if module in ROWS and leaf == "weight" else None


def write(path: Path, tensors: Sequence[TensorSpec], read: ReadNative, arguments: Mapping[str, Any]) -> None:
    """Write one file, one tensor at a time; the same tensors give the same bytes.

    Args:
        path: the new file.
        tensors: what to write.
        read: gives the array of a name; it is called once for each, in order.
        arguments: what the model is built with, by metaseq's names of the options.
    """
    version = np.array([_VERSION_NUMBER], np.float32)

    def around(state: dict[str, Any]) -> dict[str, Any]:
        return {
            "cfg": {"model": dict(arguments)},
            "args": None,
            "model": state,
            "extra_state": {},
            "optimizer_history": [],
        }

    specs = [*tensors, TensorSpec(name=VERSION, info=TensorInfo(version.dtype, version.shape))]
    torch_file.write(path, specs, lambda name: version if name == VERSION else read(name), around)


# Files


def _arranged(files: Sequence[Path]) -> list[list[Path]]:
    """The files by part and shard.

    Raises:
        CheckpointError: naming the files that are missing between others.
    """
    if len(files) == 1 and MetaseqName.parse(files[0].name) is None:
        return [list(files)]
    numbered: dict[tuple[int, int], Path] = {}
    for path in files:
        name = MetaseqName.parse(path.name)
        assert name is not None, path
        key = (name.part or 0, name.shard or 0)
        if key in numbered:
            raise CheckpointError(f"{path} and {numbered[key].name} are both the same part. Remove one of them.")
        numbered[key] = path
    parts = max(part for part, _ in numbered) + 1
    shards = max(shard for _, shard in numbered) + 1
    wanted = [(part, shard) for part in range(parts) for shard in range(shards)]
    if missing := [key for key in wanted if key not in numbered]:
        some = ", ".join(f"part {part}" + (f" shard {shard}" if shards > 1 else "") for part, shard in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"{files[0].parent} lacks {some}{more} of its metaseq checkpoint. Fetch those files.")
    return [[numbered[part, shard] for shard in range(shards)] for part in range(parts)]


def _stored(file: TorchFile) -> dict[str, StoredTensor]:
    """The state dict of a file."""
    model = cast("dict[Any, Any]", file.content["model"])
    if others := [str(name) for name, value in model.items() if not isinstance(value, StoredTensor)]:
        raise CheckpointError(
            f"{file.path} has things in its state dict that are no tensors: {', '.join(others[:5])}. "
            f"Don't trust this file, or save it again."
        )
    for tensor in model.values():
        file.check(tensor)
    return {str(name): tensor for name, tensor in model.items()}


def _tensor(file: TorchFile, stored: StoredTensor) -> _Tensor:
    return _Tensor(stored.info, lambda: file.read(stored))


def _arguments(content: dict[str, Any]) -> dict[str, Any]:
    """The plain values of the arguments; `cfg` is what newer files have, `args` what older ones have."""
    found: dict[str, Any] = {}
    for holder in (content.get("args"), content.get("cfg"), _items(content.get("cfg")).get("model")):
        for name, value in _items(holder).items():
            # omegaconf wraps a value in a node.
            plain = _items(value).get("_val") if isinstance(value, Inert) else value
            if isinstance(plain, float) or _is_usual(plain):
                found[str(name)] = plain
    return found


def _is_usual(plain: object) -> bool:
    """Whether a value is a text or an integer as options are; a number of a million digits is none."""
    if isinstance(plain, str):
        return len(plain) <= _LONGEST_TEXT and plain.isprintable()
    return isinstance(plain, int) and abs(plain) < 1 << 62


def _items(holder: object) -> dict[Any, Any]:
    """The items of a dict, a namespace or a container of omegaconf; none for anything else."""
    if isinstance(holder, Inert):
        state = holder.state
        # With slots, an object's state is a pair of which the first is the dict.
        for part in cast("tuple[Any, ...]", state) if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                inside = cast("dict[Any, Any]", part)
                content = inside.get("_content")
                return cast("dict[Any, Any]", content) if isinstance(content, dict) else inside
        return holder.items
    return cast("dict[Any, Any]", holder) if isinstance(holder, dict) else {}


# Shards of flattened parameters


def _from_shards(files: Sequence[TorchFile]) -> _Tensors:
    """The tensors of one part, of which each file holds a shard; a part in one file may also be not flattened."""
    shards = [_stored(file) for file in files]
    flat = [name for name in shards[0] if name.rpartition(".")[2].startswith("flat_param_")]
    if len(files) > 1 and not flat:
        raise CheckpointError(
            f"{files[0].path} has no flattened parameters, as a shard has. If it is none, give it another name."
        )
    whole = {name: _tensor(files[0], tensor) for name, tensor in shards[0].items() if name not in flat}
    for name in flat:
        if any(name not in shard for shard in shards):
            raise CheckpointError(f"{name} is not in every shard of {files[0].path}. Fetch the checkpoint again.")
        pieces = [_unpadded(file, name, shard[name]) for file, shard in zip(files, shards, strict=True)]
        inner = _unflattened(files[0], name, pieces)
        if twice := sorted(whole.keys() & inner.keys()):
            raise CheckpointError(f"{files[0].path} has {', '.join(twice[:5])} twice. Fetch the checkpoint again.")
        whole |= inner
    return whole


def _metadata(file: TorchFile, name: str) -> dict[Any, Any]:
    """What a shard says of one flattened parameter: names, shapes, numels and padding.

    Raises:
        CheckpointError: if it says nothing, or nonsense.
    """
    module, _, leaf = name.rpartition(".")
    entries = _items(file.content.get("shard_metadata")).get("param_metadata")
    for entry in cast("list[Any]", entries) if isinstance(entries, list) else ():
        if _items(entry).get("fsdp_path") == module:
            found = _items(_items(_items(entry).get("params")).get(leaf))
            names, shapes, numels = (found.get(key) for key in ("names", "shapes", "numels"))
            sound = (
                isinstance(names, list | tuple)
                and isinstance(shapes, list | tuple)
                and isinstance(numels, list | tuple)
                and all(isinstance(text, str) for text in cast("list[Any]", names))
                and all(map(is_shape, cast("list[Any]", shapes)))
                and [math.prod(shape) for shape in cast("list[Any]", shapes)] == list(cast("list[Any]", numels))
                and len(cast("list[Any]", names)) == len(cast("list[Any]", shapes))
                and is_length(found.get("padding", 0))
            )
            if sound:
                return found
    raise CheckpointError(
        f"{file.path}: shard_metadata does not say of what {name} is made. "
        f"Fetch the file again, or save the checkpoint with unflattened weights."
    )


def _unpadded(file: TorchFile, name: str, stored: StoredTensor) -> _Tensor:
    """A shard of a flattened parameter without the padding at its end."""
    size = stored.info.size - _metadata(file, name).get("padding", 0)
    if len(stored.shape) != 1 or size < 0:
        raise CheckpointError(f"{file.path}: {name} of shape {list(stored.shape)} does not fit its padding.")
    return _Tensor(TensorInfo(stored.info.dtype, (size,)), lambda: file.read(stored)[:size])


def _unflattened(file: TorchFile, name: str, pieces: Sequence[_Tensor]) -> _Tensors:
    """The parameters that lie end to end in the shards of one flattened parameter."""
    metadata = _metadata(file, name)
    total, held = sum(metadata["numels"]), sum(piece.info.size for piece in pieces)
    if total != held:
        raise CheckpointError(
            f"The {len(pieces)} shards of {name} in {file.path.parent} hold {held} numbers of {total}; "
            f"a shard is missing. Fetch all shards."
        )
    if len({piece.info.dtype for piece in pieces}) > 1:
        raise CheckpointError(f"The shards of {name} in {file.path.parent} have several dtypes. Fetch them again.")
    module = name.rpartition(".")[0]
    result: _Tensors = {}
    start = 0
    for inner, shape in zip(metadata["names"], metadata["shapes"], strict=True):
        info = TensorInfo(pieces[0].info.dtype, tuple(shape))
        full = _WRAPPERS.sub("", f"{module}.{inner}" if module else inner)
        result[full] = _Tensor(info, _window(pieces, start, info))
        start += info.size
    return result


def _window(pieces: Sequence[_Tensor], start: int, info: TensorInfo) -> Callable[[], Array]:
    """How to read a tensor that lies in several flat pieces, from element `start` on."""

    def read() -> Array:
        found: list[Array] = []
        offset = 0
        for piece in pieces:
            first, last = max(start - offset, 0), min(start + info.size - offset, piece.info.size)
            if first < last:
                found.append(piece.read()[first:last])
            offset += piece.info.size
        whole = found[0] if len(found) == 1 else joined(found, info.dtype)
        return frozen(whole.reshape(info.shape))

    return read


# Projections apart, parts together


def _apart(tensors: _Tensors) -> _Tensors:
    """The tensors with K, V and Q each under a name of its own."""
    result: _Tensors = {}
    for name, tensor in tensors.items():
        path, module, leaf = _place(name)
        if module != FUSED:
            result[name] = tensor
            continue
        rows, *rest = tensor.info.shape or (1,)
        if rows % len(FUSED_ORDER):
            raise CheckpointError(f"{name} has {rows} rows, expected K, V and Q of one length. Fetch the file again.")
        third = rows // len(FUSED_ORDER)
        for index, projection in enumerate(FUSED_ORDER):
            single = f"{path}.{projection}.{leaf}"
            if single in tensors:
                raise CheckpointError(f"The checkpoint has both {name} and {single}; remove one of them.")
            result[single] = _Tensor(TensorInfo(tensor.info.dtype, (third, *rest)), _rows(tensor, index * third, third))
    return result


def _place(name: str) -> tuple[str, str, str]:
    """A name in three: what is around the module, the module, the tensor in it."""
    path, _, leaf = name.rpartition(".")
    path, _, module = path.rpartition(".")
    return path, module, leaf


def _rows(tensor: _Tensor, start: int, count: int) -> Callable[[], Array]:
    return lambda: tensor.read()[start : start + count]


def _together(parts: Sequence[_Tensors], directory: Path) -> _Tensors:
    """One set of tensors from those of all parts.

    Raises:
        CheckpointError: naming every tensor that the parts do not hold alike.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    problems: list[str] = []
    for number, part in enumerate(parts):
        odd = [name for name in {**first, **part} if (name in first) != (name in part)]
        odd += [name for name in first if name in part and part[name].info != first[name].info]
        problems += [f"{name} is not the same kind of tensor in part {number} as in part 0." for name in odd]
    if not problems:
        problems += [
            f"{name}, of which each part has a copy, is not the same in part {number} as in part 0."
            for name in first
            if split_axis(name) is None
            for number, part in enumerate(parts[1:], 1)
            if not _is_copy(name, number, first[name], part[name])
        ]
    if problems:
        raise CheckpointError(
            f"The {len(parts)} model-parallel parts in {directory} do not belong together. {join_problems(problems)}"
        )
    result = {name: _joined([part[name] for part in parts], split_axis(name)) for name in first}
    _check_complete(result, len(parts), directory)
    return result


def _is_copy(name: str, number: int, a: _Tensor, b: _Tensor) -> bool:
    """Whether two copies are the same; those that differ by rounding only are taken for the same, with a warning."""
    one, other = np.ascontiguousarray(fetch(a.read())), np.ascontiguousarray(fetch(b.read()))
    if np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8)):
        return True
    if not BY_NUMPY[a.info.dtype].floating:
        return False
    with np.errstate(invalid="ignore"):  # of NaNs; copies that hold any are no copies
        wide, other_wide = one.astype(np.float64), other.astype(np.float64)
        difference = float(np.abs(wide - other_wide).max(initial=0.0))
    step = 2.0 ** -_fraction_bits(a.info.dtype)
    if not difference <= max(_COPIES_TOLERANCE, _COPIES_STEPS * step) * float(np.abs(wide).max()):
        return False
    warnings.warn(
        f"{name} differs by up to {difference:.2g} between model-parallel parts 0 and {number}; part 0 is used.",
        stacklevel=2,
    )
    return True


def _fraction_bits(dtype: np.dtype[Any]) -> int:
    """Number of bits behind the binary point in a floating-point type."""
    return {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[dtype.name]


def _joined(pieces: Sequence[_Tensor], axis: int | None) -> _Tensor:
    """A tensor from those of all parts, which are read one after the other when it is."""
    info = pieces[0].info
    if axis is None or axis >= len(info.shape):
        return pieces[0]
    length = info.shape[axis]
    shape = (*info.shape[:axis], length * len(pieces), *info.shape[axis + 1 :])

    def read() -> Array:
        whole = np.empty(shape, info.dtype)
        for index, piece in enumerate(pieces):
            window = [slice(None)] * len(shape)
            window[axis] = slice(index * length, (index + 1) * length)
            fill(whole[tuple(window)], piece.read())
        return frozen(whole)

    return _Tensor(TensorInfo(info.dtype, shape), read)


def _check_complete(tensors: _Tensors, parts: int, directory: Path) -> None:
    """`out_proj` has as many columns in all parts together as it has rows in each; else there are more parts."""
    for name, tensor in tensors.items():
        if name.endswith("out_proj.weight") and len(tensor.info.shape) == 2:
            rows, columns = tensor.info.shape
            if rows != columns:
                raise CheckpointError(
                    f"The {parts} model-parallel parts in {directory} hold {columns} columns of {name}, expected "
                    f"{rows}; a part is missing or from another checkpoint. Fetch all parts."
                )
