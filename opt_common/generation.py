"""The rules of decoding, stated once: what a prompt is, what ends a row, what a finished row emits, when to stop.

A backend supplies a `Decoder`: one prefill and one step, compiled, with its cache and its vocabulary-sized arithmetic
on its own device. Only token ids, one a row and step, come to the host.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from opt_common.config import OPTConfig
from opt_common.errors import GenerationError, join_problems
from opt_common.inputs import check_inputs

Ids: TypeAlias = npt.NDArray[np.integer[Any]]

DEFAULT_MAX_LENGTH = 20
"""Prompt and new tokens together, when nothing is said: Hugging Face's default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a prompt: the fields of a `generation_config.json` that greedy decoding has.

    Args:
        max_new_tokens: how many tokens to append at most; takes precedence over `max_length`.
        max_length: how many tokens prompt and continuation have together at most; None means `DEFAULT_MAX_LENGTH`.
        eos_token_id: ids that end a row: one, several or none.
        pad_token_id: what a finished row emits; None means the first of `eos_token_id`.
        bos_token_id: id in front of every text.
        do_sample: must be False when text is generated: tokens are chosen by likelihood alone.
        use_cache: False computes every step from the whole text, which is slow and gives the same tokens.
        extra: every other key of the file that was read; written back as it came.

    Raises:
        GenerationError: naming every setting that cannot be.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    do_sample: bool = False
    use_cache: bool = True
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any], hash=False)

    def __post_init__(self) -> None:
        eos: Any = self.eos_token_id
        several = () if eos is None else tuple(cast(list[Any], eos)) if isinstance(eos, list | tuple) else (eos,)
        object.__setattr__(self, "eos_token_id", several)
        problems: list[str] = []
        for name in ("max_new_tokens", "max_length"):
            count = getattr(self, name)
            if count is not None and (not _is_id(count) or count == 0):
                problems.append(f"{name} is {count!r}, expected a positive integer.")
        if not all(_is_id(token) for token in several):
            problems.append(f"eos_token_id is {eos!r}, expected an id, a list of ids or None.")
        if self.pad_token_id is not None and not _is_id(self.pad_token_id):
            problems.append(f"pad_token_id is {self.pad_token_id!r}, expected an id or None.")
        if problems:
            raise GenerationError(join_problems(problems))

    @classmethod
    def from_model_config(cls, config: OPTConfig) -> Self:
        """The settings a model has when it comes without a `generation_config.json`."""
        eos: Any = config.eos_token_id
        return cls(eos_token_id=eos, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id)

    @classmethod
    def from_directory(cls, directory: Path, config: OPTConfig) -> Self:
        """The settings of a checkpoint: its `generation_config.json`, or what its model configuration says.

        Raises:
            GenerationError: if the file is damaged or has a setting that cannot be.
        """
        path = directory / "generation_config.json"
        defaults = cls.from_model_config(config)
        if not path.is_file():
            return defaults
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise GenerationError(f"{path} is not readable as JSON: {error}. Fetch it again, or delete it.") from None
        if not isinstance(values, dict):
            raise GenerationError(f"{path}: expected a JSON object, got {type(values).__name__}. Fetch it again.")
        extra = cast(dict[str, Any], values)
        fields = {name: extra.pop(name) for name in _FIELDS & extra.keys()}
        return dataclasses.replace(defaults, **fields, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `generation_config.json`: what differs from the defaults."""
        values = {name: getattr(self, name) for name in _FIELDS}
        values = {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}
        if "eos_token_id" in values:
            values["eos_token_id"] = self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id)
        return {**self.extra, **values}

    def updated(self, **settings: Any) -> Self:
        """A copy with some settings changed; None leaves a setting as it is.

        Raises:
            GenerationError: for a name that is no setting, or a value that cannot be or is not available.
        """
        if unknown := settings.keys() - _FIELDS:
            known = ", ".join(sorted(_FIELDS))
            raise GenerationError(f"generate() has no setting {', '.join(sorted(unknown))}; it has {known}.")
        updated = dataclasses.replace(self, **{name: value for name, value in settings.items() if value is not None})
        # Not at construction: a checkpoint whose file asks for sampling is good for everything but generating unasked.
        if updated.do_sample:
            raise GenerationError("do_sample is True, but only greedy decoding is available. Pass do_sample=False.")
        return updated


_FIELDS = frozenset(field.name for field in dataclasses.fields(GenerationConfig)) - {"extra"}
_DEFAULTS = GenerationConfig()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """Prompts as every decoder takes them: each row's attended tokens, in order, at the right end.

    Moving masked slots to the left changes nothing that is attended to: positions count attended tokens only.

    Attributes:
        input_ids: (B, T) integers.
        attention_mask: (B, T): zeros, then ones.
        new_tokens: how many tokens to append at most.
    """

    input_ids: Ids
    attention_mask: Ids
    new_tokens: int


class Decoder(Protocol):
    """One run of a model over a batch of prompts, chosen tokens in and out. What a backend supplies."""

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids) -> Ids:
        """Read the prompts, padded on the left, and return the next token of each row, (B,)."""
        ...

    def decode_one_token(self, tokens_B: Ids) -> Ids:
        """Read one more token of each row and return the next, (B,)."""
        ...


def read_prompt(
    config: OPTConfig, settings: GenerationConfig, input_ids: npt.NDArray[Any], attention_mask: npt.NDArray[Any] | None
) -> Prompt:
    """Check prompts and bring them into the decoders' form.

    Args:
        config: the model's configuration.
        settings: how to continue.
        input_ids: (B, T) integers.
        attention_mask: (B, T) of ones and zeros, padding anywhere; None means no padding.

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
    return Prompt(
        input_ids=np.take_along_axis(ids_BT, order_BT, axis=1),
        attention_mask=np.take_along_axis(mask_BT, order_BT, axis=1),
        new_tokens=new_tokens,
    )


def decode(decoder: Decoder, prompt: Prompt, settings: GenerationConfig) -> Iterator[Ids]:
    """Run a decoder, one (B,) array of tokens a step.

    A row is finished once it has emitted an id of `eos_token_id`; from then on it emits the pad token. The run stops
    when every row is finished, or after `prompt.new_tokens` steps.
    """
    eos = np.asarray(settings.eos_token_id, dtype=np.int64)
    pad = settings.pad_token_id if settings.pad_token_id is not None else int(eos[0]) if eos.size else 0
    ids_BT, mask_BT = prompt.input_ids, prompt.attention_mask
    finished_B = np.zeros(len(ids_BT), dtype=bool)
    tokens_B = decoder.prefill(ids_BT, mask_BT)
    for step in range(prompt.new_tokens):
        tokens_B = np.where(finished_B, pad, tokens_B)
        yield tokens_B
        finished_B |= np.isin(tokens_B, eos)
        if finished_B.all() or step + 1 == prompt.new_tokens:
            return
        if settings.use_cache:
            tokens_B = decoder.decode_one_token(tokens_B)
        else:
            ids_BT = np.concatenate([ids_BT, tokens_B[:, None]], axis=1)
            mask_BT = np.concatenate([mask_BT, np.ones_like(mask_BT[:, :1])], axis=1)
            tokens_B = decoder.prefill(ids_BT, mask_BT)


def bucket(length: int) -> int:
    """The padded length that stands for `length`: 16, 24, 32, 48, 64, 96, … So a compiler sees few shapes."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _is_id(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(cast(int, value) >= 0)
