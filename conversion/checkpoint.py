"""Open a checkpoint of any format and read it under canonical names, tensor by tensor.

with open_checkpoint("opt-125m") as checkpoint:
    checked_parameters(checkpoint, parameter_table(checkpoint.config))
    weight = checkpoint.read("model.decoder.layers.0.fc1.weight")
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from conversion.canonical import BLIP_2, BLIP_2_PARTS, EMBEDDING, HEAD, canonical_names, is_of_blip_2
from conversion.dtypes import BY_NUMPY
from conversion.formats import (
    hdf5_file,
    keras_file,
    keras_hub_file,
    metaseq_file,
    msgpack_file,
    orbax_file,
    safetensors_file,
    torch_file,
)
from conversion.identity import identities
from conversion.metaseq_config import config_of
from conversion.tensors import Array, FileRows, Reader, TensorInfo, borrowed, fetch, frozen
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError, join_problems
from opt_common.hub import CONFIG_FILE, METASEQ, QUANTIZED, find_weights, read_index, states_its_config
from opt_common.links import refuse_links_outside
from opt_common.native_files import (
    KERAS,
    KERAS_ARCHIVE,
    KERAS_HUB,
    KERAS_INDEX,
    KERAS_WEIGHTS,
    ORBAX,
    home_of,
    is_keras_hub,
    keras_files,
    orbax_directory,
)
from opt_common.params import ARCHITECTURES, Head, Parameter, Scheme, head_of
from opt_common.quantization import check_parts, dequantize, recognise_parts, split_part, storage_of

READERS: Mapping[str, Callable[[Path], Reader]] = {
    "safetensors": safetensors_file.open_reader,
    "torch": torch_file.open_reader,
    "tf": hdf5_file.open_reader,
    "flax": msgpack_file.open_reader,
    QUANTIZED: safetensors_file.open_reader,
    KERAS: keras_file.open_reader,
    KERAS_HUB: keras_hub_file.open_reader,
    ORBAX: orbax_file.open_reader,
}
"""How to open one file of each format but metaseq, whose files are opened all at once."""

_FORMAT_OF_SUFFIX = {
    ".safetensors": "safetensors",
    ".bin": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".h5": "tf",
    ".msgpack": "flax",
}
_COMPARED_ELEMENTS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint as it is in the files: its canonical name, that of the file, dtype and shape."""

    name: str
    native_name: str
    info: TensorInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rounded:
    """A quantised matrix: how it is stored, its shape, and the readers of its parts with the names there, in order."""

    storage: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, Reader, str], ...]

    def read(self) -> list[Array]:
        return [reader.read(native) for _, reader, native in self.parts]


class Checkpoint:
    """An open checkpoint: one file or all shards, under canonical names. Close it, or use it in a `with` statement.

    Attributes:
        config: the configuration of the model.
        format: "safetensors", "torch", "tf", "flax", "quantized", "metaseq", "keras", "keras-hub" or "orbax".
        files: the weight files; for Orbax the directory.
        identities: what the file system noted of them before they were opened.
        names: canonical names of all tensors, in the order of the files. A tensor that the package knows nothing about
            keeps its native name.
        head: what stands on the decoder, by the class in the configuration, or else by the tensors.
        left_out: native names of the tensors of a BLIP-2 checkpoint that are not its language model's.

    A quantised matrix has one name, as any other; `read`, `info` and the like give the numbers that its integers stand
    for, in float32, and `stored` gives the integers.
    """

    def __init__(self, config: OPTConfig | None, format_name: str, files: tuple[Path, ...]) -> None:
        """Open the files; without a configuration, it is that which they state themselves."""
        self.format = format_name
        self.files = files
        self.identities = identities(files)
        self._readers: list[Reader] = []
        self._tensors: dict[str, tuple[Reader, str, bool]] = {}
        self._rounded: dict[str, _Rounded] = {}
        try:
            if format_name == METASEQ:
                reader = metaseq_file.MetaseqReader(files)
                self._add(files[0], reader)
                config = config or config_of(reader.tensors, reader.arguments, str(files[0]))
            else:
                for path in files:
                    reader = READERS[format_name](path)
                    self._add(path, reader)
                    if isinstance(reader, keras_file.KerasReader | keras_hub_file.KerasHubReader):
                        config = config or reader.config
            # Only weights that state it themselves are opened without one.
            config = config or _config_beside(files[0])
            self.config: OPTConfig = config
            self._gather_parts()
            self._check_layers()
            self.left_out = self._leave_out()
            self._settle_head()
        except BaseException:
            self.close()
            raise

    @property
    def scheme(self) -> Scheme:
        """Whose leaf names and layouts the files have."""
        return self._readers[0].scheme

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def head(self) -> Head | None:
        architectures: Any = self.config.extra.get("architectures")
        for name in cast("list[Any]", architectures) if isinstance(architectures, list) else []:
            for head, architecture in ARCHITECTURES.items():
                if str(name).endswith(architecture):
                    return head
        heads: list[Head] = [head for name in self.names if (head := head_of(name)) is not None]
        return heads[0] if heads else "lm"

    @property
    def storage(self) -> str | None:
        """How the matrices are stored: "int8" or "int4" for quantised ones, else None."""
        storages = {rounded.storage for rounded in self._rounded.values()}
        # The token table of any is in 8 bits.
        return "int4" if "int4" in storages else next(iter(storages), None)

    def storage_of(self, name: str) -> str | None:
        """The same of one tensor."""
        return self._rounded[name].storage if name in self._rounded else None

    def stored(self, name: str) -> list[Array]:
        """The parts of a quantised matrix, in the order of `opt_common.quantization.stored_parts`, in their own memory.

        Raises:
            CheckpointError: if a scale is no number.
        """
        parts = [fetch(part) for part in self._rounded[name].read()]
        check_parts(name, parts)
        return parts

    def stored_part(self, name: str, index: int) -> Array:
        """One part of a quantised matrix as `read` gives any tensor."""
        _, reader, native = self._rounded[name].parts[index]
        return reader.read(native)

    def stored_tensors(self) -> tuple[StoredTensor, ...]:
        """Every tensor as it is in the files, in their order: of a quantised matrix its parts."""
        found: list[StoredTensor] = []
        for name in self.names:
            if name in self._rounded:
                parts = self._rounded[name].parts
                found += [
                    StoredTensor(name=f"{name}.{part}", native_name=native, info=reader.tensors[native])
                    for part, reader, native in parts
                ]
            else:
                found.append(StoredTensor(name=name, native_name=self.native_name(name), info=self.info(name)))
        return tuple(found)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor in the canonical layout, without reading it."""
        if name in self._rounded:
            return TensorInfo(np.dtype(np.float32), self._rounded[name].shape)
        reader, native, transposed = self._tensors[name]
        info = reader.tensors[native]
        return TensorInfo(info.dtype, info.shape[::-1]) if transposed else info

    def native_name(self, name: str) -> str:
        """What the file calls a tensor; of a quantised matrix, its integers."""
        return self._tensors[name][1]

    def read(self, name: str) -> Array:
        """A tensor in the canonical layout and the stored dtype.

        The array is read-only and may be a view, of any strides, of the mapped file; it stays valid after `close`.
        """
        if name in self._rounded:
            rounded = self._rounded[name]
            return frozen(dequantize([FileRows(part) for part in rounded.read()], rounded.shape))
        reader, native, transposed = self._tensors[name]
        array = reader.read(native)
        return array.T if transposed else array

    def load(self, name: str) -> Array:
        """As `read`, in memory of its own: what is touched of a mapped file counts as memory as long as it is open."""
        return fetch(self.read(name))

    def borrow(self, name: str) -> Array:
        """As `read`, writable; where possible in the pages of the file, which stay as they are."""
        return borrowed(self.read(name))

    def rows(self, name: str) -> FileRows:
        """A matrix as `load` gives it, but a few rows at a time, so that no memory is needed for all of it."""
        return FileRows(self.read(name))

    def close(self) -> None:
        """Let go of the files."""
        while self._readers:
            self._readers.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, path: Path, reader: Reader) -> None:
        self._readers.append(reader)
        if odd := [native for native in reader.tensors if not native.isprintable()]:
            raise CheckpointError(f"{path} has a tensor named {odd[0]!a:.200}. Don't trust this file.")
        for name, (native, transposed) in canonical_names(reader.tensors, reader.scheme).items():
            if name in self._tensors:
                raise CheckpointError(f"{path} and another shard both hold {name}. Fetch the checkpoint again.")
            # Only matrices are transposed; a tensor of another rank under that name is reported with its own shape.
            flip = transposed and len(reader.tensors[native].shape) == 2
            self._tensors[name] = (reader, native, flip)

    def _gather_parts(self) -> None:
        """Put the parts of each quantised matrix together, under its name."""
        found: dict[str, dict[str, str]] = {}
        for name in self._tensors:
            whole, part = split_part(name)
            if part is not None:
                found.setdefault(whole, {})[part] = name
        if not found:
            return
        if both := [whole for whole in found if whole in self._tensors]:
            raise CheckpointError(f"{both[0]} is there twice, quantised and not. Fetch the checkpoint again.")
        for whole, names in found.items():
            infos = {part: self.info(name) for part, name in names.items()}
            described = {part: (info.dtype, info.shape) for part, info in infos.items()}
            storage, shape, parts = recognise_parts(whole, described)
            places = tuple((part, *self._tensors[names[part]][:2]) for part in parts)
            self._rounded[whole] = _Rounded(storage=storage, shape=shape, parts=places)
        gathered: dict[str, tuple[Reader, str, bool]] = {}
        for name, place in self._tensors.items():
            whole, part = split_part(name)
            gathered[whole] = place if part is None else (*self._rounded[whole].parts[0][1:], False)
        self._tensors = gathered
        self.format = QUANTIZED

    def _leave_out(self) -> tuple[str, ...]:
        """Take out what BLIP-2 has around its language model. Where there is no such, those names are just unknown."""
        natives = {name: self.native_name(name) for name in self.names}
        if not any(is_of_blip_2(native, (BLIP_2,)) for native in natives.values()):
            return ()
        others = {name: native for name, native in natives.items() if is_of_blip_2(native, BLIP_2_PARTS)}
        for name in others:
            del self._tensors[name]
        return tuple(others.values())

    def _check_layers(self) -> None:
        """A table of parameters is made for each layer: a number in a file alone must not take memory."""
        layers, held = self.config.num_hidden_layers, len(self._tensors)
        if layers > held:
            raise CheckpointError(
                f"{CONFIG_FILE} says num_hidden_layers {layers}, but the weights in {self.files[0].parent} are "
                f"{held} tensors. Fetch the checkpoint again."
            )

    def _settle_head(self) -> None:
        """A tied model has one tensor for token table and head, under whichever name; only the first is canonical."""
        if not self.config.tie_word_embeddings or HEAD not in self._tensors:
            return
        if EMBEDDING not in self._tensors:
            # safetensors' save_model keeps the last name of shared tensors, which is the head's.
            self._tensors = {EMBEDDING: self._tensors.pop(HEAD), **self._tensors}
            if HEAD in self._rounded:
                self._rounded[EMBEDDING] = self._rounded.pop(HEAD)
            return
        if not _equal(self.read(HEAD), self.read(EMBEDDING)):
            raise CheckpointError(
                f"{HEAD} and {EMBEDDING} differ, but {CONFIG_FILE} says that they are one tensor. "
                f'If the head was trained on its own, set "tie_word_embeddings": false in {CONFIG_FILE}.'
            )
        del self._tensors[HEAD]


def open_checkpoint(
    path: str | os.PathLike[str], *, prefer: str | None = None, config: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """Open a checkpoint of any format, without importing a framework.

    No tensor is read, but the copies of small ones that metaseq's model-parallel parts hold: they are compared.

    Args:
        path: a directory with `config.json` and weights, or a weight file (or the index of shards) beside its
            `config.json`. Of metaseq's files one stands for all, and they need no `config.json`.
        prefer: format to take where a directory holds several but no safetensors.
        config: a configuration file to use in place of the `config.json` beside the weights.

    Raises:
        ConfigError: if the configuration is absent or describes no OPT model.
        CheckpointError: if the weights are absent, damaged or hostile.
    """
    path = Path(path)
    # Before the weights are looked for: whoever names a wrong directory hears that it has no configuration.
    stated = _stated_config(path, config) if path.exists() else None
    if path.is_dir():
        format_name, files, index = find_weights(path, prefer=prefer)
    elif path.is_file():
        format_name, files, index = _single(path)
    else:
        raise CheckpointError(f"There is no file or directory {str(path)!r}. Check the path.")
    checkpoint = Checkpoint(stated, format_name, files)
    if index is not None:
        try:
            _check_index(index, checkpoint)
        except BaseException:
            checkpoint.close()
            raise
    if checkpoint.left_out:
        warnings.warn(
            f"{checkpoint.files[0].parent} holds a BLIP-2 model, of which only the language model is read: "
            f"{len(checkpoint.left_out)} tensors of {', '.join(BLIP_2_PARTS)} are left out.",
            stacklevel=2,
        )
    return checkpoint


def _stated_config(path: Path, config: str | os.PathLike[str] | None) -> OPTConfig | None:
    """The configuration that a user names, or else the one beside the weights; None where they state it themselves."""
    if config is not None:
        return OPTConfig.from_json_file(Path(config))
    beside = home_of(path) / CONFIG_FILE
    if states_its_config(path):
        # A preset's config.json is KerasHub's, and a .keras was saved with the one that its model had.
        own = path.name.endswith(KERAS_ARCHIVE) or is_keras_hub(beside.parent) or not beside.exists()
        return None if own else OPTConfig.from_json_file(beside)
    return _config_beside(path)


def _config_beside(path: Path) -> OPTConfig:
    beside = home_of(path) / CONFIG_FILE
    if not beside.exists() and (path.is_file() or orbax_directory(path) is not None):
        raise ConfigError(
            f"No {CONFIG_FILE} beside {path}, which does not say itself what model it is of. Put the model's there, "
            f"model.config.to_json(), or name one with --config (config=)."
        )
    return OPTConfig.from_json_file(beside)


def checked_parameters(
    checkpoint: Checkpoint, table: Iterable[Parameter], *, other_heads: bool = True, new: Iterable[Parameter] = ()
) -> None:
    """Make sure that a checkpoint holds the parameters of a table, and nothing else.

    Args:
        checkpoint: what to check.
        table: the parameters that it must hold.
        other_heads: whether the tensors of heads that the table has not are passed over: a head is not in the way of
            its decoder, nor of another head.
        new: parameters that it need not hold, because they are made anew; if it does, they are passed over.

    Raises:
        CheckpointError: naming every missing, unexpected and mis-shaped tensor, every one that isn't floating, and
            every one of a quantised checkpoint that is stored otherwise than it should be.
    """
    expected = {parameter.name: parameter for parameter in table}
    present = set(checkpoint.names)
    passed_over = {parameter.name for parameter in new}
    if other_heads:
        passed_over |= {name for name in present if head_of(name) is not None}
    problems = [f"missing: {name}, of shape {list(expected[name].shape)}." for name in expected if name not in present]
    problems += [
        _unexpected(checkpoint, name) for name in checkpoint.names if name not in expected and name not in passed_over
    ]
    for name, parameter in expected.items():
        if name not in present:
            continue
        info = checkpoint.info(name)
        if info.shape != parameter.shape:
            problems.append(f"shape: {name} is {list(info.shape)}, expected {list(parameter.shape)}.")
        if not BY_NUMPY[info.dtype].floating:
            problems.append(f"dtype: {name} is {info.dtype}, expected a floating-point type.")
        if checkpoint.storage is not None:
            found, wanted = checkpoint.storage_of(name), storage_of(parameter, checkpoint.storage)
            if found != wanted:
                problems.append(f"storage: {name} is {found or 'unquantised'}, expected {wanted or 'unquantised'}.")
    if problems:
        advice = _advice(checkpoint, expected, present)
        where = checkpoint.files[0].parent
        raise CheckpointError(
            f"The {checkpoint.format} weights in {where} do not fit {CONFIG_FILE}. {join_problems(problems)}{advice}"
        )


def _unexpected(checkpoint: Checkpoint, name: str) -> str:
    native = checkpoint.native_name(name)
    known_as = "" if native == name else f" (in the file: {native})"
    return f"unexpected: {name}{known_as}, of shape {list(checkpoint.info(name).shape)}."


def _advice(checkpoint: Checkpoint, expected: Mapping[str, Parameter], present: set[str]) -> str:
    """A sentence about a story that the problems are known to tell, or nothing."""
    head = [name for name in expected if head_of(name) is not None]
    if head and not present.intersection(head):
        return "\nThe checkpoint has no such head. To train one on its decoder, load it with new_head=True."
    shapes = {name: (checkpoint.info(name).shape, expected[name].shape) for name in head if name in present}
    if any(found != wanted for found, wanted in shapes.values()):
        return (
            f"\nThe labels in {CONFIG_FILE}, or those asked for, are not as many as the checkpoint's head has: load it "
            "with its own number, or with new_head=True for a new head."
        )
    final_norm = [name for name in expected if name.startswith("model.decoder.final_layer_norm.")]
    if final_norm and not present.intersection(final_norm):
        return (
            "\nCheckpoints of transformers before 4.20.1 (June 2022) lack the decoder's final_layer_norm: fetch a "
            'newer one, or, if the model was trained without it, set "_remove_final_layer_norm": true.'
        )
    return ""


def _single(path: Path) -> tuple[str, tuple[Path, ...], Path | None]:
    """Format, files and index of one weight file or of one index."""
    if path.name.endswith((KERAS_WEIGHTS, KERAS_ARCHIVE, KERAS_INDEX)):
        return KERAS_HUB if is_keras_hub(path.parent) else KERAS, keras_files(path), None
    index = path if path.name.endswith(".index.json") else None
    weights = Path(path.name.removesuffix(".index.json"))
    format_name = _FORMAT_OF_SUFFIX.get(weights.suffix)
    if format_name is None:
        raise CheckpointError(
            f"{path} has suffix {weights.suffix!r}, expected one of {', '.join(_FORMAT_OF_SUFFIX)}, or a directory."
        )
    if index is None:
        parts = metaseq_file.with_siblings(path) if weights.suffix == ".pt" else None
        return (format_name, (path,), None) if parts is None else (METASEQ, parts, None)
    shards = tuple(path.parent / name for name in sorted(set(read_index(index).values())))
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{path} names files that are absent: {', '.join(missing)}. Fetch them.")
    refuse_links_outside(index, shards)
    return format_name, shards, index


def _check_index(index: Path, checkpoint: Checkpoint) -> None:
    """Every tensor that the index promises must be there; shards of an interrupted download often lack some."""
    scheme = checkpoint.scheme
    promised = canonical_names(read_index(index), scheme)
    held = {*checkpoint.names, *checkpoint.left_out, HEAD, EMBEDDING}
    if missing := [name for name in promised if split_part(name)[0] not in held]:
        raise CheckpointError(
            f"{index} promises tensors that its shards do not hold: {', '.join(missing[:5])}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}. Fetch the checkpoint again."
        )


def _equal(a: Array, b: Array) -> bool:
    """Whether two arrays are the same, bit for bit, compared a few rows at a time."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.__array_interface__["data"] == b.__array_interface__["data"] and a.strides == b.strides:
        return True
    rows = max(1, _COMPARED_ELEMENTS // max(1, a[:1].size))
    return all(
        np.array_equal(
            np.ascontiguousarray(fetch(a[start : start + rows])).view(np.uint8),
            np.ascontiguousarray(fetch(b[start : start + rows])).view(np.uint8),
        )
        for start in range(0, len(a), rows)
    )
