"""Convert a checkpoint from any format to any other, one tensor at a time."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.dtypes import parse_dtype
from conversion.formats.keras_hub_file import TOKENIZER_ASSETS
from conversion.merge import Weights, merged_weights, quantized_weights_of, weights_of
from conversion.plan import DEFAULT_SHARD_SIZE, Plan, documents_of, make_plan
from conversion.target import check_target, free_bytes, needed_bytes, resolved
from conversion.unfinished import is_left_to_publish
from conversion.write import write_plan
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError
from opt_common.hub import GENERATION_CONFIG_FILE, QUANTIZED, TOKENIZER_FILE, TOKENIZER_FILES, resolve
from opt_common.native_files import KERAS_HUB, home_of, is_keras_hub
from opt_common.params import ARCHITECTURES, Head

CARRIED_FILES = (GENERATION_CONFIG_FILE, *TOKENIZER_FILES, "chat_template.jinja", "LICENSE.md", "LICENSE")
"""Files beside the weights that go along as they are, where the source has them."""

_MAX_CARRIED_BYTES = 100_000_000
_MERGES_HEADER = b"#version:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` has done.

    Attributes:
        source: the weight files read.
        source_format: their format.
        target: the new directory.
        target_format: the format of its weights.
        files: names of the files in it that this conversion wrote.
        tensors: number of tensors.
        total_bytes: bytes of the tensors.
        warnings: sentences about what other software cannot do with the result.
    """

    source: tuple[Path, ...]
    source_format: str
    target: Path
    target_format: str
    files: tuple[str, ...]
    tensors: int
    total_bytes: int
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of a target: its file, the name, dtype and shape there, and its bytes (0 where it shares them)."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedConversion:
    """What `convert` would do.

    Attributes:
        source: the weight files that it would read.
        source_format: their format.
        target: the directory that it would make.
        target_format: the format of its weights.
        files: names of the files that it would write.
        tensors: every tensor of the target.
        needed_bytes: bytes of the disk that it takes, a little more than the files will have.
        free_bytes: bytes that the disk has free.
        warnings: sentences about what other software could not do with the result.
    """

    source: tuple[Path, ...]
    source_format: str
    target: Path
    target_format: str
    files: tuple[str, ...]
    tensors: tuple[PlannedTensor, ...]
    needed_bytes: int
    free_bytes: int
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.needed_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, paths apart."""
        return {"fits": self.fits, **dataclasses.asdict(self)}


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    model_parts: int | None = None,
    dequantize: bool = False,
    config: str | os.PathLike[str] | None = None,
    force: bool = False,
    resume: bool = False,
    progress: bool = False,
    **hub: Any,
) -> Conversion:
    """Write the checkpoint at `src` to the directory `dst` in another format; every bit stays as it is.

    Args:
        src: a directory, a weight file beside its `config.json`, or a hub id.
        dst: the new directory. It appears whole or not at all.
        to: "safetensors", "torch", "tf", "flax", "metaseq" or "keras-hub"; or "quantized" for a source that is.
        dtype: floating-point type to store, the only thing that can lose precision; None keeps each tensor's.
        max_shard_size: longest weight file, such as "5GB", "500MB" or "1GiB"; default 5 GB.
        model_parts: number of metaseq's model-parallel parts; default one file without a number.
        dequantize: write the numbers, in float32, that the integers of a quantised source stand for.
        config: a configuration file to use in place of the one beside the weights.
        force: replace the files of the same names if `dst` exists. Others in it are never touched.
        resume: go on with what an interrupted call with the same arguments has left beside `dst`: weight files that
            were finished are checked by their digests and used. Without such work, begin from the start.
        progress: show a bar on standard error, if that is a terminal.
        **hub: `revision`, `cache_dir`, `token` and `local_files_only` of `opt_common.hub.resolve`.

    Raises:
        ConfigError: if the source's configuration is no OPT model's.
        CheckpointError: if the source is damaged, incomplete, or changes meanwhile, the target is refused, the disk is
            too small, a number is too large for `dtype`, or an interrupted call's work is in the way. Nothing is left
            behind.
        OSError: if the disk is full or not writable. Weight files that are finished are kept for `resume`; a note of
            the error says where. Otherwise nothing is left behind.
    """
    options = (dtype, max_shard_size, model_parts, config, force or (resume and is_left_to_publish(Path(dst))), hub)
    with _prepared(src, dst, to, *options, dequantize=dequantize) as prepared:
        return _carry_out(prepared, progress=progress, resume=resume)


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    model_parts: int | None = None,
    config: str | os.PathLike[str] | None = None,
    force: bool = False,
    resume: bool = False,
    progress: bool = False,
    **hub: Any,
) -> Conversion:
    """Write the checkpoint at `base` with a LoRA adapter merged into its weights, as `convert` would without it.

    Args:
        base: the model that the adapter was trained on: a directory, a weight file, or a hub id.
        adapter: a directory with `adapter_config.json` and its weights.
        dst: the new directory. It appears whole or not at all.
        to: format of the new weights.
        dtype: floating-point type to store; None keeps each tensor's. Merging is computed in float32 at least.
        max_shard_size: as for `convert`, like the remaining arguments.
        model_parts: likewise.
        config: likewise.
        force: likewise.
        resume: likewise.
        progress: likewise.
        **hub: likewise; they are about `base`.

    Raises:
        ConfigError: as `convert`, and if the adapter asks for what is not supported.
        CheckpointError: as `convert`, and if the adapter is damaged or does not fit the base.
        OSError: as `convert`.
    """
    options = (dtype, max_shard_size, model_parts, config, force or (resume and is_left_to_publish(Path(dst))), hub)
    with _prepared(base, dst, to, *options, adapter=adapter) as prepared:
        return _carry_out(prepared, progress=progress, resume=resume)


def _carry_out(prepared: "_Prepared", *, progress: bool, resume: bool) -> Conversion:
    plan, weights = prepared.plan, prepared.weights
    with _bar(plan, show=progress) as advance:
        source = weights.identities
        write_plan(prepared.target, plan, weights.read, prepared.documents, advance, source=source, resume=resume)
    return Conversion(
        source=prepared.checkpoint.files,
        source_format=prepared.checkpoint.format,
        target=prepared.target,
        target_format=plan.format,
        files=prepared.files,
        tensors=len(weights.table),
        total_bytes=plan.total_bytes,
        warnings=prepared.warnings,
    )


def plan_conversion(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    model_parts: int | None = None,
    dequantize: bool = False,
    config: str | os.PathLike[str] | None = None,
    force: bool = False,
    **hub: Any,
) -> PlannedConversion:
    """What `convert` would do with the same arguments, and whether the disk has room for it. Nothing is written.

    Raises:
        ConfigError: as `convert`.
        CheckpointError: as `convert`, but for what only shows when tensors are read, and for a disk that is too small.
    """
    options = (dtype, max_shard_size, model_parts, config, force, hub)
    with _prepared(src, dst, to, *options, dequantize=dequantize) as prepared:
        plan = prepared.plan
        return PlannedConversion(
            source=prepared.checkpoint.files,
            source_format=prepared.checkpoint.format,
            target=prepared.target,
            target_format=to,
            files=prepared.files,
            tensors=tuple(
                PlannedTensor(
                    file=file,
                    name=tensor.spec.name,
                    dtype=tensor.spec.info.dtype.name,
                    shape=tensor.spec.info.shape,
                    bytes=0 if tensor.spec.shares is not None else tensor.stored_bytes,
                )
                for file, shard in zip(plan.files, plan.shards, strict=True)
                for tensor in shard
            ),
            needed_bytes=needed_bytes(plan, prepared.documents),
            free_bytes=free_bytes(prepared.target),
            warnings=prepared.warnings,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A conversion of which everything is decided and nothing is done."""

    checkpoint: Checkpoint
    weights: Weights
    target: Path
    plan: Plan
    documents: Mapping[str, bytes]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files that will be written."""
        return (*self.plan.files, *((self.plan.index,) if self.plan.index else ()), *self.documents)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What other software cannot do with the result, a sentence each."""
        found = list(class_limits(self.weights.config, self.plan.format, self.weights.head))
        if self.plan.format == KERAS_HUB and not set(TOKENIZER_ASSETS.values()) <= self.documents.keys():
            found.append(
                f"There is no {' and '.join(TOKENIZER_ASSETS)} beside the source, so that the preset has no tokenizer: "
                f"KerasHub loads it with preprocessor=None."
            )
        return tuple(found)


@contextlib.contextmanager
def _prepared(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    dtype: str | None,
    max_shard_size: int | str | None,
    model_parts: int | None,
    config: str | os.PathLike[str] | None,
    force: bool,
    hub: Mapping[str, Any],
    *,
    dequantize: bool = False,
    adapter: str | os.PathLike[str] | None = None,
) -> Generator[_Prepared]:
    """Open and check the source, plan and check the target; the arguments are those of `convert` or `merge_adapter`."""
    source, target = locate(src, config=config, **hub), Path(dst)
    _check_places(source, target, force=force)
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(source, config=config))
        merged = None if adapter is None else stack.enter_context(merged_weights(checkpoint, adapter))
        choose = quantized_weights_of if to == QUANTIZED else weights_of
        weights = merged or choose(checkpoint, dequantize=dequantize)
        stored = None if dtype is None else parse_dtype(dtype).numpy
        plan = make_plan(
            weights.config,
            weights.table,
            {name: stored or own for name, own in weights.dtypes.items()},
            format_name=to,
            max_shard_size=DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size,
            bare=weights.head is None,
            model_parts=model_parts,
        )
        documents = documents_of(plan, _carried(source))
        prepared = _Prepared(checkpoint=checkpoint, weights=weights, target=target, plan=plan, documents=documents)
        check_target(target, to, set(prepared.files))
        yield prepared


def locate(src: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None, **hub: Any) -> Path:
    """The local file or directory of a checkpoint, fetched from the hub if need be.

    Args:
        src: a directory, a weight file, or a hub id.
        config: a configuration file in place of the one in the directory, which then needs none.
        **hub: arguments of `opt_common.hub.resolve`.

    Raises:
        CheckpointError: if there is no such checkpoint.
    """
    path = Path(src)
    return path if path.is_file() or (config is not None and path.is_dir()) else resolve(src, **hub)


def class_limits(config: OPTConfig, format_name: str, head: Head | None = "lm") -> Iterator[str]:
    """What the classes of `transformers` 4.57 for a format cannot hold, a sentence each. This package's classes can."""
    if format_name == KERAS_HUB and config.attention_dropout != config.dropout:
        yield (
            f"In training KerasHub drops out attention probabilities with probability {config.dropout}, as everything, "
            f"not {config.attention_dropout}."
        )
    prefix = {"tf": "TF", "flax": "Flax"}.get(format_name)
    if prefix is None:
        return
    classes = f"{prefix}OPTForCausalLM"
    if head not in ("lm", None):
        yield f"transformers has no {prefix}{ARCHITECTURES[head]}: only this package's classes read this file's head."
        return
    if format_name == "tf" and not config.tie_word_embeddings:
        yield f"The head is not tied to the token table: transformers' {classes} computes other logits."
    if not config.enable_bias:
        yield f"The model has no biases: transformers' {classes} makes them up as zeros."
    if not config.layer_norm_elementwise_affine:
        yield f"The layer norms have no weights: transformers' {classes} makes them up as ones and zeros."


def _check_places(source: Path, target: Path, *, force: bool) -> None:
    # A file in the hub's cache is a link: the link's own place counts. Beside a file there is room for a directory.
    old = source.parent.resolve() / source.name if source.is_file() else source.resolve()
    new = resolved(target)
    if new.is_relative_to(old) or old.is_relative_to(new):
        raise CheckpointError(f"{target} and the source {source} overlap. Choose a target outside the source.")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists. Choose a new directory, or use --force (force=True) to replace files.")


def _carried(source: Path) -> dict[str, bytes]:
    """The contents of the files that go along, under the names that Hugging Face gives them."""
    directory = home_of(source)
    places = {name: directory / name for name in CARRIED_FILES}
    if is_keras_hub(directory):
        del places[TOKENIZER_FILE]  # KerasHub's own is a file of another kind
        places |= {name: directory / place for name, place in TOKENIZER_ASSETS.items()}
    found = {name: path for name, path in places.items() if path.is_file()}
    contents = {name: path.read_bytes() for name, path in found.items() if path.stat().st_size <= _MAX_CARRIED_BYTES}
    merges = contents.get("merges.txt")
    if merges is not None and is_keras_hub(directory) and not merges.startswith(_MERGES_HEADER):
        # KerasHub writes the merges alone; everyone else takes the first line for a header.
        contents["merges.txt"] = _MERGES_HEADER + b" 0.2\n" + merges
    return contents


@contextlib.contextmanager
def _bar(plan: Plan, *, show: bool) -> Generator[Callable[[int], None]]:
    """A progress bar over the bytes of the tensors; nothing is shown where nobody watches."""
    if not show or not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=plan.total_bytes, unit="B", unit_scale=True, desc=f"writing {plan.format}") as bar:
        yield lambda size: cast("None", bar.update(size))
