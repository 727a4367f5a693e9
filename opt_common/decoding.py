"""The frame of every decoding strategy: what one step of a model is told, and what of it comes to the host.

A strategy is a rule on the host, over small arrays: which tokens are read next, by which rows, and what is selected
from the scores that follow. A backend supplies a `Decoder`: its cache and all vocabulary-sized arithmetic stay on its
own device, compiled, one program a step.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from opt_common.guidance import Guidance
from opt_common.outputs import GenerateOutput
from opt_common.processors import Processor
from opt_common.stopping import Stopping

Ids: TypeAlias = npt.NDArray[np.integer[Any]]

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""What a selection brings to the host, by name."""

ON_DEVICE = frozenset({"shares"})
"""What of it stays on the device, as the framework's array, for the arguments of another step."""


class Selection(NamedTuple):
    """What comes to the host from a step's scores: the part that a compiler must know.

    Attributes:
        name: a function of the backends' `selection.py`.
        size: what shapes its result, such as how many continuations it keeps; 0 where nothing does.
        details: what else is asked for: "logprobs" of the tokens selected, all "scores" after and all "logits" before
            the processors. The last two are as large as the vocabulary.
        layers: the layers whose predictions the last one's is contrasted with; see `opt_common.dola`.
    """

    name: str = "token"
    size: int = 0
    details: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def reach(self) -> int:
        """After how many of the last tokens something is selected; see `opt_common.assisted`."""
        return self.size if self.name in {"tokens", "checked"} else 1

    @property
    def compares_states(self) -> bool:
        """Whether the last hidden states of all that was read are kept; see `opt_common.contrastive`."""
        return self.name in {"candidates", "contrast"}


TOKEN = Selection()
"""One token a row."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """How one step goes on: from which rows, with which processors, to which selection.

    Attributes:
        gates_P: the number of each processor in this step; (P, rows, 1) where several tokens' successors are selected.
        selection: what comes to the host.
        arguments: arrays that the selection is given.
        rows_B: the rows of the step before that this step's rows continue, in any number, each as often as it is
            named; None continues each row by itself.
    """

    gates_P: npt.NDArray[np.float64]
    selection: Selection = TOKEN
    arguments: tuple[npt.NDArray[Any], ...] = ()
    rows_B: Ids | None = None


class Decoder(Protocol):
    """One run of a model over a batch of texts. What a backend supplies."""

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Arrays:
        """Read the prompts, padded on the left, and select what follows the last token of each."""
        ...

    def decode(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Continue the rows that the choice names by one or several tokens each, and select what follows the last."""
        ...

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens of every row, as if they had not been read."""
        ...

    def other(self, model: Any, prompt: "Prompt") -> "Decoder":
        """A decoder of the same framework for another model."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """Prompts as every decoder takes them: each row's attended tokens, in order, at the right end.

    Moving masked slots to the left changes nothing that is attended to: positions count attended tokens only.

    Attributes:
        input_ids: (B, T) integers.
        attention_mask: (B, T): zeros, then ones.
        new_tokens: how many tokens to append at most.
        processors: what is done to the scores of each step.
        uniforms: (B, new_tokens, draws) numbers from [0, 1) that decide what is drawn; None where nothing is.
        stopping: what ends a row.
        inputs_embeds: (B, T, E), what is read in place of the tokens' rows of the table; None reads the tokens.
        has_ids: False where `input_ids` mean nothing, because embeddings came without ids.
        past: the first tokens, which were read before, or None.
        order: (B, T) the column in which each token was given.
        layers: what predictions are contrasted with; see `Selection`.
        guidance: what else is read beside the prompts, or None.
        guesses: how many tokens a step may read that the text does not have yet; see `opt_common.assisted`.
        positions: how many tokens the model has positions for.
    """

    input_ids: Ids
    attention_mask: Ids
    new_tokens: int
    processors: tuple[Processor, ...] = ()
    uniforms: npt.NDArray[np.float32] | None = None
    stopping: Stopping = dataclasses.field(default_factory=Stopping)
    inputs_embeds: npt.NDArray[Any] | None = None
    has_ids: bool = True
    past: "Past | None" = None
    order: Ids | None = None
    layers: tuple[int, ...] = ()
    guidance: Guidance | None = None
    guesses: int = 0
    positions: int = 0

    @property
    def most_tokens(self) -> int:
        """How many slots a cache needs behind the prompt."""
        return self.new_tokens + self.guesses

    def has_room(self, step: int, positions: int | None = None) -> bool:
        """Whether all guesses behind `step` new tokens have positions, in this model and in one of so many."""
        positions = self.positions if positions is None else min(self.positions, positions)
        return int(self.attention_mask.sum()) + step + self.guesses <= positions

    @property
    def past_length(self) -> int:
        """How many of the T tokens are not read, since the cache has them."""
        return 0 if self.past is None else self.past.length

    @property
    def margin(self) -> int:
        """How many columns of padding the prompts have where longer ones are read beside them."""
        return 0 if self.guidance is None else max(self.guidance.input_ids.shape[1] - self.input_ids.shape[1], 0)

    def gates(self, step: int) -> npt.NDArray[np.float64]:
        """The number of each processor when `step` new tokens are there, (P,)."""
        length = self.input_ids.shape[1] + step
        return np.array([processor.gate(length) for processor in self.processors], dtype=np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Past:
    """What was read before.

    Attributes:
        cache: a `KVCache` of the framework.
        length: how many of its tokens count.
        rows_B: which of its rows each row that is read continues.
    """

    cache: Any
    length: int
    rows_B: Ids


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Generated:
    """The new tokens of a run, and what was asked for beside them.

    R rows: the continuations of one prompt follow each other.

    Attributes:
        new_ids: (R, new) integers, finished rows filled with the pad token.
        token_logprobs: (R, new) log-probability of each new token where it was chosen, after all processors; 0 for
            padding.
        sequences_scores: (R,) what beams are ranked by; None without beams.
        beam_indices: (R, new) the row, of those in the step, that each token continued; -1 for padding; None without
            beams.
        scores: a (rows, V) array a step: scores after the processors.
        logits: likewise, before them.
    """

    new_ids: Ids
    token_logprobs: npt.NDArray[Any] | None = None
    sequences_scores: npt.NDArray[Any] | None = None
    beam_indices: Ids | None = None
    scores: tuple[npt.NDArray[Any], ...] | None = None
    logits: tuple[npt.NDArray[Any], ...] | None = None

    def after(self, input_ids: npt.NDArray[Any] | None) -> Ids:
        """Each prompt, as it was given, with its new tokens behind it; (R, new) where there are no prompts' ids."""
        if input_ids is None:
            return self.new_ids
        ids_RT = np.repeat(input_ids, len(self.new_ids) // len(input_ids), axis=0)
        return np.concatenate([ids_RT, self.new_ids.astype(ids_RT.dtype)], axis=1)

    def output(
        self, sequences: Any, array: Callable[[npt.NDArray[Any]], Any], past_key_values: Any = None
    ) -> GenerateOutput:
        """The same as users get it.

        Args:
            sequences: prompts and new tokens, in the framework's array.
            array: makes such an array.
            past_key_values: the cache of what was read, or None.
        """
        singles = {name: getattr(self, name) for name in ("token_logprobs", "sequences_scores", "beam_indices")}
        several = {name: getattr(self, name) for name in ("scores", "logits")}
        return GenerateOutput(
            sequences=sequences,
            past_key_values=past_key_values,
            **{name: None if value is None else array(value) for name, value in singles.items()},
            **{name: None if value is None else tuple(map(array, value)) for name, value in several.items()},
        )


class Reader:
    """A decoder that, without a cache, reads each text anew; with one, the decoder as it is.

    Where a run is guided, each row has a second one below: it reads the same new tokens, and strategies do not see it.
    """

    def __init__(self, decoder: Decoder, prompt: Prompt, *, use_cache: bool) -> None:
        self.decoder = decoder
        self.use_cache = use_cache
        self.guided = prompt.guidance is not None
        self.rows = len(prompt.input_ids)
        self.ids_BT, self.mask_BT = (
            (prompt.input_ids, prompt.attention_mask)
            if prompt.guidance is None
            else prompt.guidance.below(prompt.input_ids, prompt.attention_mask)
        )

    def start(self, choice: Choice) -> Arrays:
        """Read the prompts."""
        return self.decoder.prefill(self.ids_BT, self.mask_BT, choice)

    def read(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Continue the rows that the choice names."""
        if self.guided:
            rows_B = None if choice.rows_B is None else np.concatenate([choice.rows_B, choice.rows_B + self.rows])
            self.rows = len(ids_BT)
            ids_BT, choice = np.tile(ids_BT, (2, 1)), dataclasses.replace(choice, rows_B=rows_B)
        if self.use_cache:
            return self.decoder.decode(ids_BT, choice)
        if choice.rows_B is not None:
            self.ids_BT, self.mask_BT = self.ids_BT[choice.rows_B], self.mask_BT[choice.rows_B]
        self.ids_BT = np.concatenate([self.ids_BT, ids_BT], axis=1)
        self.mask_BT = np.concatenate([self.mask_BT, np.ones_like(ids_BT)], axis=1)
        return self.start(dataclasses.replace(choice, rows_B=None))

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens of every row."""
        if self.use_cache:
            self.decoder.forget(count)
        else:
            length = self.ids_BT.shape[1] - count
            self.ids_BT, self.mask_BT = self.ids_BT[:, :length], self.mask_BT[:, :length]


def decode_tokens(reader: Reader, prompt: Prompt, settings: GenerationConfig) -> Iterator[Arrays]:
    """Continue each row by itself, token by token: the likeliest, or one drawn by probability.

    A row is finished once `prompt.stopping` says so; from then on it emits the pad token. The run stops when every row
    is finished, or after `prompt.new_tokens` steps.

    Yields:
        Each step's "tokens", (B,), and its details.

    Raises:
        GenerationError: where a row that is not finished has no token to go on with.
    """
    text = Text(prompt)
    finished_B = np.zeros(len(prompt.input_ids), dtype=bool)
    found: Arrays = {}
    for step in range(prompt.new_tokens):
        choice = Choice(
            gates_P=prompt.gates(step),
            selection=Selection(details=details_of(settings), layers=prompt.layers),
            arguments=() if prompt.uniforms is None else (prompt.uniforms[:, step, 0],),
        )
        found = reader.read(found["tokens"][:, None], choice) if found else reader.start(choice)
        check_possible(found["tokens"] < 0, finished_B, step)
        found = {**found, "tokens": np.where(finished_B, settings.padding, found["tokens"])}
        if "logprobs" in found:
            found = {**found, "logprobs": np.where(finished_B, 0, found["logprobs"])}
        yield found
        finished_B |= text.ended(found["tokens"])
        if finished_B.all():
            return


class Text:
    """The text so far, as far as the rules that end a row ask for it."""

    def __init__(self, prompt: Prompt) -> None:
        self.stopping = prompt.stopping
        self.ids_BT = prompt.input_ids if prompt.has_ids else prompt.input_ids[:, :0]

    def ended(self, tokens_B: Ids) -> npt.NDArray[np.bool_]:
        """Take the next token of each row, and say which rows end with it."""
        if not self.stopping.reads_text:
            return self.stopping.ended(tokens_B[:, None])
        self.ids_BT = np.concatenate([self.ids_BT, tokens_B[:, None]], axis=1)
        return self.stopping.ended(self.ids_BT)


def collect(steps: Iterator[Arrays]) -> Generated:
    """The results of all steps as one."""
    found = list(steps)

    def each(name: str) -> tuple[npt.NDArray[Any], ...] | None:
        return tuple(arrays[name] for arrays in found) if name in found[0] else None

    logprobs = each("logprobs")
    return Generated(
        new_ids=np.stack([arrays["tokens"] for arrays in found], axis=1),
        token_logprobs=None if logprobs is None else np.stack(logprobs, axis=1),
        scores=each("scores"),
        logits=each("logits"),
    )


def details_of(settings: GenerationConfig) -> tuple[str, ...]:
    """What settings ask for beside the tokens."""
    asked = {
        "logprobs": settings.return_dict_in_generate,
        "scores": settings.output_scores,
        "logits": settings.output_logits,
    }
    return tuple(name for name, wanted in asked.items() if wanted)


def check_possible(stuck_B: npt.NDArray[np.bool_], finished_B: npt.NDArray[np.bool_], step: int) -> None:
    """Raise GenerationError where a row that is not finished has no token to go on with."""
    if rows := np.flatnonzero(stuck_B & ~finished_B).tolist():
        raise GenerationError(
            f"Row {rows[0]} cannot go on after {step} new tokens: the settings rule out every token, or the model's "
            "scores are not numbers. Loosen bad_words_ids, suppress_tokens or no_repeat_ngram_size; in float16, try "
            'dtype="float32".'
        )
