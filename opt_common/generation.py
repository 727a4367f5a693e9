"""The rules of decoding, stated once: what a prompt is, which strategy continues it, and what decides its draws.

A strategy itself is in `opt_common.decoding` (token by token) or in a module of its own. A backend supplies the
`Decoder` that it drives.
"""

import collections
import hashlib
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opt_common.assisted import DRAWS, assisted, check_one_row
from opt_common.beams import continuations, search
from opt_common.config import OPTConfig
from opt_common.contrastive import contrastive_search
from opt_common.decoding import Arrays, Decoder, Generated, Ids, Past, Prompt, Reader, collect, decode_tokens
from opt_common.dola import candidate_layers
from opt_common.errors import GenerationError, join_problems
from opt_common.generation_config import GenerationConfig
from opt_common.guidance import Guidance, read_negatives
from opt_common.inputs import check_inputs
from opt_common.processors import processors
from opt_common.stopping import Stopping
from opt_common.strategies import (
    ASSISTED_STRATEGIES,
    BEAM_STRATEGIES,
    DOLA_STRATEGIES,
    KEEPS_CACHE,
    SAMPLING_STRATEGIES,
)
from opt_common.streaming import Streamer

DEFAULT_MAX_LENGTH = 20
"""Prompt and new tokens together, when nothing is said: Hugging Face's default."""


def run(decoder: Decoder, prompt: Prompt, settings: GenerationConfig, streamer: Streamer | None = None) -> Generated:
    """Continue prompts by the strategy that some settings ask for.

    Raises:
        GenerationError: where a row has no token to go on with.
    """
    if settings.strategy in BEAM_STRATEGIES:
        return search(Reader(decoder, prompt, use_cache=settings.use_cache), prompt, settings)
    steps = token_steps(decoder, prompt, settings)
    return collect(steps if streamer is None else streamed(steps, prompt, streamer))


def token_steps(decoder: Decoder, prompt: Prompt, settings: GenerationConfig) -> Iterator[Arrays]:
    """The steps of a strategy that appends tokens and takes none back.

    Yields:
        Each step's "tokens", (B,), and its details.
    """
    reader = Reader(decoder, prompt, use_cache=settings.use_cache)
    if settings.strategy in ASSISTED_STRATEGIES:
        return assisted(reader, prompt, settings)
    strategy = contrastive_search if settings.strategy == "contrastive_search" else decode_tokens
    return strategy(reader, prompt, settings)


def streamed(steps: Iterator[Arrays], prompt: Prompt, streamer: Streamer) -> Iterator[Arrays]:
    """The same steps, and a streamer is told of each."""
    try:
        streamer.put(prompt.input_ids if prompt.has_ids else prompt.input_ids[:, :0])
        for found in steps:
            streamer.put(found["tokens"])
            yield found
    finally:
        streamer.end()


def check_streamer(streamer: object, settings: GenerationConfig) -> None:
    """Refuse to show a text that is certain only at its end.

    Raises:
        GenerationError: where there is a streamer, and a strategy that takes tokens back.
    """
    if streamer is not None and not settings.streams:
        raise GenerationError(
            f"Text can't be shown as it is produced: the strategy is {settings.strategy}, which decides at the end. "
            "Leave the streamer out, or num_beams."
        )


def returns_cache(settings: GenerationConfig) -> bool:
    """Whether `generate` hands back what was read."""
    return settings.return_dict_in_generate and settings.use_cache and settings.strategy in KEEPS_CACHE


def given_slots(order_BT: Ids, start: int, padding: int, capacity: int) -> Ids | None:
    """Where a cache has each column of a text as it was given, and of what was generated then.

    Args:
        order_BT: the column in which each token was given.
        start: how many tokens the cache had already.
        padding: how many slots without a token follow those.
        capacity: S, the number of slots.

    Returns:
        (B, S) slots; None where each column has the slot of its number.
    """
    columns_T = np.arange(int(order_BT.shape[1]))
    if not padding and bool((order_BT == columns_T).all()):
        return None
    slots_BS = np.minimum(np.arange(capacity) + padding, capacity - 1)[None].repeat(len(order_BT), axis=0)
    slots_BS[:, :start] = np.arange(start)
    slots_BS[:, start : order_BT.shape[1]] = np.argsort(order_BT, axis=1)[:, start:] + padding
    return slots_BS


def read_prompt(
    config: OPTConfig,
    settings: GenerationConfig,
    input_ids: npt.NDArray[Any] | None,
    attention_mask: npt.NDArray[Any] | None = None,
    functions: Sequence[Callable[[Any, Any], Any]] = (),
    *,
    inputs_embeds: npt.NDArray[Any] | None = None,
    past_key_values: Any = None,
    negative_prompt_ids: npt.NDArray[Any] | None = None,
    negative_prompt_attention_mask: npt.NDArray[Any] | None = None,
    stopping: Stopping | None = None,
) -> Prompt:
    """Check prompts and bring them into the decoders' form, each as often as it is to be continued by itself.

    Args:
        config: the model's configuration.
        settings: how to continue.
        input_ids: (B, T) integers; None where there are embeddings alone.
        attention_mask: (B, T) of ones and zeros, padding anywhere; None means no padding.
        functions: the user's own processors.
        inputs_embeds: (B, T, E), read in place of the tokens' rows of the table.
        past_key_values: a cache of the first tokens of each row, or one row of tokens that every row begins with.
        negative_prompt_ids: (B, N) or (1, N), what to guide away from; None means each prompt's last token.
        negative_prompt_attention_mask: the same shape, padding anywhere; None means no padding.
        stopping: what ends a row; None means `eos_token_id` alone.

    Raises:
        InputError: for ids out of range, an empty prompt or a mask that does not fit.
        GenerationError: for a row without any token, a continuation with no room, or a cache of another text.
    """
    embeds_BTE = None if inputs_embeds is None else np.asarray(inputs_embeds)
    ids_BT, mask_BT = _read_arrays(config, input_ids, attention_mask, embeds_BTE)
    rows, length = mask_BT.shape
    if settings.strategy in ASSISTED_STRATEGIES:
        check_one_row(rows, settings, has_ids=input_ids is not None)
    negatives = read_negatives(
        config,
        settings,
        rows,
        negative_prompt_ids,
        negative_prompt_attention_mask,
        given=() if embeds_BTE is None else ("inputs_embeds",),
    )
    negative_length = 1 if negatives is None else int(negatives[0].shape[1])
    new_tokens = _room(config, settings, length, max(int(mask_BT.sum(1).max()), negative_length))
    past = None if past_key_values is None else _read_past(config, settings, past_key_values, mask_BT, negative_length)
    if embeds_BTE is not None and not settings.use_cache:
        raise GenerationError("inputs_embeds needs the cache: leave use_cache=False out.")
    start = 0 if past is None else past.length
    # A stable sort of the mask moves each row's padding to its left and keeps the order of its tokens. What the cache
    # has stays where it is.
    order_BT = np.argsort(mask_BT[:, start:], axis=1, kind="stable") + start
    order_BT = np.concatenate([np.broadcast_to(np.arange(start), (rows, start)), order_BT], axis=1)
    copies = settings.copies
    order_BT, ids_BT, mask_BT = (np.repeat(array_BT, copies, axis=0) for array_BT in (order_BT, ids_BT, mask_BT))
    ids_BT, mask_BT = (np.take_along_axis(array_BT, order_BT, axis=1) for array_BT in (ids_BT, mask_BT))
    if embeds_BTE is not None:
        embeds_BTE = np.take_along_axis(np.repeat(embeds_BTE, copies, axis=0), order_BT[..., None], axis=1)
    guidance = None
    if settings.guidance_scale is not None and settings.guided:
        arrays = (ids_BT[:, -1:], mask_BT[:, -1:])
        if negatives is not None:
            arrays = tuple(np.repeat(array_BN, copies, axis=0) for array_BN in negatives)
        guidance = Guidance(scale=settings.guidance_scale, input_ids=arrays[0], attention_mask=arrays[1])
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
        uniforms=(
            draw_uniforms(
                ids_BT if embeds_BTE is None else embeds_BTE,
                mask_BT,
                new_tokens + settings.guesses,
                settings.seed,
                draws=_draws(settings),
            )
            if settings.strategy in SAMPLING_STRATEGIES
            else None
        ),
        stopping=Stopping(eos_token_id=settings.eos_token_id) if stopping is None else stopping,
        inputs_embeds=embeds_BTE,
        has_ids=input_ids is not None,
        past=past,
        order=order_BT,
        layers=candidate_layers(config, settings.dola_layers) if settings.strategy in DOLA_STRATEGIES else (),
        guidance=guidance,
        guesses=settings.guesses,
        positions=config.max_position_embeddings,
    )


def _draws(settings: GenerationConfig) -> int:
    """How many numbers a step of a row takes."""
    if settings.strategy in BEAM_STRATEGIES:
        return continuations(settings)
    return 1 if settings.assistant_model is None else DRAWS


def _read_arrays(
    config: OPTConfig,
    input_ids: npt.NDArray[Any] | None,
    attention_mask: npt.NDArray[Any] | None,
    embeds_BTE: npt.NDArray[Any] | None,
) -> tuple[Ids, Ids]:
    """Ids and mask, (B, T) each, checked; the ids of embeddings without ids are zeros."""
    given = {
        "input_ids": input_ids,
        # With both, the ids are what the new tokens follow, and the embeddings what is read.
        "inputs_embeds": embeds_BTE if input_ids is None else None,
        "attention_mask": attention_mask,
    }
    values = {name: np.asarray(array) for name, array in given.items() if array is not None}
    check_inputs(config, shapes={name: array.shape for name, array in values.items()}, values=values)
    if embeds_BTE is not None:
        check_inputs(config, shapes={"inputs_embeds": embeds_BTE.shape}, values={})
        values.setdefault("input_ids", np.zeros(embeds_BTE.shape[:2], dtype=np.int64))
    ids_BT = values["input_ids"]
    if embeds_BTE is not None and embeds_BTE.shape[:2] != ids_BT.shape:
        raise GenerationError(
            f"inputs_embeds has shape {embeds_BTE.shape} beside input_ids of shape {ids_BT.shape}, expected an "
            "embedding for each id. Leave input_ids out to get the new tokens alone."
        )
    pad = config.pad_token_id
    if attention_mask is None and embeds_BTE is None and pad is not None and (ids_BT[:, [0, -1]] == pad).any():
        warnings.warn(
            f"A prompt begins or ends with the pad token {pad}, and no attention_mask was given: padding is read as "
            "text. Pass the tokenizer's attention_mask.",
            stacklevel=6,
        )
    mask_BT = values.get("attention_mask", np.ones_like(ids_BT)).astype(np.int64)
    if empty := np.flatnonzero(mask_BT.sum(1) == 0).tolist():
        raise GenerationError(
            f"Prompt {empty[0]} is empty: its attention_mask is all zeros. Give it at least one token."
        )
    return ids_BT, mask_BT


def _room(config: OPTConfig, settings: GenerationConfig, length: int, longest: int) -> int:
    """How many tokens to append at most, given the columns of the prompts and the tokens of the longest."""
    new_tokens = settings.max_new_tokens
    if new_tokens is None:
        max_length = settings.max_length or DEFAULT_MAX_LENGTH
        new_tokens = max_length - length
        if new_tokens <= 0:
            raise GenerationError(
                f"The prompt has {length} tokens and max_length is {max_length}: no room is left. Pass max_new_tokens."
            )
    # The last new token is never read, so it needs no position; among candidates, it is.
    limit = config.max_position_embeddings + (settings.strategy != "contrastive_search")
    if longest + new_tokens > limit:
        raise GenerationError(
            f"A prompt of {longest} tokens and {new_tokens} new ones do not fit: this model has positions for "
            f"{config.max_position_embeddings}. Shorten the prompt, or pass max_new_tokens={max(limit - longest, 0)} "
            "or less."
        )
    return new_tokens


def _read_past(
    config: OPTConfig, settings: GenerationConfig, past_key_values: Any, mask_BT: Ids, negative_length: int
) -> Past | None:
    """The part of a cache that counts: each row has a token left to be read, and a negative prompt room beside it."""
    rows, length = map(int, mask_BT.shape)
    last_B: Ids = length - 1 - mask_BT[:, ::-1].argmax(1)
    B, _, N, H = past_key_values.keys[0].shape
    held, layers = int(past_key_values.length), len(past_key_values.keys)
    problems: list[str] = []
    if (layers, N, H) != (config.num_hidden_layers, config.num_attention_heads, config.head_dim):
        problems.append(
            f"past_key_values has {layers} layers of {N} heads with {H} features, but this model has "
            f"{config.num_hidden_layers} of {config.num_attention_heads} with {config.head_dim}."
        )
    if B not in {1, rows}:
        problems.append(f"past_key_values has {B} rows, expected {rows} as there are prompts, or one for all of them.")
    if held > length:
        problems.append(
            f"past_key_values holds {held} tokens, but the prompts have {length}: give the whole text, past included."
        )
    if settings.strategy == "contrastive_search":
        problems.append(
            "past_key_values can't be continued by contrastive search, which compares hidden states of the whole text "
            "that a cache does not hold: leave past_key_values or penalty_alpha out."
        )
    if not settings.use_cache:
        problems.append("past_key_values needs the cache: leave use_cache=False out.")
    if problems:
        raise GenerationError(join_problems(problems))
    rows_B: Ids = np.arange(rows) * (B > 1)
    rows_B = np.repeat(rows_B, settings.copies)
    past = Past(
        cache=past_key_values,
        length=max(min(held, int(last_B.min()), length - negative_length), 0),
        # To what guides, the past is padding, whichever row's it is.
        rows_B=np.concatenate([rows_B, rows_B]) if settings.guided else rows_B,
    )
    return past if past.length else None


def draw_uniforms(
    texts: npt.NDArray[Any], attention_mask: Ids, new_tokens: int, seed: int | None, *, draws: int = 1
) -> npt.NDArray[np.float32]:
    """The numbers that decide what is drawn: (B, new_tokens, draws) from [0, 1).

    A row's numbers depend on the seed, the row's own text and how many rows with the same text are before it, and on
    nothing else: a row of a batch is continued as it is alone, and copies of one prompt each in their own way.

    Args:
        texts: (B, T) ids, or (B, T, E) embeddings.
        attention_mask: (B, T).
        new_tokens: for how many steps.
        seed: None draws one.
        draws: how many numbers a step takes.
    """
    seed = secrets.randbits(63) if seed is None else seed
    copies: collections.Counter[bytes] = collections.Counter()
    rows: list[npt.NDArray[np.float32]] = []
    kind = "<i8" if texts.ndim == 2 else "<f4"
    for ids_T, mask_T in zip(texts, attention_mask, strict=True):
        text = ids_T[mask_T == 1].astype(kind).tobytes()
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
