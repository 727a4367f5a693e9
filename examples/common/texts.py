"""Language models on plain text: documents are packed into rows that are full to the last token."""

from pathlib import Path
from typing import ClassVar

import numpy as np

from examples.common.options import Options
from examples.common.task import Constant, Rows, Start, Task, frequencies
from opt_common import OPTTokenizer


class TextTask(Task):
    """Learn a text file: UTF-8, with an empty line after each document."""

    metric = "held-out loss (nats a token)"
    # Of a published vocabulary, the logits of a whole batch would take a gigabyte.
    arguments: ClassVar = {"output_logits": False}

    def read(self, path: Path, tokenizer: OPTTokenizer, options: Options) -> Rows:
        """Blocks of `options.length` tokens."""
        blocks = pack(documents(path), tokenizer, options.length)
        return {"input_ids": blocks, "labels": blocks}

    def start(self, options: Options, tokenizer: OPTTokenizer, train: Path) -> Start:
        """The checkpoint as it is."""
        return Start(head="lm")

    def constant(self, train: Rows, held_out: Rows, vocab_size: int) -> Constant:
        """Knows how common each token is and nothing else."""
        shares = frequencies(train["labels"][:, 1:], vocab_size)
        loss = -float(np.log(shares[held_out["labels"][:, 1:]]).mean())
        return Constant(loss=loss, score=loss)

    def score(self, rows: Rows, loss: float, chosen: tuple[np.ndarray, ...]) -> float:
        """The loss itself."""
        return loss


def documents(path: Path) -> list[str]:
    """Documents of a text file: what stands between empty lines."""
    text = path.read_text(encoding="utf-8")
    found = (document.strip() for document in "\n".join(line.rstrip() for line in text.splitlines()).split("\n\n"))
    return [document for document in found if document]


def pack(texts: list[str], tokenizer: OPTTokenizer, length: int) -> np.ndarray:
    """Blocks (X, length) of one stream of ids, `</s>` in front of every document; the rest is left out."""
    # A text at a time: as Python integers, a large corpus would take many times its size.
    stream = np.concatenate([np.zeros(0, np.int64), *(np.array(tokenizer(text)["input_ids"]) for text in texts)])
    return stream[: len(stream) // length * length].reshape(-1, length)
