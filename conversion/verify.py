"""Is a checkpoint whole, and does it hold the same model as another one?

Three questions, in this order: do the tensors fit the configuration and hold finite numbers; are they those of the
other checkpoint, bit by bit; and does the model compute the same, layer by layer, in the NumPy reference?
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from conversion.canonical import EMBEDDING, HEAD
from conversion.checkpoint import Checkpoint, checked_parameters, open_checkpoint
from conversion.convert import locate
from conversion.tensors import Array, contiguous, to_dtype
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError
from opt_common.params import ARCHITECTURES, Parameter, count_parameters, parameter_table
from opt_common.reference import answer, classify, decode, forward, generate_greedy

LARGEST_FUNCTION = 200_000_000
"""Parameters up to which the function is checked unasked; the float64 reference is slow beyond."""

_SEED = 0
_BATCH, _LENGTH, _NEW_TOKENS = 2, 16, 8
_ROWS_BYTES = 64 << 20
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
class FunctionCheck:
    """How two models compute on the same seeded ids, of which the second row is padded on the left; float64.

    Attributes:
        hidden_states: max |difference| over attended positions, for the embeddings, each layer's output and the last
            hidden state.
        first_divergent: index in `hidden_states` of the first that isn't zero, or None.
        logits: max |difference| of the logits over attended positions; of a sequence classifier, over rows.
        top1_agreement: share of attended positions with the same likeliest token; of a sequence classifier, share of
            rows with the same highest logit; of question answering, share of ends of the same answer.
        greedy_equal: whether both continue both rows with the same tokens; true if they are no language models.
        greedy: the tokens of the checkpoint, one row for each row of the batch; empty without a language model.
    """

    hidden_states: tuple[float, ...]
    first_divergent: int | None
    logits: float
    top1_agreement: float
    greedy_equal: bool
    greedy: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of `verify`.

    Attributes:
        source: what was verified.
        against: what it was compared with, or None.
        tensors: number of tensors that the source should have.
        problems: everything that does not hold, a sentence each.
        checks: the comparison of each tensor; empty without `against`.
        function: the comparison of what is computed; None where it was not asked for or not possible.
    """

    source: str
    against: str | None
    tensors: int
    problems: tuple[str, ...]
    checks: tuple[TensorCheck, ...]
    function: FunctionCheck | None

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
    config: str | os.PathLike[str] | None = None,
    **hub: Any,
) -> Verification:
    """Check a checkpoint, and compare it with another one of any format.

    Args:
        src: a directory, a weight file, or a hub id.
        against: another one, or None.
        function: whether to compute both models in the NumPy reference; None means if they are small enough
            (`LARGEST_FUNCTION`) and there is something to compare with.
        config: a configuration file to use in place of the one beside the weights of `src`.
        **hub: arguments of `opt_common.hub.resolve`, for both.

    Raises:
        ConfigError: if a configuration can't be read.
        CheckpointError: if a file can't be read. What can be read but is wrong is a problem of the result.
    """
    with open_checkpoint(locate(src, config=config, **hub), config=config) as ours:
        table = _table(ours)
        problems = [*_structure(ours, table)]
        checks: list[TensorCheck] = []
        check: FunctionCheck | None = None
        if against is not None:
            with open_checkpoint(locate(against, **hub)) as theirs:
                structure = [
                    *_structure(theirs, _table(theirs)),
                    *_head_difference(ours, theirs),
                    *_config_differences(ours.config, theirs.config),
                ]
                problems += [f"{against}: {problem}" for problem in structure]
                checks = [_compare(name, ours, theirs) for name in _common(ours, theirs, table)]
                problems += [_sentence(check) for check in checks if check.verdict == "differs"]
                wanted = function if function is not None else count_parameters(ours.config) <= LARGEST_FUNCTION
                if wanted and not structure and not _structure(ours, table):
                    check = _function(ours, theirs)
        return Verification(
            source=os.fspath(src),
            against=None if against is None else os.fspath(against),
            tensors=len(table),
            problems=tuple(problems),
            checks=tuple(checks),
            function=check,
        )


def _table(checkpoint: Checkpoint) -> tuple[Parameter, ...]:
    return parameter_table(checkpoint.config, head=checkpoint.head)


def _structure(checkpoint: Checkpoint, table: tuple[Parameter, ...]) -> list[str]:
    """What a checkpoint lacks or has too much, and which tensors hold numbers that are none."""
    try:
        checked_parameters(checkpoint, table, other_heads=False)
    except CheckpointError as error:
        return [str(error)]
    return [
        f"{name} holds numbers that are not finite."
        for name in checkpoint.names
        if not all(np.isfinite(rows).all() for rows in _rows(checkpoint.read(name)))
    ]


def _head_difference(ours: Checkpoint, theirs: Checkpoint) -> Iterator[str]:
    """Heads that cannot be compared. A bare decoder and a language model share all that the decoder has."""
    if ours.head != theirs.head and not {ours.head, theirs.head} <= {"lm", None}:
        mine, other = ARCHITECTURES[ours.head], ARCHITECTURES[theirs.head]
        yield f"it is of class {other}, the checkpoint of class {mine}."


def _config_differences(ours: OPTConfig, theirs: OPTConfig) -> Iterator[str]:
    """Fields that change what is computed and differ. Whether the head is tied shows in the tensors."""
    for field in dataclasses.fields(OPTConfig):
        if field.name in _DESCRIPTIVE or field.name == "tie_word_embeddings":
            continue
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != other:
            yield f"config.json says {field.name} = {other!r}, the checkpoint's own says {mine!r}."


def _common(ours: Checkpoint, theirs: Checkpoint, table: tuple[Parameter, ...]) -> list[str]:
    """The tensors to compare; structural problems have named those that only one of the two has."""
    names = [parameter.name for parameter in table if parameter.name in ours.names]
    if HEAD in theirs.names and HEAD not in names:
        names.append(HEAD)
    return [name for name in names if _source(ours, name) and _source(theirs, name)]


def _source(checkpoint: Checkpoint, name: str) -> str | None:
    """Under which name a checkpoint holds a tensor; a tied head is the token table."""
    if name in checkpoint.names:
        return name
    return EMBEDDING if name == HEAD and checkpoint.config.tie_word_embeddings else None


def _compare(name: str, ours: Checkpoint, theirs: Checkpoint) -> TensorCheck:
    arrays = [checkpoint.read(_source(checkpoint, name) or name) for checkpoint in (ours, theirs)]
    mine, other = arrays
    dtypes = (mine.dtype.name, other.dtype.name)
    if mine.shape != other.shape:
        return TensorCheck(name=name, verdict="differs", dtypes=dtypes, max_difference=float("inf"))
    equal, largest = True, 0.0
    for a, b in zip(_rows(mine), _rows(other), strict=True):
        if not _same_bits(name, a, b):
            equal = False
        if not equal or mine.dtype != other.dtype:
            largest = max(largest, _difference(a, b))
    verdict = ("equal" if mine.dtype == other.dtype else "rounded") if equal else "differs"
    return TensorCheck(name=name, verdict=verdict, dtypes=dtypes, max_difference=largest)


def _rows(array: Array) -> Iterator[Array]:
    """An array a few rows at a time, C-contiguous; the same rows for arrays of one shape."""
    step = max(1, _ROWS_BYTES // max(1, array[:1].size * 8))
    for start in range(0, len(array), step):
        yield contiguous(array[start : start + step])


def _same_bits(name: str, a: Array, b: Array) -> bool:
    """Whether two arrays are the same, after rounding the one of the wider dtype to the other's."""
    if a.dtype != b.dtype:
        narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        try:
            a, b = to_dtype(a, narrow, name), to_dtype(b, narrow, name)
        except CheckpointError:
            return False
    return np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def _difference(a: Array, b: Array) -> float:
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))


def _sentence(check: TensorCheck) -> str:
    return f"{check.name} differs ({' and '.join(check.dtypes)}): max |difference| {check.max_difference:.3g}."


class _Lazy(Mapping[str, Array]):
    """The tensors of a checkpoint, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Array:
        # One memory layout, whatever the format's: BLAS rounds a transposed matrix differently.
        return contiguous(self._checkpoint.read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names)

    def __len__(self) -> int:
        return len(self._checkpoint.names)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.names


def _function(ours: Checkpoint, theirs: Checkpoint) -> FunctionCheck | None:
    """Compute both models; None where one has no head to compute logits with."""
    both = (ours, theirs)
    if ours.head == theirs.head and ours.head in ("sequence_classification", "question_answering"):
        return _head_function(ours, theirs)
    if any(_source(checkpoint, HEAD) is None for checkpoint in both):
        return None
    ids_BT, mask_BT = _batch(ours.config)
    mine, other = (forward(checkpoint.config, _Lazy(checkpoint), ids_BT, mask_BT) for checkpoint in both)
    attended_BT = mask_BT.astype(bool)
    states = tuple(
        _difference(a[attended_BT], b[attended_BT])
        for a, b in zip(mine.hidden_states, other.hidden_states, strict=True)
    )
    tops = [output.logits[attended_BT].argmax(-1) for output in (mine, other)]
    steps = min(_NEW_TOKENS, ours.config.max_position_embeddings - ids_BT.shape[1])
    greedy = [generate_greedy(checkpoint.config, _Lazy(checkpoint), ids_BT, mask_BT, steps) for checkpoint in both]
    return FunctionCheck(
        hidden_states=states,
        first_divergent=next((index for index, value in enumerate(states) if value > 0), None),
        logits=_difference(mine.logits[attended_BT], other.logits[attended_BT]),
        top1_agreement=float((tops[0] == tops[1]).mean()),
        greedy_equal=bool(np.array_equal(greedy[0], greedy[1])),
        greedy=tuple(tuple(int(token) for token in row) for row in greedy[0][:, ids_BT.shape[1] :]),
    )


def _head_function(ours: Checkpoint, theirs: Checkpoint) -> FunctionCheck:
    """Compute both decoders and their heads."""
    ids_BT, mask_BT = _batch(ours.config)
    attended_BT = mask_BT.astype(bool)
    decoded: list[tuple[Array, ...]] = []
    logits: list[Array] = []
    tops: list[Array] = []
    for checkpoint in (ours, theirs):
        weights = _Lazy(checkpoint)
        decoded.append(decode(checkpoint.config, weights, ids_BT, mask_BT)[0])
        if ours.head == "sequence_classification":
            logits.append(classify(checkpoint.config, weights, ids_BT, mask_BT).logits)
            tops.append(logits[-1].argmax(-1))
        else:
            found = answer(checkpoint.config, weights, ids_BT, mask_BT)
            ends_2BT = np.stack([found.start_logits, found.end_logits])
            logits.append(ends_2BT[:, attended_BT])
            tops.append(np.where(attended_BT, ends_2BT, -np.inf).argmax(-1))
    states = tuple(_difference(a[attended_BT], b[attended_BT]) for a, b in zip(*decoded, strict=True))
    return FunctionCheck(
        hidden_states=states,
        first_divergent=next((index for index, value in enumerate(states) if value > 0), None),
        logits=_difference(*logits),
        top1_agreement=float((tops[0] == tops[1]).mean()),
        greedy_equal=True,
        greedy=(),
    )


def _batch(config: OPTConfig) -> tuple[Array, Array]:
    """Seeded ids (B, T) and a mask (B, T) whose second row begins with padding."""
    length = min(_LENGTH, config.max_position_embeddings)
    ids_BT = np.random.default_rng(_SEED).integers(0, config.vocab_size, (_BATCH, length))
    mask_BT = np.ones_like(ids_BT)
    mask_BT[1, : length // 4] = 0
    return ids_BT, mask_BT
