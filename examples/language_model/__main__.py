"""A language model from scratch, on little stories: `python -m examples.language_model torch` (or tf, or flax)."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from examples.common.options import Options, option
from examples.common.run import main
from examples.common.task import Start
from examples.common.texts import TextTask
from examples.opt_tiny.corpus import stories
from opt_common import OPTConfig, OPTTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The options of a model with new weights."""

    hidden_size: int = option(128, "width of the model")
    layers: int = option(4, "number of layers")
    heads: int = option(4, "number of attention heads")
    dropout: float = option(0.0, "share that is dropped in training")


class LanguageModel(TextTask):
    """Learn to tell stories. `--model` names the tokenizer only."""

    name = "language_model"
    about = "A language model from scratch"
    kind = ModelOptions
    defaults: ClassVar = {"length": 128, "learning_rate": 3e-3, "weight_decay": 0.1, "steps": 600, "rows": 8000}

    def write(self, path: Path, rows: int, seed: int) -> None:
        """Stories of the grammar that the bundled model knows."""
        path.write_text("\n\n".join(stories(rows, seed=seed)) + "\n", encoding="utf-8")

    def start(self, options: ModelOptions, tokenizer: OPTTokenizer, train: Path) -> Start:
        """New weights."""
        config = OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden_size,
            word_embed_proj_dim=options.hidden_size,
            ffn_dim=4 * options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            max_position_embeddings=options.length,
            dropout=options.dropout,
        )
        return Start(head="lm", config=config)


TASK = LanguageModel()

if __name__ == "__main__":
    main(TASK)
