"""Write a checkpoint in any format: planned first, written beside its target, and moved into place when it is whole."""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conversion.canonical import EMBEDDING, HEAD, to_native
from conversion.dtypes import BY_NUMPY, dtype_name, parse_dtype
from conversion.formats import hdf5_file, msgpack_file, safetensors_file, torch_file
from conversion.tensors import Array, ReadNative, TensorInfo, TensorSpec
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError
from opt_common.hub import CONFIG_FILE, FORMATS, GENERATION_CONFIG_FILE
from opt_common.params import ARCHITECTURES, Head, Parameter, Scheme, head_of

DEFAULT_SHARD_SIZE = "5GB"

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_TF_SCOPES: Mapping[Head | None, str] = {
    None: "tfopt_model",
    "lm": "tfopt_for_causal_lm",
    "sequence_classification": "tfopt_for_sequence_classification",
    "question_answering": "tfopt_for_question_answering",
}

ReadParameter = Callable[[Parameter], Array]
"""Gives a parameter in the canonical layout, as an array of any strides and of any floating dtype."""


class _Format(Protocol):
    """What a format module offers to a writer."""

    SCHEME: Scheme

    @staticmethod
    def write(path: Path, tensors: Sequence[TensorSpec], read: ReadNative) -> None: ...

    @staticmethod
    def stored_bytes(info: TensorInfo) -> int: ...


_MODULES: Mapping[str, _Format] = {
    "safetensors": safetensors_file,
    "torch": torch_file,
    "tf": hdf5_file,
    "flax": msgpack_file,
}
_SEPARATORS = {"safetensors": ".", "torch": ".", "tf": "/", "flax": "/"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One parameter of a plan.

    Attributes:
        parameter: its row of the parameter table.
        spec: what the writer is told.
        transposed: whether the native array is the transpose of the canonical one.
        stored_bytes: what it takes in the file.
    """

    parameter: Parameter
    spec: TensorSpec
    transposed: bool
    stored_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a checkpoint that is to be written, but the numbers.

    Attributes:
        config: the configuration as it will be written.
        format: a key of `opt_common.hub.FORMATS`.
        head: what stands on the decoder, None for nothing.
        shards: the tensors of each weight file.
        files: names of the weight files.
    """

    config: OPTConfig
    format: str
    head: Head | None
    shards: tuple[tuple[Tensor, ...], ...]
    files: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, one that shares its bytes with another not counted."""
        return sum(tensor.stored_bytes for shard in self.shards for tensor in shard if tensor.spec.shares is None)


def save_checkpoint(
    directory: str | os.PathLike[str],
    config: OPTConfig,
    table: Sequence[Parameter],
    read: ReadParameter,
    *,
    format: str = "safetensors",  # the word users know from save_pretrained
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    generation_config: Mapping[str, Any] | None = None,
    bare: bool = False,
) -> None:
    """Write a checkpoint that Hugging Face's classes of the format load.

    A directory that does not exist appears whole or not at all. In one that exists, files of the same names are
    replaced; nothing else in it is touched, and while they are replaced it holds no weights that load.

    Args:
        directory: where to; made, with its parents, if it does not exist.
        config: the model's configuration.
        table: the parameters to write, from `parameter_table(config, head=…)`.
        read: gives each parameter; called once for each, in the order of the table.
        format: "safetensors", "torch", "tf" or "flax".
        dtype: floating-point type of the file; None keeps that of each array, which is asked for once more than
            `read` is otherwise called.
        max_shard_size: longest weight file, as bytes or as "5GB", "500MB", "1GiB"; default `DEFAULT_SHARD_SIZE`.
        generation_config: contents of `generation_config.json`, or None for no such file.
        bare: write the names and the class of a decoder without a head. A table without the head of an untied
            configuration always is one.

    Raises:
        CheckpointError: if the directory holds other weights, a number is too large for `dtype`, or an argument makes
            no sense; nothing has been changed then.
        OSError: if the disk is full or not writable; nothing has been changed then.
    """
    stored = None if dtype is None else parse_dtype(dtype).numpy
    dtypes = {parameter.name: stored or read(parameter).dtype for parameter in table}
    limit = max_shard_size if max_shard_size is not None else DEFAULT_SHARD_SIZE
    plan = make_plan(config, table, dtypes, format_name=format, max_shard_size=limit, bare=bare)
    documents = {CONFIG_FILE: plan.config.to_json().encode()}
    if generation_config is not None:
        documents[GENERATION_CONFIG_FILE] = _json(generation_config)
    write_plan(Path(directory), plan, read, documents)


def make_plan(
    config: OPTConfig,
    table: Sequence[Parameter],
    dtypes: Mapping[str, np.dtype[Any]],
    *,
    format_name: str,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    bare: bool = False,
) -> Plan:
    """Decide names, layouts and files of a checkpoint.

    Args:
        config: the model's configuration.
        table: the parameters, from `parameter_table(config, head=…)`.
        dtypes: floating-point type of each parameter in the file, by canonical name.
        format_name: a key of `opt_common.hub.FORMATS`.
        max_shard_size: longest weight file.
        bare: as for `save_checkpoint`.

    Raises:
        CheckpointError: for an unknown format, dtype or size.
    """
    if format_name not in _MODULES:
        raise CheckpointError(f"format is {format_name!r}, expected one of {', '.join(_MODULES)}.")
    heads: list[Head] = [head for parameter in table if (head := head_of(parameter.name)) is not None]
    head: Head | None = heads[0] if heads else None
    if head is None and config.tie_word_embeddings and not bare:
        head = "lm"
    limit = parse_size(max_shard_size)
    tensors = [_tensor(parameter, dtypes[parameter.name], format_name, bare=head is None) for parameter in table]
    shards = _fill_shards(tensors, limit)
    if format_name == "torch" and config.tie_word_embeddings and head == "lm":
        shards = _with_tied_head(shards)
    names = FORMATS[format_name]
    single = len(shards) == 1
    if format_name == "tf" and single:
        shards = [[_with_scope(tensor, head) for tensor in shards[0]]]
    return Plan(
        config=_stored_config(config, set(dtypes.values()), head),
        format=format_name,
        head=head,
        shards=tuple(map(tuple, shards)),
        files=(names.single,) if single else tuple(names.shard(n, len(shards)) for n in range(1, len(shards) + 1)),
    )


def parse_size(size: int | str) -> int:
    """A number of bytes: an integer, or a text such as "5GB" or "500MB" (powers of 1000), "1GiB" (powers of 1024).

    Raises:
        CheckpointError: for anything else, and for sizes below one byte.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})", str(size).strip(), re.ASCII)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise CheckpointError(f"max_shard_size is {size!r}, expected a size such as 5GB, 500MB or 1GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def write_plan(
    directory: Path,
    plan: Plan,
    read: ReadParameter,
    documents: Mapping[str, bytes],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Carry out a plan, atomically as `save_checkpoint` says.

    Args:
        directory: where to.
        plan: what to write.
        read: gives each parameter; called once for each, in the order of the plan.
        documents: further files by name.
        progress: called with the bytes of each tensor that has been written.
    """
    directory = directory.resolve()  # a link to a directory on another disk needs its staging there
    documents = dict(documents)
    if len(plan.files) > 1:
        documents[FORMATS[plan.format].index] = _index(plan)
    check_target(directory, plan.format, {*plan.files, *documents})
    with _staging(directory) as staging:
        for file, shard in zip(plan.files, plan.shards, strict=True):
            _write_shard(staging / file, plan.format, shard, read, progress or (lambda _: None))
        for name, content in documents.items():
            (staging / name).write_bytes(content)
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        _publish(staging, directory, plan.format)


def check_target(directory: Path, format_name: str, names: set[str]) -> None:
    """Make sure that a checkpoint written to `directory` would be the only one in it.

    Raises:
        CheckpointError: if it is no directory, its parent is absent, or it holds weights that would stay beside ours.
    """
    if not directory.exists() and not directory.is_symlink():
        if not directory.absolute().parent.is_dir():
            raise CheckpointError(f"{directory.parent} is no directory. Create it first, or choose another target.")
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} exists and is no directory. Choose another target.")
    others = sorted(
        path.name
        for path in directory.iterdir()
        for files in FORMATS.values()
        if path.name not in names and (path.name in (files.single, files.index) or files.is_shard(path.name))
    )
    if others:
        raise CheckpointError(
            f"{directory} holds other weights, {', '.join(others[:5])}{' …' if len(others) > 5 else ''}; beside "
            f"{format_name} weights nobody could tell which are meant. Remove those files or choose another target."
        )


# Planning


def _tensor(parameter: Parameter, dtype: np.dtype[Any], format_name: str, *, bare: bool) -> Tensor:
    module = _MODULES[format_name]
    if dtype not in BY_NUMPY or not BY_NUMPY[dtype].floating:
        raise CheckpointError(f"{parameter.name} has dtype {dtype_name(dtype)}, expected a floating-point type.")
    transposed = parameter.transposed(module.SCHEME)
    info = TensorInfo(dtype, parameter.shape[::-1] if transposed else parameter.shape)
    name = _SEPARATORS[format_name].join(_segments(to_native(parameter, module.SCHEME, bare=bare), module.SCHEME))
    return Tensor(
        parameter=parameter,
        spec=TensorSpec(name=name, info=info),
        transposed=transposed,
        stored_bytes=module.stored_bytes(info),
    )


def _segments(path: tuple[str, ...], scheme: Scheme) -> tuple[str, ...]:
    """The path as Hugging Face's TF models spell it: a layer is one part, `layers.0`, and a variable ends in `:0`."""
    if scheme != "keras":
        return path
    *module, leaf = path
    joined = re.sub(r"/(\d+)(?=/|$)", r".\1", "/".join(module))
    return (*joined.split("/"), f"{leaf}:0")


def _with_scope(tensor: Tensor, head: Head | None) -> Tensor:
    """A single HDF5 file has the scope of the model in its names; shards do not."""
    name = f"{_TF_SCOPES[head]}/{tensor.spec.name}"
    return dataclasses.replace(tensor, spec=dataclasses.replace(tensor.spec, name=name))


def _fill_shards(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Fill files in order, as huggingface_hub does: a tensor that is too large for any file gets one of its own."""
    shards: list[list[Tensor]] = []
    current: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if tensor.stored_bytes > limit:
            shards.append([tensor])
            continue
        if size + tensor.stored_bytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(tensor)
        size += tensor.stored_bytes
    return [*shards, current] if current else shards


def _with_tied_head(shards: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """PyTorch's files name a tied head too, as a second tensor on the storage of the token table."""
    result: list[list[Tensor]] = []
    for shard in shards:
        result.append(list(shard))
        for tensor in shard:
            if tensor.parameter.name == EMBEDDING:
                spec = TensorSpec(name=HEAD, info=tensor.spec.info, shares=tensor.spec.name)
                result[-1].append(dataclasses.replace(tensor, spec=spec))
    return result


def _stored_config(config: OPTConfig, dtypes: set[np.dtype[Any]], head: Head | None) -> OPTConfig:
    """The configuration with the class that the weights are of, and their dtype where they have a common one."""
    extra = {**config.extra, "architectures": [ARCHITECTURES[head]]}
    dtype = BY_NUMPY[next(iter(dtypes))].name if len(dtypes) == 1 else config.dtype
    return config.replace(extra=extra, dtype=dtype)


def _index(plan: Plan) -> bytes:
    """The JSON file that says which shard holds which tensor, as Hugging Face's libraries of the format write it."""
    scope = f"{_TF_SCOPES[plan.head]}/" if plan.format == "tf" else ""
    weight_map = {
        scope + tensor.spec.name: file for file, shard in zip(plan.files, plan.shards, strict=True) for tensor in shard
    }
    return _json({"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map})


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


# Writing


def _write_shard(
    path: Path, format_name: str, shard: Sequence[Tensor], read: ReadParameter, progress: Callable[[int], None]
) -> None:
    tensors = {tensor.spec.name: tensor for tensor in shard}

    def read_native(name: str) -> Array:
        tensor = tensors[name]
        array = read(tensor.parameter)
        assert array.shape == tensor.parameter.shape, (name, array.shape, tensor.parameter.shape)
        progress(tensor.stored_bytes)
        return array.T if tensor.transposed else array

    _MODULES[format_name].write(path, [tensor.spec for tensor in shard], read_native)


@contextlib.contextmanager
def _staging(directory: Path) -> Generator[Path]:
    """A new directory beside the target, gone afterwards unless it has become the target."""
    staging = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.part"
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, directory: Path, format_name: str) -> None:
    """Move a whole checkpoint to its place."""
    if not directory.exists():
        staging.rename(directory)
        _sync(directory.parent)
        return
    # Whatever makes the directory a checkpoint goes first and comes last, so that an interruption in between leaves
    # one without weights, never a mixture of old and new ones.
    files = FORMATS[format_name]
    new = sorted(path.name for path in staging.iterdir())
    last = files.index if files.index in new else files.single
    (directory / last).unlink(missing_ok=True)
    _sync(directory)
    for name in [*(name for name in new if name != last), last]:
        (staging / name).replace(directory / name)
    _sync(directory)


def _sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no way to ask for it
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
