"""What ends a row: ids, texts, a length of time, or the user's own rule."""

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from opt_common.streaming import TokenBytes
from opt_common.tokenizer import OPTTokenizer

Ids = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]
Criterion = Callable[..., Any]
"""A user's rule: takes ids (B, T), padded on the left, the newest token last, as an array of the framework on the host,
and returns True or False for all rows or (B,) of them. Hugging Face's form, which takes scores too, gets None for them.
"""


class StopStrings:
    """Tells whether a text ends with a token that completes one of some texts, wherever the texts' tokens begin.

    Args:
        texts: what ends a row.
        tokenizer: whose ids are asked about.
    """

    def __init__(self, texts: Sequence[str], tokenizer: OPTTokenizer) -> None:
        self._texts = tuple(text.encode() for text in texts)
        self._tokens = TokenBytes(tokenizer)

    def completed(self, ids: Sequence[int] | Ids) -> bool:
        """Whether the last id of a row completes a text. A text may begin in the prompt, but not end in it."""
        longest = max(map(len, self._texts))
        new, before = self._tokens(int(ids[-1])), b""
        place = len(ids) - 1
        while place and len(before) < longest - 1:
            place -= 1
            before = self._tokens(int(ids[place])) + before
        # As much as a text can reach back without being complete before the new token.
        return any(text in before[len(before) - min(len(before), len(text) - 1) :] + new for text in self._texts)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stopping:
    """Every reason to end a row, for every strategy.

    Attributes:
        eos_token_id: ids that end a row.
        stop_strings: texts that do, or None.
        criteria: the user's rules.
        deadline: when, by `time.monotonic`, every row ends, or None.
        to_framework: makes a framework's array of ids, for the user's rules.
    """

    eos_token_id: tuple[int, ...] = ()
    stop_strings: StopStrings | None = None
    criteria: tuple[Criterion, ...] = ()
    deadline: float | None = None
    to_framework: Callable[[Ids], Any] = np.asarray

    @property
    def reads_text(self) -> bool:
        """Whether more than the newest token decides."""
        return self.stop_strings is not None or bool(self.criteria)

    def ended(self, ids_BT: Ids) -> Flags:
        """Which rows end with their newest token, (B,).

        Args:
            ids_BT: prompts, padded on the left, and new tokens; the newest token alone will do where `reads_text` is
                False.

        Raises:
            GenerationError: for a rule of the user's whose answer is neither True, False nor one of them for each row.
        """
        # np.isin says the same, and takes longer than all the rest here.
        ended_B: Flags = (ids_BT[:, -1:] == np.array(self.eos_token_id, dtype=np.int64)).any(axis=1)
        if self.stop_strings is not None:
            ended_B |= [self.stop_strings.completed(ids_T) for ids_T in ids_BT]
        if self.criteria:
            ids = self.to_framework(ids_BT)
            for criterion in self.criteria:
                ended_B |= _answer(criterion, ids, len(ids_BT))
        if self.deadline is not None and time.monotonic() > self.deadline:
            ended_B[:] = True
        return ended_B


def read_stopping(
    settings: GenerationConfig,
    tokenizer: OPTTokenizer | None,
    criteria: Criterion | Iterable[Criterion] | None,
    to_framework: Callable[[Ids], Any],
) -> Stopping:
    """The reasons to end a row that a call of `generate` gives; its time begins now.

    Raises:
        GenerationError: for stop strings without a tokenizer, or a criterion that can't be called.
    """
    if settings.stop_strings and tokenizer is None:
        raise GenerationError(
            f"stop_strings is {list(settings.stop_strings)}, but the text of a token is only known to the tokenizer. "
            "Pass tokenizer=."
        )
    if criteria is None:
        several: tuple[Any, ...] = ()
    else:
        several = (criteria,) if callable(criteria) else tuple(criteria)
    if wrong := [type(criterion).__name__ for criterion in several if not callable(criterion)]:
        raise GenerationError(
            f"stopping_criteria has a {wrong[0]}, expected functions that take ids (batch, length) and return True "
            "or False, for all rows or for each."
        )
    return Stopping(
        eos_token_id=settings.eos_token_id,
        stop_strings=StopStrings(settings.stop_strings, tokenizer) if settings.stop_strings and tokenizer else None,
        criteria=several,
        deadline=None if settings.max_time is None else time.monotonic() + settings.max_time,
        to_framework=to_framework,
    )


def _answer(criterion: Criterion, ids: Any, rows: int) -> Flags:
    flags: npt.NDArray[Any] = np.asarray(criterion(ids, None) if _takes_scores(criterion) else criterion(ids))
    if flags.dtype != np.bool_ or flags.shape not in {(), (1,), (rows,)}:
        raise GenerationError(
            f"A stopping criterion returned {flags.dtype} of shape {flags.shape}, expected True or False, or an array "
            f"({rows},) of them: one for each row."
        )
    return np.broadcast_to(flags, (rows,))


def _takes_scores(criterion: Criterion) -> bool:
    """Whether a criterion has Hugging Face's form, (input_ids, scores, **kwargs)."""
    try:
        parameters = inspect.signature(criterion).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
    ]
    return len(required) > 1
