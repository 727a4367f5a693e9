"""What a text must contain: phrases and choices of phrases, and how far a text has come with them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self, TypeAlias, cast

from opt_common.errors import GenerationError

Phrase: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PhrasalConstraint:
    """One sequence of ids that the new tokens must contain.

    Args:
        token_ids: the ids, in order.

    Raises:
        GenerationError: for an empty sequence or something that is no id.
    """

    token_ids: Phrase

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _read_phrase(self.token_ids))

    @property
    def phrases(self) -> tuple[Phrase, ...]:
        """The one phrase."""
        return (self.token_ids,)


@dataclasses.dataclass(frozen=True)
class DisjunctiveConstraint:
    """Several sequences of ids, one of which the new tokens must contain.

    Args:
        nested_token_ids: the sequences.

    Raises:
        GenerationError: for no sequence, an empty one or something that is no id.
    """

    nested_token_ids: tuple[Phrase, ...]

    def __post_init__(self) -> None:
        phrases = tuple(map(_read_phrase, self.nested_token_ids))
        if not phrases:
            raise GenerationError("A DisjunctiveConstraint has no phrases, expected at least one.")
        object.__setattr__(self, "nested_token_ids", phrases)

    @property
    def phrases(self) -> tuple[Phrase, ...]:
        """The phrases, any of which will do."""
        return self.nested_token_ids


Constraint: TypeAlias = PhrasalConstraint | DisjunctiveConstraint


def _read_phrase(ids: Any) -> Phrase:
    if isinstance(ids, str) or not isinstance(ids, Sequence) or not ids:
        raise GenerationError(f"A phrase is {ids!r}, expected a list of ids that is not empty.")
    tokens: tuple[Any, ...] = tuple(cast(Sequence[Any], ids))
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise GenerationError(f"A phrase has {token!r}, expected ids: integers from 0 on.")
    return tokens


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a text has come: a value, one for each beam.

    A constraint is fulfilled once the new tokens contain one of its phrases, wherever it begins; prompts don't count.

    Attributes:
        constraints: what the text must contain.
        matched: for each constraint and each of its phrases, how many of the phrase's ids the text ends with; None
            for a constraint that is fulfilled.
    """

    constraints: tuple[Constraint, ...]
    matched: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def of(cls, constraints: Sequence[Constraint]) -> Self:
        """The progress of a text without new tokens."""
        return cls(tuple(constraints), tuple((0,) * len(constraint.phrases) for constraint in constraints))

    def after(self, token: int) -> Self:
        """The progress after one more token."""
        pairs = zip(self.constraints, self.matched, strict=True)
        return dataclasses.replace(self, matched=tuple(_advanced(*pair, token) for pair in pairs))

    @property
    def complete(self) -> bool:
        """Whether every constraint is fulfilled."""
        return all(counts is None for counts in self.matched)

    @property
    def next_tokens(self) -> tuple[int, ...]:
        """The tokens that lead on: with what has begun or, where nothing has, to any beginning."""
        begun: dict[int, None] = {}
        beginnings: dict[int, None] = {}
        for constraint, counts in zip(self.constraints, self.matched, strict=True):
            for phrase, count in zip(constraint.phrases, counts or (), strict=False):
                if counts and count == max(counts):
                    (begun if count else beginnings)[phrase[count]] = None
        return tuple(begun or beginnings)

    @property
    def bank(self) -> int:
        """How much is done, in tokens: what beams are sorted by before their scores.

        As Hugging Face's: the longest phrase for each constraint that is fulfilled, and the same less what is missing
        for the one that is furthest on.
        """
        longest = max(_longest(constraint) for constraint in self.constraints)
        fulfilled = sum(counts is None for counts in self.matched)
        begun = [
            longest - _longest(constraint) + max(counts)
            for constraint, counts in zip(self.constraints, self.matched, strict=True)
            if counts is not None and max(counts)
        ]
        return fulfilled * longest + max(begun, default=0)


def _longest(constraint: Constraint) -> int:
    return max(map(len, constraint.phrases))


def _advanced(constraint: Constraint, counts: tuple[int, ...] | None, token: int) -> tuple[int, ...] | None:
    """What is matched of a constraint after one more token; None once it is fulfilled."""
    if counts is None:
        return None
    pairs = [(phrase, _matched(phrase, count, token)) for phrase, count in zip(constraint.phrases, counts, strict=True)]
    return None if any(count == len(phrase) for phrase, count in pairs) else tuple(count for _, count in pairs)


def _matched(phrase: Phrase, count: int, token: int) -> int:
    """How many ids of a phrase a text ends with after a token, when it ended with `count` before."""
    end = (*phrase[:count], token)
    return next(size for size in range(len(end), -1, -1) if phrase[:size] == end[len(end) - size :])
