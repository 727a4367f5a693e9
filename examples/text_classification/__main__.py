"""Text classification: `python -m examples.text_classification torch` (or tf, or flax)."""

from pathlib import Path
from typing import ClassVar

import numpy as np

from examples.common.options import Options
from examples.common.run import main
from examples.common.task import Constant, Rows, Start, Task, frequencies
from examples.text_classification.data import LABELS, reviews
from opt_common import OPTTokenizer


class TextClassification(Task):
    """Learn which label a text has. Data is a directory with a folder of text files for each label."""

    name = "text_classification"
    about = "Text classification"
    defaults: ClassVar = {"length": 48, "steps": 300, "batch_size": 32}
    metric = "accuracy"
    choices = ("logits",)

    def write(self, path: Path, rows: int, seed: int) -> None:
        """Reviews of an inn."""
        for label in LABELS:
            (path / label).mkdir(parents=True, exist_ok=True)
        for number, (label, text) in enumerate(reviews(rows, seed)):
            (path / label / f"{number}.txt").write_text(text, encoding="utf-8")

    def read(self, path: Path, tokenizer: OPTTokenizer, options: Options) -> Rows:
        """Texts, cut off and padded to `options.length`, and their labels."""
        files = [
            (label, file) for label, name in enumerate(labels(path)) for file in sorted((path / name).glob("*.txt"))
        ]
        texts = [file.read_text(encoding="utf-8") for _, file in files]
        encoded = tokenizer(
            texts, padding="max_length", truncation=True, max_length=options.length, return_tensors="np"
        )
        return {**encoded, "labels": np.array([label for label, _ in files])}

    def start(self, options: Options, tokenizer: OPTTokenizer, train: Path) -> Start:
        """A new head on the checkpoint's decoder."""
        arguments = {"new_head": True, "id2label": dict(enumerate(labels(train)))}
        return Start(head="sequence_classification", arguments=arguments)

    def constant(self, train: Rows, held_out: Rows, vocab_size: int) -> Constant:
        """Always the most common label."""
        shares = frequencies(train["labels"], int(train["labels"].max()) + 1)
        return Constant(
            loss=-float(np.log(shares[held_out["labels"]]).mean()),
            score=float((held_out["labels"] == shares.argmax()).mean()),
        )

    def score(self, rows: Rows, loss: float, chosen: tuple[np.ndarray, ...]) -> float:
        """The share of right labels."""
        return float((chosen[0] == rows["labels"]).mean())


def labels(path: Path) -> list[str]:
    """Names of the labels. A folder of texts without a label, as IMDb has one, is left out."""
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir() and folder.name != "unsup")


TASK = TextClassification()

if __name__ == "__main__":
    main(TASK)
