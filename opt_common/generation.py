"""The rules of decoding, stated once: what a prompt is, which strategy continues it, and what decides its draws.

A strategy itself is in `opt_common.decoding` (token by token) or in a module of its own. A backend supplies the
`Decoder` that it drives.
"""

import collections
import hashlib
import secrets
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opt_common.beams import continuations, search
from opt_common.config import OPTConfig
from opt_common.decoding import Decoder, Generated, Ids, Prompt, Reader, collect, decode_tokens
from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from opt_common.inputs import check_inputs
from opt_common.processors import processors
from opt_common.strategies import BEAM_STRATEGIES, SAMPLING_STRATEGIES

DEFAULT_MAX_LENGTH = 20
"""Prompt and new tokens together, when nothing is said: Hugging Face's default."""


def run(decoder: Decoder, prompt: Prompt, settings: GenerationConfig) -> Generated:
    """Continue prompts by the strategy that some settings ask for.

    Raises:
        GenerationError: where a row has no token to go on with.
    """
    reader = Reader(decoder, prompt, use_cache=settings.use_cache)
    if settings.strategy in BEAM_STRATEGIES:
        return search(reader, prompt, settings)
    return collect(decode_tokens(reader, prompt, settings))


def read_prompt(
    config: OPTConfig,
    settings: GenerationConfig,
    input_ids: npt.NDArray[Any],
    attention_mask: npt.NDArray[Any] | None,
    functions: Sequence[Callable[[Any, Any], Any]] = (),
) -> Prompt:
    """Check prompts and bring them into the decoders' form, each as often as it is to be continued by itself.

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
    beams = settings.strategy in BEAM_STRATEGIES
    draws = continuations(settings) if beams else 1
    ids_BT, mask_BT = (
        np.repeat(np.take_along_axis(array_BT, order_BT, axis=1), 1 if beams else settings.num_return_sequences, axis=0)
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
        uniforms=draw_uniforms(ids_BT, mask_BT, new_tokens, settings.seed, draws=draws)
        if settings.strategy in SAMPLING_STRATEGIES
        else None,
    )


def draw_uniforms(
    input_ids: Ids, attention_mask: Ids, new_tokens: int, seed: int | None, *, draws: int = 1
) -> npt.NDArray[np.float32]:
    """The numbers that decide what is drawn: (B, new_tokens, draws) from [0, 1).

    A row's numbers depend on the seed, the row's own text and how many rows with the same text are before it, and on
    nothing else: a row of a batch is continued as it is alone, and copies of one prompt each in their own way.

    Args:
        input_ids: (B, T) integers.
        attention_mask: (B, T).
        new_tokens: for how many steps.
        seed: None draws one.
        draws: how many numbers a step takes.
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
        rows.append(np.random.Generator(philox).random((new_tokens, draws), dtype=np.float32))
        copies[text] += 1
    return np.stack(rows)


def bucket(length: int) -> int:
    """The padded length that stands for `length`: 16, 24, 32, 48, 64, 96, … So a compiler sees few shapes."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
