"""What speed is measured on: the workloads, what each costs at least, and how it is timed.

A token that is decoded alone reads every matrix once: its limit is their bytes over the bandwidth of the memory.
Reading a prompt multiplies each number of a matrix with each token, 2 operations, and the head's with the last token;
training does three times as much, and the head takes part in all of it.
"""

import concurrent.futures
import dataclasses
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from opt_common.config import OPTConfig
from opt_common.errors import InputError
from opt_common.params import parameter_table
from opt_common.quantization import is_quantized

Kind = Literal["decode", "prefill", "train"]

BITS: Mapping[str, float] = {
    "float64": 64,
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "int8": 8,
    "int8-dynamic": 8,
    "int4": 5,
}
"""Bits that a weight takes; 4-bit weights have a scale and an offset for each 32."""

PROMPT, NEW_TOKENS = 32, 128
"""Lengths of "decode"."""

DEFAULT_WORKLOADS = ("decode:1", "decode:8", "prefill:1x512")

_FIRST_ID = 4
# Those before are special tokens.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Something to time.

    Attributes:
        kind: "decode" continues prompts of 32 tokens by 128; "prefill" reads prompts and chooses one token; "train" is
            one step of AdamW.
        batch: rows.
        length: tokens a row has at first.
        new_tokens: tokens a row gets; 0 in training.
    """

    kind: Kind
    batch: int
    length: int
    new_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """Read "decode:BATCH", "prefill:BATCHxLENGTH" or "train:BATCHxLENGTH".

        Raises:
            InputError: for anything else.
        """
        found = re.fullmatch(r"(decode):([1-9]\d*)|(prefill|train):([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise InputError(
                f"The workload {text!r} is not known. Write decode:BATCH, prefill:BATCHxLENGTH or train:BATCHxLENGTH, "
                "such as decode:8 or prefill:1x512."
            )
        if found[1]:
            return cls(kind="decode", batch=int(found[2]), length=PROMPT, new_tokens=NEW_TOKENS)
        kind: Kind = "prefill" if found[3] == "prefill" else "train"
        return cls(kind=kind, batch=int(found[4]), length=int(found[5]), new_tokens=int(kind == "prefill"))

    @property
    def positions(self) -> int:
        """How many positions the model must have."""
        return self.length + max(0, self.new_tokens - 1)

    @property
    def tokens(self) -> int:
        """The tokens that count: new ones in decoding, read ones otherwise."""
        return self.batch * (self.new_tokens if self.kind == "decode" else self.length)

    def prompts(self, vocab_size: int, seed: int) -> npt.NDArray[np.int64]:
        """Ids (batch, length), other ones for each seed."""
        return np.random.default_rng(seed).integers(_FIRST_ID, vocab_size, size=(self.batch, self.length))

    def best_seconds(
        self, config: OPTConfig, bits: float, bytes_per_s: float, flops_per_s: float | None
    ) -> float | None:
        """The least time that a machine's limits allow.

        Args:
            config: the model's configuration.
            bits: what a number of a matrix takes.
            bytes_per_s: how fast memory is read.
            flops_per_s: how fast matrices are multiplied; None if nobody knows.

        Returns:
            Seconds; None for what only an unknown `flops_per_s` limits.
        """
        sizes = {
            parameter.name: math.prod(parameter.shape)
            for parameter in parameter_table(config)
            if is_quantized(parameter)
        }
        head = sizes.pop("lm_head.weight", 0) or sizes["model.decoder.embed_tokens.weight"]
        layers = sum(sizes.values()) - sizes["model.decoder.embed_tokens.weight"]
        if self.kind == "decode":
            return self.new_tokens * (layers + head) * bits / 8 / bytes_per_s
        if flops_per_s is None:
            return None
        if self.kind == "prefill":
            return 2 * (self.tokens * layers + self.batch * head) / flops_per_s
        return 6 * self.tokens * (layers + head) / flops_per_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one workload.

    Attributes:
        workload: its name.
        seconds: of each counted round.
        tokens_per_s: at the median.
        of_limit: share of the limit that this is; None if the limit is not known.
    """

    workload: str
    seconds: tuple[float, ...]
    tokens_per_s: float
    of_limit: float | None

    @property
    def spread(self) -> float:
        """Slowest less fastest round, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / statistics.median(self.seconds)


def timing(name: str, seconds: Sequence[float], best: float | None) -> Timing:
    """What the rounds of a workload come to.

    Args:
        name: of the workload.
        seconds: of each round.
        best: the least time that the machine allows.
    """
    median = statistics.median(seconds)
    return Timing(
        workload=name,
        seconds=tuple(seconds),
        tokens_per_s=Workload.parse(name).tokens / median,
        of_limit=None if best is None else best / median,
    )


def seconds_of(do: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


_PASSES = 4


class Bandwidth:
    """How fast this machine reads memory, with all processors that the process may use."""

    def __init__(self, size: int = 1 << 30) -> None:
        """Make what is read.

        Args:
            size: bytes; many times what the processor's caches hold.
        """
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._parts = np.array_split(np.ones(size // 8, dtype=np.int64), workers)
        self._pool = concurrent.futures.ThreadPoolExecutor(workers)

    def measure(self) -> float:
        """Bytes a second, the best of several passes: memory that has not been read for a while is slower at first."""
        # max() of integers is vectorised and lets other threads run; a sum of floats is bound by its additions.
        seconds = min(seconds_of(lambda: list(self._pool.map(np.max, self._parts))) for _ in range(_PASSES))
        return sum(part.nbytes for part in self._parts) / seconds
