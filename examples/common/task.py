"""What an example learns, whatever the framework."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from examples.common.options import Options
from opt_common import LoraConfig, OPTConfig, OPTTokenizer

Rows = Mapping[str, np.ndarray]
"""The model's arguments by name, with rows along the first axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The model that training starts with.

    Attributes:
        head: "lm", "sequence_classification" or "question_answering".
        config: of a model with new weights; None means that of a checkpoint.
        arguments: of `from_pretrained`, beside the checkpoint.
        lora: the adapter that trains in place of the model.
    """

    head: str
    config: OPTConfig | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora: LoraConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """What the best predictor scores that gives every row the same answer, learned from how common each answer is.

    Attributes:
        loss: its loss on held-out rows.
        score: its score there.
    """

    loss: float
    score: float


class Task:
    """One of the examples.

    Attributes:
        name: its folder.
        about: one sentence.
        kind: its options.
        defaults: of its options, where they differ.
        metric: what the score is called.
        arguments: of a call in evaluation.
        choices: the outputs whose best entry is the answer.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    kind: ClassVar[type[Options]] = Options
    defaults: ClassVar[Mapping[str, Any]] = {}
    metric: ClassVar[str]
    arguments: ClassVar[Mapping[str, Any]] = {}
    choices: ClassVar[tuple[str, ...]] = ()

    def write(self, path: Path, rows: int, seed: int) -> None:
        """Write data of the example's own, in the form in which data of this kind is published."""
        raise NotImplementedError

    def read(self, path: Path, tokenizer: OPTTokenizer, options: Options) -> Rows:
        """Rows for the model from such data."""
        raise NotImplementedError

    def start(self, options: Options, tokenizer: OPTTokenizer, train: Path) -> Start:
        """What training starts with, given the options and the data."""
        raise NotImplementedError

    def constant(self, train: Rows, held_out: Rows, vocab_size: int) -> Constant:
        """What a constant predictor scores."""
        raise NotImplementedError

    def score(self, rows: Rows, loss: float, chosen: tuple[np.ndarray, ...]) -> float:
        """The score of answers to rows.

        Args:
            rows: what was asked.
            loss: the mean over them.
            chosen: for each of `choices`, an answer for each row.
        """
        raise NotImplementedError


def frequencies(values: np.ndarray, size: int) -> np.ndarray:
    """The share of each of 0 … size - 1 among values, each counted once more than it is there."""
    counts = np.bincount(values.ravel(), minlength=size) + 1.0
    return counts / counts.sum()
