"""Assisted generation: several tokens are guessed, one step reads them all, and those that hold are kept.

Guesses come from a smaller model (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
and Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling") or from the text itself
(prompt lookup, Saxena 2023). The text is the model's own, whatever is guessed; guesses decide how soon it is there:

- Greedy: a guess holds where it is the likeliest token. The text is that of greedy search.
- Drawn, guesses from the text: in each place the token is drawn as in plain sampling, by the same number. A guess holds
  where it was drawn, which it is by its probability; any other token is then drawn by what the others have, as the rule
  below says of a guess that was certain. The text is that of plain sampling with the same seed.
- Drawn, guesses from a model: that model draws them, after the same processors. With its probability q and the model's
  p, a guess holds with probability min(1, p / q); in place of one that does not, a token is drawn by max(p - q, 0).
  Tokens then have the distribution p, but other numbers decide them than in plain sampling.

Each step reads as many guesses as any other, so that a compiler sees one shape: where the text has no guess, its last
token is repeated. Only behind the last position that a model has, tokens are read one by one.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from opt_common.decoding import TOKEN, Arrays, Choice, Prompt, Reader, Selection, Text, check_possible, details_of
from opt_common.errors import GenerationError
from opt_common.generation_config import DEFAULT_NGRAM_SIZE, GenerationConfig
from opt_common.processors import choose, softmax

Array = npt.NDArray[Any]

DRAWS = 3
"""How many numbers a step takes where a model draws guesses: for the token, for the guess, for whether it holds."""


def assisted(reader: Reader, prompt: Prompt, settings: GenerationConfig) -> Iterator[Arrays]:
    """Continue one row, several tokens a step; see the module's docstring.

    Yields:
        One token's "tokens", (1,), and its details, at a time.

    Raises:
        GenerationError: where the row has no token to go on with.
    """
    text = Text(prompt)
    details = details_of(settings)
    guesses: Guesses = Lookup(prompt, settings) if settings.assistant_model is None else Draft(reader, prompt, settings)
    new_ids: list[int] = []
    guessed_K = np.zeros(0, dtype=np.int64)
    found = reader.start(_choice(prompt, 0, Selection(details=details)))
    while True:
        held = leading(found["tokens"][:-1] == guessed_K)
        reader.forget(len(guessed_K) - held)
        for place in range(held + 1):
            one = {name: array[place : place + 1] for name, array in found.items()}
            check_possible(one["tokens"] < 0, np.zeros(1, dtype=bool), len(new_ids))
            yield one
            new_ids.append(int(one["tokens"][0]))
            if text.ended(one["tokens"])[0] or len(new_ids) == prompt.new_tokens:
                # As without guesses, all tokens but the last have been read.
                reader.forget(held - place)
                return
        if guesses.fit(len(new_ids)):
            guessed_K, choice = guesses.following(new_ids, details)
        else:
            guessed_K, choice = guessed_K[:0], _choice(prompt, len(new_ids), Selection(details=details))
        ids_K = np.concatenate([new_ids[-1:], guessed_K.clip(0)])
        found = reader.read(ids_K[None], choice)


def leading(flags: npt.NDArray[np.bool_]) -> int:
    """How many are True before the first that is not."""
    return int(np.cumprod(flags).sum())


class Guesses(Protocol):
    """Where guesses come from."""

    def fit(self, step: int) -> bool:
        """Whether there are positions for all guesses behind `step` new tokens."""
        ...

    def following(self, new_ids: Sequence[int], details: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], Choice]:
        """What may follow some new tokens, (K,), -1 for no guess, and how to check it."""
        ...


class Lookup:
    """Guesses from the text: what followed the last time that it went on as it does now.

    The longest of the endings of up to `max_matching_ngram_size` tokens that occurred before counts, in the last place
    where it did. Hugging Face takes the first place.
    """

    def __init__(self, prompt: Prompt, settings: GenerationConfig) -> None:
        self.prompt = prompt
        self.longest = settings.max_matching_ngram_size or DEFAULT_NGRAM_SIZE
        self.before = prompt.input_ids[0, prompt.attention_mask[0] == 1] if prompt.has_ids else prompt.input_ids[0, :0]

    def fit(self, step: int) -> bool:
        """See `Guesses`."""
        return self.prompt.has_room(step)

    def following(self, new_ids: Sequence[int], details: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], Choice]:
        """See `Guesses`."""
        ids = np.concatenate([self.before, np.array(new_ids, dtype=np.int64)])
        guessed_K = copied(ids, self.longest, self.prompt.guesses)
        return guessed_K, _check(self.prompt, len(new_ids), details)


def copied(ids: Array, longest: int, count: int) -> npt.NDArray[np.int64]:
    """What follows a text if it goes on as it did before, (count,); its last token again and again if it never did.

    Args:
        ids: the text.
        longest: the greatest number of last tokens to find again.
        count: how many tokens to copy, those copied before included.
    """
    start = len(ids) - 1
    for size in range(min(longest, len(ids) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        if len(places := np.flatnonzero((windows == ids[-size:]).all(1))):
            start = int(places[-1]) + size
            break
    text = ids.tolist()
    for place in range(start, start + count):
        text.append(text[place])
    return np.array(text[len(ids) :], dtype=np.int64)


class Draft:
    """Guesses by another model, which reads what the model reads."""

    def __init__(self, reader: Reader, prompt: Prompt, settings: GenerationConfig) -> None:
        self.prompt = prompt
        self.settings = settings
        self.main = reader
        self.positions = settings.assistant_model.config.max_position_embeddings
        self.reader: Reader | None = None
        # The guesses that it has read, and how many new tokens it had read before them.
        self.read: list[int] = []
        self.base = 0

    def fit(self, step: int) -> bool:
        """See `Guesses`."""
        return self.prompt.has_room(step, self.positions)

    def following(self, new_ids: Sequence[int], details: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], Choice]:
        """See `Guesses`."""
        prompt, step = self.prompt, len(new_ids)
        guessed: list[int] = []
        shares: list[Any] = []
        found = self._catch_up(new_ids)
        for place in range(prompt.guesses):
            if guessed:
                assert self.reader is not None
                found = self.reader.read(np.array([[max(guessed[-1], 0)]]), self._choice(step + place))
            guessed.append(int(found["tokens"][0]))
            shares += [found["shares"]] if "shares" in found else []
        self.base, self.read = step, guessed[:-1]
        return np.array(guessed, dtype=np.int64), _check(prompt, step, details, guessed, shares)

    def _catch_up(self, new_ids: Sequence[int]) -> Arrays:
        """Read the new tokens that are still unread, which are one or two after the first call, and guess the next."""
        choice = self._choice(len(new_ids))
        if self.reader is None:
            self.reader = self._start(new_ids)
            return self.reader.start(choice)
        after = np.array(new_ids[self.base : self.base + len(self.read)])
        same = leading(after == np.array(self.read[: len(after)]))
        self.reader.forget(len(self.read) - same)
        return self.reader.read(np.array([new_ids[self.base + same :]]), choice)

    def _start(self, new_ids: Sequence[int]) -> Reader:
        ids_BT = np.concatenate([self.prompt.input_ids, [new_ids]], axis=1)
        mask_BT = np.concatenate([self.prompt.attention_mask, np.ones_like([new_ids])], axis=1)
        prompt = dataclasses.replace(
            self.prompt, input_ids=ids_BT, attention_mask=mask_BT, inputs_embeds=None, past=None
        )
        decoder = self.main.decoder.other(self.settings.assistant_model, prompt)
        return Reader(decoder, prompt, use_cache=self.settings.use_cache)

    def _choice(self, step: int) -> Choice:
        uniforms = self.prompt.uniforms
        if uniforms is None:
            return _choice(self.prompt, step, TOKEN)
        return Choice(gates_P=self.prompt.gates(step), selection=Selection("draft"), arguments=(uniforms[:, step, 1],))


def _choice(prompt: Prompt, step: int, selection: Selection) -> Choice:
    """One token, as without guesses."""
    uniforms = prompt.uniforms
    return Choice(
        gates_P=prompt.gates(step),
        selection=selection,
        arguments=() if uniforms is None else (uniforms[:, step, 0],),
    )


def _check(
    prompt: Prompt,
    step: int,
    details: tuple[str, ...],
    guessed: Sequence[int] = (),
    shares: Sequence[Any] = (),
) -> Choice:
    """How the tokens after each of the guesses are selected, and the first one.

    Args:
        prompt: what is continued.
        step: how many new tokens there are before the guesses.
        details: what is asked for.
        guessed: the guesses, -1 for none.
        shares: the distribution that each was drawn from, (1, V); none where they were not drawn.
    """
    R = prompt.guesses + 1
    gates_PR1 = np.stack([prompt.gates(step + place) for place in range(R)], axis=1)[..., None]
    uniforms = None if prompt.uniforms is None else prompt.uniforms[0, step : step + R]
    if not shares:
        selection = Selection("tokens", R, details)
        return Choice(gates_P=gates_PR1, selection=selection, arguments=() if uniforms is None else (uniforms[:, 0],))
    assert uniforms is not None
    # Behind the last guess there is none, and so no distribution.
    guessed_R = np.array([*guessed, -1], dtype=np.int32)
    return Choice(
        gates_P=gates_PR1,
        selection=Selection("checked", R, details),
        arguments=(guessed_R, uniforms[:, 0], uniforms[:, 2], *shares, shares[-1]),
    )


def checked(scores_BV: Array, shares_BV: Array, guessed_B: Array, uniforms_B: Array, chances_B: Array) -> Array:
    """The guess where it holds, another token where it does not: what the function of this name in each backend does.

    Args:
        scores_BV: scores after the processors, of the model whose text it is.
        shares_BV: the probabilities that each guess was drawn with.
        guessed_B: the guesses; -1 for none, where a token is drawn by the scores.
        uniforms_B: numbers from [0, 1) that decide which other token it is.
        chances_B: numbers from [0, 1) that decide whether a guess holds.

    Returns:
        (B,) ids; -1 where every token is ruled out, or scores are not numbers.
    """
    probabilities_BV = softmax(scores_BV)
    shares_BV = np.where(guessed_B[:, None] >= 0, shares_BV, 0)
    places_B1 = guessed_B.clip(0)[:, None]
    guess_B, share_B = (np.take_along_axis(array, places_B1, axis=1)[:, 0] for array in (probabilities_BV, shares_BV))
    holds_B = (guessed_B >= 0) & (chances_B * share_B < guess_B)
    left_BV = np.where(probabilities_BV > shares_BV, probabilities_BV - shares_BV, 0)
    # Where rounding leaves nothing, both distributions are the same.
    left_BV = np.where(left_BV.sum(1, keepdims=True) > 0, left_BV, probabilities_BV)
    with np.errstate(divide="ignore"):
        others_B = choose(np.log(left_BV), uniforms_B)
    return np.where(scores_BV.max(1) > -np.inf, np.where(holds_B, guessed_B, others_B), -1)


def check_assistant(model: Any, settings: GenerationConfig) -> None:
    """Whether a model can guess for another.

    Raises:
        GenerationError: for a model of another class or vocabulary.
    """
    draft = settings.assistant_model
    if draft is None:
        return
    if not isinstance(draft, type(model)):
        raise GenerationError(
            f"assistant_model is {type(draft).__name__}, expected {type(model).__name__}, the class of the model it "
            "guesses for. Load it with that class's from_pretrained."
        )
    if draft.config.vocab_size != model.config.vocab_size:
        raise GenerationError(
            f"assistant_model has a vocabulary of {draft.config.vocab_size} tokens and the model one of "
            f"{model.config.vocab_size}, expected the same. Pass a model with the same tokenizer."
        )


def check_one_row(rows: int, settings: GenerationConfig, *, has_ids: bool) -> None:
    """Whether what is to be continued is one text that guesses can be made for.

    Raises:
        GenerationError: for several rows, or embeddings alone with another model.
    """
    if rows != 1:
        raise GenerationError(
            f"Assisted generation continues one prompt at a time, got {rows}: their guesses hold to different lengths. "
            "Pass them one by one, or leave assistant_model and prompt_lookup_num_tokens out."
        )
    if settings.assistant_model is not None and not has_ids:
        raise GenerationError("assistant_model reads ids, but got inputs_embeds alone: pass their input_ids too.")
