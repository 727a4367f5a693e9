"""The rules of decoding, stated once: what a prompt is, what ends a row, what a finished row emits, when to stop.

A backend supplies a `Decoder`: one prefill and one step, compiled, with its cache and its vocabulary-sized arithmetic
on its own device. Only token ids, one a row and step, come to the host.
"""

import collections
import dataclasses
import hashlib
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from opt_common.config import OPTConfig
from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from opt_common.inputs import check_inputs
from opt_common.processors import Processor, processors

Ids: TypeAlias = npt.NDArray[np.integer[Any]]

DEFAULT_MAX_LENGTH = 20
"""Prompt and new tokens together, when nothing is said: Hugging Face's default."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """Prompts as every decoder takes them: each row's attended tokens, in order, at the right end.

    Moving masked slots to the left changes nothing that is attended to: positions count attended tokens only.

    Attributes:
        input_ids: (B, T) integers.
        attention_mask: (B, T): zeros, then ones.
        new_tokens: how many tokens to append at most.
        processors: what is done to the scores of each step.
        uniforms: (B, new_tokens) numbers from [0, 1) that decide what is drawn; None takes the likeliest tokens.
    """

    input_ids: Ids
    attention_mask: Ids
    new_tokens: int
    processors: tuple[Processor, ...] = ()
    uniforms: npt.NDArray[np.float32] | None = None

    def choice(self, step: int) -> "Choice":
        """How the token of a step, counted from 0, is chosen."""
        length = self.input_ids.shape[1] + step
        gates_P = np.array([processor.gate(length) for processor in self.processors], dtype=np.float64)
        return Choice(gates_P=gates_P, uniforms_B=None if self.uniforms is None else self.uniforms[:, step])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """How one step's tokens are chosen.

    Attributes:
        gates_P: the number of each processor in this step.
        uniforms_B: what decides each row's draw; None takes the likeliest token.
    """

    gates_P: npt.NDArray[np.float64]
    uniforms_B: npt.NDArray[np.float32] | None


class Decoder(Protocol):
    """One run of a model over a batch of prompts, chosen tokens in and out. What a backend supplies."""

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Ids:
        """Read the prompts, padded on the left, and return the next token of each row, (B,)."""
        ...

    def decode_one_token(self, tokens_B: Ids, choice: Choice) -> Ids:
        """Read one more token of each row and return the next, (B,); -1 where every token is ruled out."""
        ...


def read_prompt(
    config: OPTConfig,
    settings: GenerationConfig,
    input_ids: npt.NDArray[Any],
    attention_mask: npt.NDArray[Any] | None,
    functions: Sequence[Callable[[Any, Any], Any]] = (),
) -> Prompt:
    """Check prompts and bring them into the decoders' form, each as often as it is to be continued.

    Args:
        config: the model's configuration.
        settings: how to continue.
        input_ids: (B, T) integers.
        attention_mask: (B, T) of ones and zeros, padding anywhere; None means no padding.
        functions: the user's own processors.

    Raises:
        InputError: for ids out of range, an empty prompt or a mask that does not fit.
        GenerationError: for a row without any token, or a continuation with no room.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    values = {name: np.asarray(array) for name, array in given.items() if array is not None}
    check_inputs(config, shapes={name: array.shape for name, array in values.items()}, values=values)
    ids_BT = values["input_ids"]
    if attention_mask is None and config.pad_token_id is not None and (ids_BT[:, [0, -1]] == config.pad_token_id).any():
        warnings.warn(
            f"A prompt begins or ends with the pad token {config.pad_token_id}, and no attention_mask was given: "
            "padding is read as text. Pass the tokenizer's attention_mask.",
            stacklevel=4,
        )
    mask_BT = values.get("attention_mask", np.ones_like(ids_BT)).astype(np.int64)
    if empty := np.flatnonzero(mask_BT.sum(1) == 0).tolist():
        raise GenerationError(
            f"Prompt {empty[0]} is empty: its attention_mask is all zeros. Give it at least one token."
        )

    length = ids_BT.shape[1]
    new_tokens = settings.max_new_tokens
    if new_tokens is None:
        max_length = settings.max_length or DEFAULT_MAX_LENGTH
        new_tokens = max_length - length
        if new_tokens <= 0:
            raise GenerationError(
                f"The prompt has {length} tokens and max_length is {max_length}: no room is left. Pass max_new_tokens."
            )
    longest, limit = int(mask_BT.sum(1).max()), config.max_position_embeddings
    # The last new token is never read, so it needs no position.
    if longest + new_tokens - 1 > limit:
        raise GenerationError(
            f"A prompt of {longest} tokens and {new_tokens} new ones do not fit: this model has positions for {limit}. "
            f"Shorten the prompt, or pass max_new_tokens={max(limit - longest + 1, 0)} or less."
        )
    # A stable sort of the mask moves each row's padding to its left and keeps the order of its tokens.
    order_BT = np.argsort(mask_BT, axis=1, kind="stable")
    ids_BT, mask_BT = (
        np.repeat(np.take_along_axis(array_BT, order_BT, axis=1), settings.num_return_sequences, axis=0)
        for array_BT in (ids_BT, mask_BT)
    )
    return Prompt(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        new_tokens=new_tokens,
        processors=processors(
            settings,
            vocab_size=config.vocab_size,
            prompt_length=length,
            max_length=length + new_tokens,
            functions=functions,
        ),
        uniforms=draw_uniforms(ids_BT, mask_BT, new_tokens, settings.seed) if settings.do_sample else None,
    )


def draw_uniforms(input_ids: Ids, attention_mask: Ids, new_tokens: int, seed: int | None) -> npt.NDArray[np.float32]:
    """The numbers that decide what is drawn: (B, new_tokens) from [0, 1).

    A row's numbers depend on the seed, the row's own text and how many rows with the same text are before it, and on
    nothing else: a row of a batch is continued as it is alone, and copies of one prompt each in their own way.

    Args:
        input_ids: (B, T) integers.
        attention_mask: (B, T).
        new_tokens: how many numbers for each row.
        seed: None draws one.
    """
    seed = secrets.randbits(63) if seed is None else seed
    copies: collections.Counter[bytes] = collections.Counter()
    rows: list[npt.NDArray[np.float32]] = []
    for ids_T, mask_T in zip(input_ids, attention_mask, strict=True):
        text = ids_T[mask_T == 1].astype("<i8").tobytes()
        name = hashlib.blake2b(text, digest_size=8, key=(seed % 2**64).to_bytes(8, "little")).digest()
        # Each copy has a stretch of the generator's counter for itself.
        key = np.array([seed % 2**64, int.from_bytes(name, "little")], dtype=np.uint64)
        philox = np.random.Philox(key=key, counter=np.array([0, 0, 0, copies[text]], dtype=np.uint64))
        rows.append(np.random.Generator(philox).random(new_tokens, dtype=np.float32))
        copies[text] += 1
    return np.stack(rows)


def decode(decoder: Decoder, prompt: Prompt, settings: GenerationConfig) -> Iterator[Ids]:
    """Run a decoder, one (B,) array of tokens a step.

    A row is finished once it has emitted an id of `eos_token_id`; from then on it emits the pad token. The run stops
    when every row is finished, or after `prompt.new_tokens` steps.

    Raises:
        GenerationError: where a row that is not finished has no token to go on with.
    """
    eos = np.asarray(settings.eos_token_id, dtype=np.int64)
    ids_BT, mask_BT = prompt.input_ids, prompt.attention_mask
    finished_B = np.zeros(len(ids_BT), dtype=bool)
    tokens_B = decoder.prefill(ids_BT, mask_BT, prompt.choice(0))
    for step in range(prompt.new_tokens):
        _check_possible(tokens_B, finished_B, step)
        tokens_B = np.where(finished_B, settings.padding, tokens_B)
        yield tokens_B
        finished_B |= np.isin(tokens_B, eos)
        if finished_B.all() or step + 1 == prompt.new_tokens:
            return
        if settings.use_cache:
            tokens_B = decoder.decode_one_token(tokens_B, prompt.choice(step + 1))
        else:
            ids_BT = np.concatenate([ids_BT, tokens_B[:, None]], axis=1)
            mask_BT = np.concatenate([mask_BT, np.ones_like(mask_BT[:, :1])], axis=1)
            tokens_B = decoder.prefill(ids_BT, mask_BT, prompt.choice(step + 1))


def _check_possible(tokens_B: Ids, finished_B: npt.NDArray[np.bool_], step: int) -> None:
    if stuck := np.flatnonzero((tokens_B < 0) & ~finished_B).tolist():
        raise GenerationError(
            f"Row {stuck[0]} cannot go on after {step} new tokens: the settings rule out every token, or the model's "
            "scores are not numbers. Loosen bad_words_ids, suppress_tokens or no_repeat_ngram_size; in float16, try "
            'dtype="float32".'
        )


def bucket(length: int) -> int:
    """The padded length that stands for `length`: 16, 24, 32, 48, 64, 96, … So a compiler sees few shapes."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
