"""Is a checkpoint whole, and does it hold the same model as another one?

Three questions, in this order: do the tensors fit the configuration and hold finite numbers; are they those of the
other checkpoint, bit by bit; and does the model compute the same, layer by layer, in the NumPy reference and in the
frameworks?
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conversion.canonical import HEAD
from conversion.checkpoint import Checkpoint, checked_parameters, open_checkpoint
from conversion.convert import locate
from conversion.digests import Digest, digest, row_blocks, saved_digests
from conversion.function import (
    FRAMEWORKS,
    REFERENCE,
    TOLERANCE,
    FunctionCheck,
    Run,
    compare,
    computes,
    difference,
    inputs_for,
    is_installed,
    last_layer_differs,
    run_framework,
    run_reference,
    source_of,
    tokenizer_of,
)
from conversion.tensors import Array, to_dtype
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, MissingFrameworkError
from opt_common.hub import CONFIG_FILE
from opt_common.params import ARCHITECTURES, Parameter, count_parameters, parameter_table

LARGEST_FUNCTION = 200_000_000
"""Parameters up to which the function is checked unasked; the float64 reference is slow beyond."""

ALL = "all"
"""Asks for the reference and every framework that is installed."""

_DESCRIPTIVE = (
    *("dtype", "extra", "init_std", "use_cache", "dropout", "attention_dropout", "layerdrop"),
    *("num_labels", "id2label", "label2id", "problem_type"),  # a differing number shows in the head's shape
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorCheck:
    """How one tensor compares.

    Attributes:
        name: canonical name.
        verdict: "equal" (the same bits), "rounded" (the same after rounding to the narrower dtype) or "differs".
        dtypes: dtype in the checkpoint and in the other one.
        max_difference: max |a - b|; infinite if one of them isn't finite where the other is.
    """

    name: str
    verdict: str
    dtypes: tuple[str, str]
    max_difference: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of `verify`.

    Attributes:
        source: what was verified.
        against: what it was compared with, or None.
        tensors: number of tensors that the source should have.
        problems: everything that does not hold, a sentence each.
        checks: the comparison of each tensor; empty without `against`.
        digests: what each tensor of the source is, by canonical name.
        function: the two checkpoints in the reference; None where it was not asked for or not possible.
        frameworks: each checkpoint in each framework that was asked for, held against the reference.
    """

    source: str
    against: str | None
    tensors: int
    problems: tuple[str, ...]
    checks: tuple[TensorCheck, ...]
    digests: Mapping[str, Digest]
    function: FunctionCheck | None
    frameworks: tuple[FunctionCheck, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {"holds": self.holds, **dataclasses.asdict(self)}


def verify(
    src: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    function: bool | None = None,
    frameworks: Sequence[str] = (),
    config: str | os.PathLike[str] | None = None,
    **hub: Any,
) -> Verification:
    """Check a checkpoint, and compare it with another one of any format.

    Args:
        src: a directory, a weight file, or a hub id.
        against: another one; or a `.json` file that `opt-convert verify --json` printed of one; or None.
        function: whether to compute both models in the NumPy reference; None means if they are small enough
            (`LARGEST_FUNCTION`) and there is something to compare with.
        frameworks: "torch", "tf" and "flax": compute each checkpoint there too, and hold it against the reference;
            `ALL` means those that are installed.
        config: a configuration file to use in place of the one beside the weights of `src`.
        **hub: arguments of `opt_common.hub.resolve`, for both.

    Raises:
        ConfigError: if a configuration can't be read.
        CheckpointError: if a file can't be read. What can be read but is wrong is a problem of the result.
        MissingFrameworkError: if a framework that is asked for is not installed.
    """
    chosen = _chosen(frameworks)
    path = locate(src, config=config, **hub)
    with open_checkpoint(path, config=config) as ours:
        subject = _Subject(str(src), path, ours)
        problems = subject.structure()
        checks: list[TensorCheck] = []
        check: FunctionCheck | None = None
        framework_checks: list[FunctionCheck] = []
        wanted = function if function is not None else count_parameters(ours.config) <= LARGEST_FUNCTION
        if against is not None and _is_saved(against):
            checks = list(_against_digests(subject.digests, saved_digests(Path(against)), subject.table))
            problems += [_sentence(check) for check in checks if check.verdict == "differs"]
        elif against is not None:
            other = locate(against, **hub)
            with open_checkpoint(other) as theirs:
                second = _Subject(str(against), other, theirs)
                structure = [
                    *second.structure(),
                    *_head_difference(ours, theirs),
                    *_config_differences(ours, theirs),
                ]
                checks = [_compare(name, ours, theirs) for name in _common(ours, theirs, subject.table)]
                sound = not problems and not structure
                problems += [f"{against}: {problem}" for problem in structure]
                problems += [_sentence(check) for check in checks if check.verdict == "differs"]
                if wanted and sound:
                    check = _function(subject, second)
                if sound:
                    framework_checks += second.in_frameworks(chosen)
                    problems += second.refused
        if not subject.problems:
            framework_checks[:0] = subject.in_frameworks(chosen)
            problems += subject.refused
        problems += [_divergence(check) for check in framework_checks if not check.holds]
        return Verification(
            source=os.fspath(src),
            against=None if against is None else os.fspath(against),
            tensors=len(subject.table),
            problems=tuple(problems),
            checks=tuple(checks),
            digests=subject.digests,
            function=check,
            frameworks=tuple(framework_checks),
        )


def _chosen(frameworks: Sequence[str]) -> tuple[str, ...]:
    """The frameworks to compute in, in the order of the table.

    Raises:
        MissingFrameworkError: for one that is named and not installed.
    """
    if unknown := [name for name in frameworks if name not in (*FRAMEWORKS, REFERENCE, ALL)]:
        expected = ", ".join((REFERENCE, *FRAMEWORKS, ALL))
        raise CheckpointError(f"frameworks has {', '.join(unknown)}, expected some of {expected}.")
    if missing := [name for name in FRAMEWORKS if name in frameworks and not is_installed(name)]:
        extras = ",".join(missing)
        raise MissingFrameworkError(f"{extras}: not installed. Run `pip install 'opt-models[{extras}]'`.")
    return tuple(name for name in FRAMEWORKS if name in frameworks or (ALL in frameworks and is_installed(name)))


def _is_saved(against: str | os.PathLike[str]) -> bool:
    """Whether a path is what `--json` printed, and not a configuration or an index, which stand for weights."""
    path = Path(against)
    return path.suffix == ".json" and not path.name.endswith((".index.json", CONFIG_FILE)) and path.is_file()


class _Subject:
    """A checkpoint that is verified: where it is, its tensors' digests, and what the reference computes of it."""

    def __init__(self, name: str, path: Path, checkpoint: Checkpoint) -> None:
        self.name, self.path, self.checkpoint = name, path, checkpoint
        self.table = parameter_table(checkpoint.config, head=checkpoint.head)
        self.digests: dict[str, Digest] = {}
        self.problems: list[str] = []
        self.refused: list[str] = []
        self.tokenizer = tokenizer_of(path)
        self.inputs = inputs_for(checkpoint.config, self.tokenizer)
        self._run: Run | None = None

    def structure(self) -> list[str]:
        """What a checkpoint lacks or has too much, and which tensors hold numbers that are none."""
        try:
            checked_parameters(self.checkpoint, self.table, other_heads=False)
        except CheckpointError as error:
            self.problems.append(str(error))
            return list(self.problems)
        for name in self.checkpoint.names:
            self.digests[name], finite = digest(self.checkpoint, name)
            if not finite:
                self.problems.append(f"{name} holds numbers that are not finite.")
        return list(self.problems)

    def run(self) -> Run:
        """What the reference computes, once."""
        if self._run is None:
            self._run = run_reference(self.checkpoint, self.inputs)
        return self._run

    def in_frameworks(self, frameworks: Sequence[str]) -> list[FunctionCheck]:
        """The checkpoint in each framework, held against the reference."""
        checks: list[FunctionCheck] = []
        if frameworks and self.checkpoint.storage is not None:
            self.refused.append(
                f"{self.name} is quantised, and products in few bits are not those of the reference to {TOLERANCE:g}. "
                f"Convert it with --dequantize, and verify that."
            )
            return checks
        for framework in frameworks if computes(self.checkpoint) else ():
            try:
                run = run_framework(framework, self.path, self.checkpoint, self.inputs)
            except CheckpointError as error:
                self.refused.append(str(error))
                continue
            names = (self.name, framework, f"{self.name} in the reference")
            checks.append(
                compare(
                    run,
                    self.run(),
                    names=names,
                    tolerance=TOLERANCE,
                    inputs=self.inputs,
                    tokenizer=self.tokenizer,
                )
            )
        return checks


def _function(ours: _Subject, theirs: _Subject) -> FunctionCheck | None:
    """Compute both models in the reference; None where one has no head to compute logits with."""
    if not computes(ours.checkpoint) or not computes(theirs.checkpoint):
        return None
    # One and the same input for both, whichever of them has a tokenizer.
    theirs.inputs = ours.inputs
    names = (ours.name, REFERENCE, f"{theirs.name} in the reference")
    check = compare(ours.run(), theirs.run(), names=names, tolerance=0.0, inputs=ours.inputs, tokenizer=ours.tokenizer)
    last = len(check.hidden_states) - 1
    if check.first_divergent != last:
        return check
    # The last hidden state is that of the last layer and of what follows it: find out which of them it is.
    differs = last_layer_differs(ours.checkpoint, theirs.checkpoint, ours.inputs)
    return dataclasses.replace(check, first_layer=f"layer {last - 1}" if differs else "final norm or projection")


def _divergence(check: FunctionCheck) -> str:
    where = f"first at {check.first_layer}" if check.first_layer else "in the logits"
    largest = max(*check.hidden_states, check.logits)
    return (
        f"{check.checkpoint}: {check.framework} computes something else than the reference, {where}: "
        f"max |difference| {largest:.3g}."
    )


def _head_difference(ours: Checkpoint, theirs: Checkpoint) -> Iterator[str]:
    """Heads that cannot be compared. A bare decoder and a language model share all that the decoder has."""
    if ours.head != theirs.head and not {ours.head, theirs.head} <= {"lm", None}:
        mine, other = ARCHITECTURES[ours.head], ARCHITECTURES[theirs.head]
        yield f"it is of class {other}, the checkpoint of class {mine}."


def _config_differences(ours: Checkpoint, theirs: Checkpoint) -> Iterator[str]:
    """Fields that change what is computed and differ. Whether the head is tied shows in the tensors."""
    shown = {"tie_word_embeddings"}
    if (ours.storage is None) != (theirs.storage is None):
        # One of them is quantised, the other holds its numbers.
        shown.add("quantization")
    for field in dataclasses.fields(OPTConfig):
        if field.name in _DESCRIPTIVE or field.name in shown:
            continue
        mine, other = getattr(ours.config, field.name), getattr(theirs.config, field.name)
        if mine != other:
            yield f"config.json says {field.name} = {other!r}, the checkpoint's own says {mine!r}."


def _common(ours: Checkpoint, theirs: Checkpoint, table: tuple[Parameter, ...]) -> list[str]:
    """The tensors to compare; structural problems have named those that only one of the two has."""
    names = [parameter.name for parameter in table if parameter.name in ours.names]
    if HEAD in theirs.names and HEAD not in names:
        names.append(HEAD)
    return [name for name in names if source_of(ours, name) and source_of(theirs, name)]


def _compare(name: str, ours: Checkpoint, theirs: Checkpoint) -> TensorCheck:
    arrays = [checkpoint.read(source_of(checkpoint, name) or name) for checkpoint in (ours, theirs)]
    mine, other = arrays
    dtypes = (mine.dtype.name, other.dtype.name)
    if mine.shape != other.shape:
        return TensorCheck(name=name, verdict="differs", dtypes=dtypes, max_difference=float("inf"))
    equal, largest = True, 0.0
    for a, b in zip(row_blocks(mine), row_blocks(other), strict=True):
        if not _same_bits(name, a, b):
            equal = False
        if not equal or mine.dtype != other.dtype:
            largest = max(largest, difference(a, b))
    verdict = ("equal" if mine.dtype == other.dtype else "rounded") if equal else "differs"
    return TensorCheck(name=name, verdict=verdict, dtypes=dtypes, max_difference=largest)


def _against_digests(
    digests: Mapping[str, Digest], saved: Mapping[str, Digest], table: Sequence[Parameter]
) -> Iterator[TensorCheck]:
    """Compare with digests that were saved: the same bits, or not; nobody can say by how much."""
    names = [parameter.name for parameter in table if parameter.name in digests]
    for name in [*names, *(name for name in saved if name not in digests)]:
        mine, other = digests.get(name), saved.get(name)
        dtypes = (mine.dtype if mine else "absent", other.dtype if other else "absent")
        verdict = "equal" if mine == other else "differs"
        largest = 0.0 if verdict == "equal" else float("nan")
        yield TensorCheck(name=name, verdict=verdict, dtypes=dtypes, max_difference=largest)


def _same_bits(name: str, a: Array, b: Array) -> bool:
    """Whether two arrays are the same, after rounding the one of the wider dtype to the other's."""
    if a.dtype != b.dtype:
        narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        try:
            a, b = to_dtype(a, narrow, name), to_dtype(b, narrow, name)
        except CheckpointError:
            return False
    return np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def _sentence(check: TensorCheck) -> str:
    if check.dtypes[0] != check.dtypes[1] and "absent" in check.dtypes:
        return f"{check.name} is {' and '.join(check.dtypes)} in the two."
    by = "other bits" if np.isnan(check.max_difference) else f"max |difference| {check.max_difference:.3g}"
    return f"{check.name} differs ({' and '.join(check.dtypes)}): {by}."
