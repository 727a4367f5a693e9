"""A watermark in text (Kirchenbauer et al. 2023): tokens that a secret calls green are favoured, and counted later.

Which tokens are green after a context is decided by a hash of 32-bit numbers, so that every framework favours the same
ones and a detector needs neither the model nor a framework:

- `mixed(x)`: add `INCREMENT`, then twice xor with the upper half and multiply by `MULTIPLIER`, then xor with the upper
  half; all modulo 2**32. The secret is mixed(hashing_key).
- lefthash: seed = secret, then seed = mixed(seed xor token) for each token of the context, the oldest first;
  the hash of a candidate is mixed(seed xor mixed(candidate)).
- selfhash: the least of mixed(mixed(secret xor token) xor mixed(candidate)) over the tokens of the context, mixed
  once more.
- A candidate is green if its hash is below greenlist_ratio * 2**32.

Hugging Face draws green tokens with PyTorch's generator: its detector doesn't see this watermark, nor this one its.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from opt_common.errors import GenerationError, InputError, join_problems

Array: TypeAlias = npt.NDArray[Any]

INCREMENT = 0x9E3779B9
MULTIPLIER = 0x45D9F3B
"""Odd and below 2**27, so that its product with 32 bits fits a signed 64-bit integer."""
MASK = 0xFFFFFFFF

SCHEMES = ("lefthash", "selfhash")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatermarkingConfig:
    """How generated text is marked. Names and defaults are Hugging Face's.

    Args:
        greenlist_ratio: share of the vocabulary that is green, above 0 and below 1.
        bias: what is added to the scores of green tokens.
        hashing_key: the secret: an integer from 0 to 2**32 - 1.
        seeding_scheme: "lefthash": the context decides; "selfhash": context and candidate together.
        context_width: how many tokens before the candidate are the context. Wider is harder to find out and easier to
            lose by editing. A row without that many is not marked yet.

    Raises:
        GenerationError: naming every value that cannot be.
    """

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: Literal["lefthash", "selfhash"] = "lefthash"
    context_width: int = 1

    def __post_init__(self) -> None:
        rules = {
            "greenlist_ratio": (_is_number(self.greenlist_ratio) and 0 < self.greenlist_ratio < 1, "above 0, below 1"),
            "bias": (_is_number(self.bias) and math.isfinite(self.bias), "a finite number"),
            "hashing_key": (_is_integer(self.hashing_key) and 0 <= self.hashing_key <= MASK, "0 to 4294967295"),
            "seeding_scheme": (self.seeding_scheme in SCHEMES, "lefthash or selfhash"),
            "context_width": (_is_integer(self.context_width) and 1 <= self.context_width <= 64, "1 to 64"),
        }
        if problems := [
            f"watermarking_config: {name} is {getattr(self, name)!r}, expected {expected}."
            for name, (holds, expected) in rules.items()
            if not holds
        ]:
            raise GenerationError(join_problems(problems))

    @classmethod
    def read(cls, value: Any) -> Self:
        """A configuration from a `generation_config.json` or a keyword.

        Raises:
            TypeError: for anything but a mapping or a configuration.
            GenerationError: for a key or a value that cannot be.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError
        values = cast(Mapping[str, Any], value)
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(values.keys() - set(names)):
            raise GenerationError(f"watermarking_config has no {', '.join(unknown)}; it has {', '.join(names)}.")
        return cls(**values)

    @property
    def secret(self) -> Array:
        """The hashed key, (1,) of uint64: keys that are near each other have green tokens in common by chance only."""
        return mixed(np.array([self.hashing_key], np.uint64))

    @property
    def threshold(self) -> int:
        """Hashes below it are green."""
        return min(round(self.greenlist_ratio * 2**32), MASK)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# The rule, in NumPy.


def mixed(bits: Array) -> Array:
    """The hash of 32-bit numbers, held in uint64."""
    bits = (bits + np.uint64(INCREMENT)) & np.uint64(MASK)
    for _ in range(2):
        bits = ((bits ^ (bits >> np.uint64(16))) * np.uint64(MULTIPLIER)) & np.uint64(MASK)
    return bits ^ (bits >> np.uint64(16))


def lefthash(context_BW: Array, tokens: Array, secret: Array) -> Array:
    """Hashes of candidates that the context alone decides, (B, C), given tokens (B or 1, C)."""
    seed_B1 = np.broadcast_to(secret.astype(np.uint64), (len(context_BW), 1))
    for token_B in context_BW.astype(np.uint64).T:
        seed_B1 = mixed(seed_B1 ^ token_B[:, None])
    return mixed(seed_B1 ^ mixed(tokens.astype(np.uint64)))


def selfhash(context_BW: Array, tokens: Array, secret: Array) -> Array:
    """Hashes of candidates that context and candidate decide together, (B, C), given tokens (B or 1, C)."""
    own = mixed(tokens.astype(np.uint64))
    least = np.uint64(MASK)
    for token_B in context_BW.astype(np.uint64).T:
        least = np.minimum(least, mixed(mixed(secret.astype(np.uint64) ^ token_B[:, None]) ^ own))
    return mixed(np.asarray(least))


_HASHES = {"lefthash": lefthash, "selfhash": selfhash}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WatermarkDetection:
    """What a detector found, one entry a row.

    Attributes:
        num_tokens_scored: tokens with a whole context.
        num_green_tokens: how many of them are green.
        green_fraction: their share.
        z_score: by how many standard deviations there are more than chance would have.
        p_value: how probable so many are by chance.
        prediction: whether `z_score` is above the threshold.
    """

    num_tokens_scored: npt.NDArray[np.int64]
    num_green_tokens: npt.NDArray[np.int64]
    green_fraction: npt.NDArray[np.float64]
    z_score: npt.NDArray[np.float64]
    p_value: npt.NDArray[np.float64]
    prediction: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatermarkDetector:
    """Tells text with a watermark from other text.

    Args:
        watermarking_config: the one the text was generated with.
        ignore_repeated_ngrams: count each context with its token once, however often it occurs: text that repeats
            itself repeats its luck, too.
    """

    watermarking_config: WatermarkingConfig
    ignore_repeated_ngrams: bool = False

    def __call__(
        self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None, z_threshold: float = 3.0
    ) -> WatermarkDetection:
        """Count green tokens.

        Args:
            input_ids: (B, T) ids, best of the continuation alone: a prompt is not marked, and dilutes.
            attention_mask: (B, T), 0 for what is no text, such as padding; None counts all.
            z_threshold: how many standard deviations above chance are a watermark.

        Raises:
            InputError: for ids of another shape, or a row without any token that has a whole context.
        """
        ids_BT = np.asarray(input_ids)
        mask_BT = np.ones_like(ids_BT) if attention_mask is None else np.asarray(attention_mask)
        if ids_BT.ndim != 2 or mask_BT.shape != ids_BT.shape:
            raise InputError(
                f"input_ids has shape {ids_BT.shape} and attention_mask {mask_BT.shape}, expected (batch, length) both."
            )
        counts = [self._count(ids_T[mask_T == 1]) for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
        scored_B, green_B = np.array(counts, dtype=np.int64).reshape(-1, 2).T
        width = self.watermarking_config.context_width
        if short := np.flatnonzero(scored_B == 0).tolist():
            raise InputError(
                f"Row {short[0]} has too few tokens: with context_width {width}, {width + 1} are the least to judge."
            )
        ratio = self.watermarking_config.greenlist_ratio
        z_B = (green_B - ratio * scored_B) / np.sqrt(scored_B * ratio * (1 - ratio))
        return WatermarkDetection(
            num_tokens_scored=scored_B,
            num_green_tokens=green_B,
            green_fraction=green_B / scored_B,
            z_score=z_B,
            p_value=np.array([math.erfc(z / math.sqrt(2)) / 2 for z in z_B]),
            prediction=z_B > z_threshold,
        )

    def _count(self, ids_T: Array) -> tuple[int, int]:
        """Tokens of one text with a whole context, and the green ones among them."""
        config = self.watermarking_config
        if len(ids_T) <= config.context_width:
            return 0, 0
        ngrams_NW = np.lib.stride_tricks.sliding_window_view(ids_T, config.context_width + 1)
        if self.ignore_repeated_ngrams:
            ngrams_NW = np.unique(ngrams_NW, axis=0)
        hashes_N1 = _HASHES[config.seeding_scheme](ngrams_NW[:, :-1], ngrams_NW[:, -1:], config.secret)
        return len(ngrams_NW), int((hashes_N1 < config.threshold).sum())
