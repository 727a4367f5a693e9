"""Fine-tuning of a LoRA adapter: `python -m examples.lora torch` (or tf, or flax)."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from examples.common.options import Options, option
from examples.common.run import main
from examples.common.task import Start
from examples.common.texts import TextTask
from examples.lora.data import recipes
from opt_common import LoraConfig, OPTTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """The options of an adapter."""

    rank: int = option(8, "rank of the adapter")
    lora_alpha: int = option(16, "its strength, in ranks")
    lora_dropout: float = option(0.05, "share of its input that is dropped in training")


class Lora(TextTask):
    """Learn another text with an adapter; the model stays as it is."""

    name = "lora"
    about = "Fine-tuning of a LoRA adapter"
    kind = LoraOptions
    defaults: ClassVar = {"steps": 300, "length": 128, "learning_rate": 1e-2}

    def write(self, path: Path, rows: int, seed: int) -> None:
        """Recipes."""
        path.write_text("\n\n".join(recipes(rows, seed)) + "\n", encoding="utf-8")

    def start(self, options: LoraOptions, tokenizer: OPTTokenizer, train: Path) -> Start:
        """The checkpoint with a new adapter on each of its linear layers."""
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules="all-linear",
        )
        return Start(head="lm", lora=lora)


TASK = Lora()

if __name__ == "__main__":
    main(TASK)
