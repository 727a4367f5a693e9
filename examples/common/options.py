"""Options of the examples: the same words for each task and framework."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FRAMEWORKS = ("torch", "tf", "flax")


def option(default: Any, text: str) -> Any:
    """A field that is an option of the command line, with its help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What decides about a run. Each option is described where it is declared."""

    framework: str
    output: Path
    train: Path | None = dataclasses.field(default=None, metadata={"help": "data to learn from, in place of its own"})
    held_out: Path | None = dataclasses.field(default=None, metadata={"help": "data to judge by, with --train"})
    model: str = option("opt-tiny", "model to start from: a directory, or an id of the Hub")
    length: int = option(64, "tokens in a row")
    batch_size: int = option(16, "rows in a batch")
    steps: int = option(300, "number of updates")
    learning_rate: float = option(1e-3, "the highest; it rises to it, and falls to zero")
    warmup: int = option(20, "updates in which the learning rate rises")
    weight_decay: float = option(0.01, "of AdamW, for all parameters that train")
    clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "of the data, of new weights, of the order of rows, of dropout")
    rows: int = option(2000, "size of the data that the example writes")
    save_every: int = option(50, "updates from checkpoint to checkpoint")

    def decisive(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with; JSON gives back the same."""
        values = dataclasses.asdict(self)
        for name in ("framework", "output", "save_every"):
            del values[name]
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def parse(kind: type[Options], name: str, about: str, defaults: Mapping[str, Any], argv: Sequence[str]) -> Options:
    """Options from the command line.

    Args:
        kind: the task's options.
        name: the task's folder.
        about: what it does.
        defaults: where the task's differ.
        argv: arguments, without the program's name.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{name}",
        description=about,
        epilog="The same command goes on with a run that was interrupted, in another framework too.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--output", type=Path, help="directory of the run (default: build/examples/TASK-FRAMEWORK)")
    for field in dataclasses.fields(kind):
        if "help" in field.metadata:
            value = Path if field.default is None else type(field.default)
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, type=value, default=field.default, help=field.metadata["help"])
    parser.set_defaults(**defaults)
    values = vars(parser.parse_args(argv))
    if (values["train"] is None) != (values["held_out"] is None):
        parser.error("--train and --held-out belong together: give both, or none.")
    for number in ("length", "batch_size", "steps", "save_every", "rows"):
        if values[number] < 1:
            parser.error(f"--{number.replace('_', '-')} is {values[number]}; it must be 1 or more.")
    values["output"] = values["output"] or Path("build", "examples", f"{name}-{values['framework']}")
    return kind(**values)
