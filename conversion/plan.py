"""Decide names, layouts and files of a checkpoint that is to be written; nothing is written here."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conversion.canonical import EMBEDDING, HEAD, to_metaseq, to_native
from conversion.dtypes import BY_NUMPY, dtype_name
from conversion.formats import (
    hdf5_file,
    keras_hub_file,
    metaseq_file,
    msgpack_file,
    safetensors_file,
    torch_file,
)
from conversion.metaseq_config import arguments_of
from conversion.tensors import Array, ReadNative, TensorInfo, TensorSpec, contiguous, fetch
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, join_problems
from opt_common.hub import CONFIG_FILE, FORMATS, METASEQ, QUANTIZED, TOKENIZER_FILE, WEIGHT_FILES
from opt_common.native_files import KERAS_HUB
from opt_common.params import ARCHITECTURES, Head, Parameter, Scheme, head_of
from opt_common.quantization import StoredPart

DEFAULT_SHARD_SIZE = "5GB"

TARGETS = (*FORMATS, METASEQ, KERAS_HUB)
"""Every format in which numbers can be written; `QUANTIZED` holds integers."""

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


FORMAT_MODULES: Mapping[str, _Format] = {
    "safetensors": safetensors_file,
    "torch": torch_file,
    "tf": hdf5_file,
    "flax": msgpack_file,
    QUANTIZED: safetensors_file,
    KERAS_HUB: keras_hub_file,
}
_SEPARATORS = {"safetensors": ".", "torch": ".", "tf": "/", "flax": "/", QUANTIZED: "."}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a plan.

    Attributes:
        parameters: the rows of the parameter table that it is made of: one, or the three of a fused projection.
        spec: what the writer is told.
        transposed: whether the native array is the transpose of the canonical one.
        stored_bytes: what it takes in the file.
        window: the part of each parameter that it is made of.
    """

    parameters: tuple[Parameter, ...]
    spec: TensorSpec
    transposed: bool
    stored_bytes: int
    window: tuple[slice, ...] = (slice(None),)

    def build(self, read: ReadParameter) -> Array:
        """The native array."""
        arrays: list[Array] = []
        for parameter in self.parameters:
            array = read(parameter)
            assert array.shape == parameter.shape, (parameter.name, array.shape, parameter.shape)
            arrays.append(array[self.window])
        whole = arrays[0] if len(arrays) == 1 else np.concatenate([fetch(array) for array in arrays])
        native = whole.T if self.transposed else whole
        shape = self.spec.info.shape
        return native if native.shape == shape else contiguous(fetch(native)).reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a checkpoint that is to be written, but the numbers.

    Attributes:
        config: the configuration as it will be written.
        format: one of `TARGETS`, or `QUANTIZED`.
        head: what stands on the decoder, None for nothing.
        shards: the tensors of each weight file.
        files: names of the weight files.
        arguments: metaseq's options of the model; nothing for the other formats.
    """

    config: OPTConfig
    format: str
    head: Head | None
    shards: tuple[tuple[Tensor, ...], ...]
    files: tuple[str, ...]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def index(self) -> str | None:
        """Name of the index of the weight files, where there is one."""
        return WEIGHT_FILES[self.format].index if self.format in WEIGHT_FILES and len(self.files) > 1 else None

    @property
    def key_file(self) -> str:
        """The file without which none of the others is taken for a checkpoint."""
        return self.index or self.files[0]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, one that shares its bytes with another not counted."""
        return sum(tensor.stored_bytes for shard in self.shards for tensor in shard if tensor.spec.shares is None)


def make_plan(
    config: OPTConfig,
    table: Sequence[Parameter],
    dtypes: Mapping[str, np.dtype[Any]],
    *,
    format_name: str,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    bare: bool = False,
    model_parts: int | None = None,
) -> Plan:
    """Decide names, layouts and files of a checkpoint.

    Args:
        config: the model's configuration.
        table: the parameters, from `parameter_table(config, head=…)`; for `QUANTIZED`, from `stored_table`.
        dtypes: floating-point type of each parameter in the file, by canonical name; parts of matrices have their own.
        format_name: one of `TARGETS`, or `QUANTIZED`.
        max_shard_size: longest weight file.
        bare: as for `save_checkpoint`.
        model_parts: as for `save_checkpoint`.

    Raises:
        CheckpointError: for an unknown format, dtype or size, and for parts that the model can't be split into.
    """
    if format_name not in (*TARGETS, QUANTIZED):
        raise CheckpointError(f"format is {format_name!r}, expected one of {', '.join((*TARGETS, QUANTIZED))}.")
    if format_name == QUANTIZED and not any(isinstance(parameter, StoredPart) for parameter in table):
        raise CheckpointError(
            f"format is {QUANTIZED!r}, but the weights are not quantised. Load them with quantization=…, and save that."
        )
    if model_parts is not None and format_name != METASEQ:
        raise CheckpointError(f"Only metaseq has model parts; {format_name} is split by max_shard_size.")
    heads: list[Head] = [head for parameter in table if (head := head_of(parameter.name)) is not None]
    head: Head | None = heads[0] if heads else None
    if head is None and config.tie_word_embeddings and not bare:
        head = "lm"
    limit = parse_size(max_shard_size)
    if format_name == METASEQ:
        if limit != parse_size(DEFAULT_SHARD_SIZE):
            raise CheckpointError("metaseq has no shards of a size; leave max_shard_size and use model_parts.")
        return _metaseq_plan(config, table, dtypes, head=head, model_parts=model_parts)
    if format_name == KERAS_HUB:
        if limit != parse_size(DEFAULT_SHARD_SIZE):
            raise CheckpointError("A preset of KerasHub is written as one file; leave max_shard_size.")
        return _keras_hub_plan(config, table, dtypes, head=head)
    tensors = [_tensor(parameter, dtypes.get(parameter.name), format_name, bare=head is None) for parameter in table]
    shards = _fill_shards(tensors, limit)
    if format_name == "torch" and config.tie_word_embeddings and head == "lm":
        shards = _with_tied_head(shards)
    names = WEIGHT_FILES[format_name]
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


def _tensor(parameter: Parameter, dtype: np.dtype[Any] | None, format_name: str, *, bare: bool) -> Tensor:
    module = FORMAT_MODULES[format_name]
    if isinstance(parameter, StoredPart):
        dtype = parameter.dtype
    else:
        assert dtype is not None, parameter.name
        _check_floating(parameter, dtype)
    transposed = parameter.transposed(module.SCHEME)
    info = TensorInfo(dtype, parameter.shape[::-1] if transposed else parameter.shape)
    name = _SEPARATORS[format_name].join(_segments(to_native(parameter, module.SCHEME, bare=bare), module.SCHEME))
    return Tensor(
        parameters=(parameter,),
        spec=TensorSpec(name=name, info=info),
        transposed=transposed,
        stored_bytes=module.stored_bytes(info),
    )


def _check_floating(parameter: Parameter, dtype: np.dtype[Any]) -> None:
    if dtype not in BY_NUMPY or not BY_NUMPY[dtype].floating:
        raise CheckpointError(f"{parameter.name} has dtype {dtype_name(dtype)}, expected a floating-point type.")


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
            if tensor.parameters[0].name == EMBEDDING:
                spec = TensorSpec(name=HEAD, info=tensor.spec.info, shares=tensor.spec.name)
                result[-1].append(dataclasses.replace(tensor, spec=spec))
    return result


def _metaseq_plan(
    config: OPTConfig,
    table: Sequence[Parameter],
    dtypes: Mapping[str, np.dtype[Any]],
    *,
    head: Head | None,
    model_parts: int | None,
) -> Plan:
    """The plan of a metaseq checkpoint: projections fused, each part with its share."""
    if head not in ("lm", None):
        raise CheckpointError(
            f"metaseq has language models only; it has no place for the head of {ARCHITECTURES[head]}."
        )
    _check_parts(config, model_parts)
    groups: dict[str, list[Parameter]] = {}
    for parameter in table:
        _check_floating(parameter, dtypes[parameter.name])
        groups.setdefault(_fused_name(parameter), []).append(parameter)
    if mixed := [name for name, group in groups.items() if len({dtypes[parameter.name] for parameter in group}) > 1]:
        raise CheckpointError(
            f"metaseq keeps K, V and Q in one tensor, but they have several dtypes here: {', '.join(mixed[:5])}"
            f"{f' and {len(mixed) - 5} more' if len(mixed) > 5 else ''}. Choose one with dtype."
        )
    count = model_parts or 1
    return Plan(
        config=_stored_config(config, set(dtypes.values()), head),
        format=METASEQ,
        head=head,
        shards=tuple(
            tuple(_share(name, group, dtypes[group[0].name], part, count) for name, group in groups.items())
            for part in range(count)
        ),
        files=metaseq_file.file_names(model_parts),
        arguments=arguments_of(config, model_parts),
    )


def _keras_hub_plan(
    config: OPTConfig, table: Sequence[Parameter], dtypes: Mapping[str, np.dtype[Any]], *, head: Head | None
) -> Plan:
    """The plan of a preset of KerasHub.

    Raises:
        CheckpointError: saying everything about the model that KerasHub's architecture can't hold.
    """
    if problems := keras_hub_file.limits(config, head):
        raise CheckpointError(f"KerasHub's OPT can't hold this model. {join_problems(problems)}")
    tensors: list[Tensor] = []
    for parameter in table:
        dtype = dtypes[parameter.name]
        _check_floating(parameter, dtype)
        for native in keras_hub_file.native_tensors(parameter, config):
            info = TensorInfo(dtype, native.shape)
            tensor = Tensor(
                parameters=(parameter,),
                spec=TensorSpec(name=native.path, info=info),
                transposed=parameter.transposed(keras_hub_file.SCHEME),
                stored_bytes=keras_hub_file.stored_bytes(info),
                window=native.window,
            )
            tensors.append(tensor)
    return Plan(
        config=_stored_config(config, set(dtypes.values()), head),
        format=KERAS_HUB,
        head=head,
        shards=(tuple(tensors),),
        files=(keras_hub_file.WEIGHTS,),
    )


def documents_of(plan: Plan, beside: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a checkpoint but its weights and their index.

    Args:
        plan: what is to be written.
        beside: contents of the files that go along with the configuration, under the names that Hugging Face gives
            them.
    """
    if plan.format != KERAS_HUB:
        return {CONFIG_FILE: plan.config.to_json().encode(), **beside}
    assets = keras_hub_file.TOKENIZER_ASSETS
    dtypes = {tensor.spec.info.dtype for shard in plan.shards for tensor in shard}
    described = keras_hub_file.documents(
        plan.config,
        BY_NUMPY[next(iter(dtypes))].name if len(dtypes) == 1 else None,
        sum(tensor.spec.info.size for shard in plan.shards for tensor in shard),
        tokenizer=assets.keys() <= beside.keys(),
    )
    carried = {assets.get(name, name): content for name, content in beside.items() if name != TOKENIZER_FILE}
    return {**carried, **{name: json_bytes(content) for name, content in described.items()}}


def _check_parts(config: OPTConfig, model_parts: int | None) -> None:
    if model_parts is None:
        return
    if model_parts < 1:
        raise CheckpointError(f"model_parts is {model_parts}, expected 1 or more.")
    lengths = {
        "num_attention_heads": config.num_attention_heads,
        "ffn_dim": config.ffn_dim,
        "vocab_size": config.vocab_size,
    }
    problems = [
        f"{name} is {length}, which {model_parts} does not divide; each part has the same share of it."
        for name, length in lengths.items()
        if length % model_parts
    ]
    if problems:
        raise CheckpointError(f"The model can't be split into {model_parts} parts. {join_problems(problems)}")


def _fused_name(parameter: Parameter) -> str:
    """The name in metaseq's files of the tensor that a parameter goes into."""
    *path, module, leaf = to_metaseq(parameter).split(".")
    return ".".join((*path, metaseq_file.FUSED if module in metaseq_file.FUSED_ORDER else module, leaf))


def _share(name: str, group: Sequence[Parameter], dtype: np.dtype[Any], part: int, count: int) -> Tensor:
    """One part's share of a parameter, or of the three that are fused in the order of their rows."""
    order = metaseq_file.FUSED_ORDER
    parameters = group if len(group) == 1 else sorted(group, key=lambda row: order.index(row.name.split(".")[-2]))
    shape = list(parameters[0].shape)
    window = [slice(None)] * len(shape)
    axis = metaseq_file.split_axis(name)
    if axis is not None:
        shape[axis] //= count
        window[axis] = slice(part * shape[axis], (part + 1) * shape[axis])
    shape[0] *= len(parameters)
    info = TensorInfo(dtype, tuple(shape))
    return Tensor(
        parameters=tuple(parameters),
        spec=TensorSpec(name=name, info=info),
        transposed=False,
        stored_bytes=metaseq_file.stored_bytes(info),
        window=tuple(window),
    )


def _stored_config(config: OPTConfig, dtypes: set[np.dtype[Any]], head: Head | None) -> OPTConfig:
    """The configuration with the class that the weights are of, and their dtype where they have a common one."""
    extra = {**config.extra, "architectures": [ARCHITECTURES[head]]}
    dtype = BY_NUMPY[next(iter(dtypes))].name if len(dtypes) == 1 else config.dtype
    return config.replace(extra=extra, dtype=dtype)


def index_content(plan: Plan) -> bytes:
    """The JSON file that says which shard holds which tensor, as Hugging Face's libraries of the format write it."""
    scope = f"{_TF_SCOPES[plan.head]}/" if plan.format == "tf" else ""
    weight_map = {
        scope + tensor.spec.name: file for file, shard in zip(plan.files, plan.shards, strict=True) for tensor in shard
    }
    return json_bytes({"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map})


def json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
