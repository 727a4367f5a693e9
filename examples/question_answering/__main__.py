"""Extractive question answering: `python -m examples.question_answering torch` (or tf, or flax)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from examples.common.options import Options
from examples.common.run import main
from examples.common.task import Constant, Rows, Start, Task, frequencies
from examples.question_answering.data import questions
from opt_common import OPTTokenizer

POSITIONS = ("start_positions", "end_positions")


class QuestionAnswering(Task):
    """Learn where in a text the answer of a question stands. Data is a JSON file in the form of SQuAD 1.1."""

    name = "question_answering"
    about = "Extractive question answering"
    defaults: ClassVar = {"length": 64, "steps": 1000, "rows": 8000}
    metric = "exact spans"
    choices = ("start_logits", "end_logits")

    def write(self, path: Path, rows: int, seed: int) -> None:
        """Questions about neighbors."""
        path.write_text(json.dumps(questions(rows, seed)), encoding="utf-8")

    def read(self, path: Path, tokenizer: OPTTokenizer, options: Options) -> Rows:
        """Question and text as a pair, cut off and padded to `options.length`, and the answer's first and last token.

        The loss does not count an answer that was cut off; the score counts it as wrong.
        """
        asked, contexts, answers = map(list, zip(*examples(path), strict=True))
        encoded = tokenizer(
            asked,
            contexts,
            padding="max_length",
            truncation="only_second",
            max_length=options.length,
            return_tensors="np",
        )
        # A pair is </s> question </s> text.
        before = [len(ids) + 1 for ids in tokenizer(asked)["input_ids"]]
        spans = [span(tokenizer, context, *answer) for context, answer in zip(contexts, answers, strict=True)]
        positions = np.array(spans) + np.array(before)[:, None]
        return {**encoded, **dict(zip(POSITIONS, positions.T, strict=True))}

    def start(self, options: Options, tokenizer: OPTTokenizer, train: Path) -> Start:
        """A new head on the checkpoint's decoder."""
        return Start(head="question_answering", arguments={"new_head": True})

    def constant(self, train: Rows, held_out: Rows, vocab_size: int) -> Constant:
        """Always the most common span, and for the loss the most common start and end."""
        shares = [frequencies(train[name], vocab_size) for name in POSITIONS]
        losses = [-np.log(share[held_out[name]]).mean() for name, share in zip(POSITIONS, shares, strict=True)]
        spans, counts = np.unique(np.stack([train[name] for name in POSITIONS]), axis=1, return_counts=True)
        best = tuple(np.array([position]) for position in spans[:, counts.argmax()])
        return Constant(loss=float(np.mean(losses)), score=self.score(held_out, 0.0, best))

    def score(self, rows: Rows, loss: float, chosen: tuple[np.ndarray, ...]) -> float:
        """The share of answers of which both ends are right."""
        return float(
            np.all([rows[name] == found for name, found in zip(POSITIONS, chosen, strict=True)], axis=0).mean()
        )


def examples(path: Path) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Question, text, and begin and end of the answer in characters; questions without an answer are left out."""
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                for answer in question["answers"][:1]:
                    begin = answer["answer_start"]
                    yield question["question"], paragraph["context"], (begin, begin + len(answer["text"]))


def span(tokenizer: OPTTokenizer, context: str, begin: int, end: int) -> tuple[int, int]:
    """The first and last token of a text that have a part of the characters from `begin` to `end`."""
    offsets = np.array(tokenizer.engine.encode(context, add_special_tokens=False).offsets)
    inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin))
    return int(inside[0]), int(inside[-1])


TASK = QuestionAnswering()

if __name__ == "__main__":
    main(TASK)
