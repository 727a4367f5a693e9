"""Fine-tuning on a text file: `python -m examples.fine_tuning torch --train FILE --held-out FILE`."""

from pathlib import Path
from typing import ClassVar

from examples.common.run import main
from examples.common.texts import TextTask
from examples.fine_tuning.data import entries


class FineTuning(TextTask):
    """Go on with a model on another text."""

    name = "fine_tuning"
    about = "Fine-tuning on a text file"
    defaults: ClassVar = {"steps": 200, "length": 128}

    def write(self, path: Path, rows: int, seed: int) -> None:
        """The log of a lighthouse."""
        path.write_text("\n\n".join(entries(rows, seed)) + "\n", encoding="utf-8")


TASK = FineTuning()

if __name__ == "__main__":
    main(TASK)
