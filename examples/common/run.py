"""One run of an example: data, training with checkpoints, evaluation, plot. The framework is behind `Trainer`.

<output>/train…, held-out…   data, if the example writes its own
<output>/checkpoint-<step>   the latest checkpoint: the model, and all that it takes to go on
<output>/result.json         losses and scores, at the end
<output>/loss.png            the losses of all steps
"""

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from examples.common import checkpoints
from examples.common.options import Options, parse
from examples.common.plot import LABELS, plot
from examples.common.task import Rows, Start, Task
from opt_common import OPTError, OPTTokenizer


class Trainer(Protocol):
    """A model and its optimizer in one framework; `with_torch`, `with_tf` and `with_flax` have one each."""

    def __init__(self, task: Task, start: Start, options: Options, rates: np.ndarray, checkpoint: Path | None) -> None:
        """Make both.

        Args:
            task: what is learnt.
            start: the model that training starts with.
            options: of the run.
            rates: learning rate of each step.
            checkpoint: where to go on from; None at the start.
        """
        ...

    def step(self, step: int, rows: Rows) -> float:
        """One update; the loss before it. What is drawn at random depends on the seed and on the step alone."""
        ...

    def evaluate(self, rows: Rows) -> tuple[float, tuple[np.ndarray, ...]]:
        """The loss without dropout, and for each of the task's choices the best answer of each row."""
        ...

    def save(self, directory: Path) -> None:
        """Write the model (or the adapter) and AdamW's state, for any of the three frameworks."""
        ...


def main(task: Task, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run an example from the command line, from its start or from where it was interrupted; return the result."""
    options = parse(task.kind, task.name, task.about, task.defaults, sys.argv[1:] if argv is None else argv)
    try:
        return run(task, options)
    except OPTError as error:
        raise SystemExit(f"{error}") from error


def run(task: Task, options: Options) -> dict[str, Any]:
    """Train, evaluate and plot."""
    decisive = options.decisive()
    progress = checkpoints.latest(options.output, decisive)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    paths = data_of(task, options)
    train, held_out = (task.read(path, tokenizer, options) for path in paths)
    for path, rows in zip(paths, (train, held_out), strict=True):
        check_enough(path, rows, options)
    module = importlib.import_module(f"examples.common.with_{options.framework}")
    start = task.start(options, tokenizer, paths[0])
    trainer: Trainer = module.Trainer(task, start, options, learning_rates(options), progress.directory)

    def write(directory: Path) -> None:
        trainer.save(directory)
        tokenizer.save_pretrained(directory)

    losses = list(progress.losses)
    if losses:
        print(f"going on after step {len(losses)}, from {progress.directory}", flush=True)
    label = LABELS[options.framework]
    with tqdm(total=options.steps, initial=len(losses), desc=label, unit="step", disable=None) as bar:
        for step in range(len(losses), options.steps):
            losses.append(trainer.step(step, batch(train, step, options)))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                checkpoints.save(options.output, tuple(losses), decisive, write)
                if bar.disable:
                    print(f"step {step + 1}: loss {np.mean(losses[-options.save_every :]):.3f}", flush=True)
    result = {
        "title": task.about,
        "framework": options.framework,
        "metric": task.metric,
        "losses": losses,
        **evaluation(task, trainer, train, held_out, len(tokenizer), options),
    }
    (options.output / "result.json").write_text(json.dumps(result), encoding="utf-8")
    plot(options.output / "loss.png", [result])
    print(f"{task.metric}: {result['score']:.3f}; a constant predictor's is {result['constant_score']:.3f}")
    return result


def data_of(task: Task, options: Options) -> tuple[Path, Path]:
    """Where the data is; written now if it is the example's own."""
    if options.train is not None and options.held_out is not None:
        return options.train, options.held_out
    options.output.mkdir(parents=True, exist_ok=True)
    train, held_out = options.output / "train", options.output / "held-out"
    # The same data each time: a run that goes on needs no look at what an interrupted one left.
    task.write(train, options.rows, options.seed)
    task.write(held_out, max(options.batch_size, options.rows // 10), options.seed + 1)
    return train, held_out


def check_enough(path: Path, rows: Rows, options: Options) -> None:
    """Make sure that data fills a batch."""
    count = len(rows["input_ids"])
    if count < options.batch_size:
        raise SystemExit(
            f"{path} gives {count} rows of {options.length} tokens, and a batch takes {options.batch_size}: give more "
            f"data, or a smaller --batch-size or --length."
        )


def learning_rates(options: Options) -> np.ndarray:
    """The learning rate of each step: up to the highest in a straight line, and down to zero in another."""
    steps = np.arange(options.steps)
    falling = (options.steps - steps) / max(1, options.steps - options.warmup)
    return options.learning_rate * np.minimum(np.minimum((steps + 1) / max(1, options.warmup), falling), 1)


def batch(rows: Rows, step: int, options: Options) -> Rows:
    """The rows of a step: all in a new order, and again; a rest that fills no batch is left out."""
    count = len(rows["input_ids"])
    turn, first = divmod(step, count // options.batch_size)
    chosen = order(count, options.seed, turn)[first * options.batch_size :][: options.batch_size]
    return {name: column[chosen] for name, column in rows.items()}


@functools.lru_cache(maxsize=1)
def order(count: int, seed: int, turn: int) -> np.ndarray:
    """Numbers of rows in the order of a turn through them."""
    return np.random.default_rng([seed, turn]).permutation(count)


def step_seed(options: Options, step: int) -> int:
    """What seeds the random numbers of a step, so that they do not depend on where a run was interrupted."""
    return int(np.random.SeedSequence([options.seed, step]).generate_state(1)[0])


def evaluation(
    task: Task, trainer: Trainer, train: Rows, held_out: Rows, vocab_size: int, options: Options
) -> dict[str, float]:
    """Loss and score on held-out rows, and those of a constant predictor."""
    count = len(held_out["input_ids"])
    losses: list[float] = []
    chosen: list[tuple[np.ndarray, ...]] = []
    starts = range(0, count, options.batch_size)
    for first in starts:
        rows = {name: column[first : first + options.batch_size] for name, column in held_out.items()}
        loss, answers = trainer.evaluate(rows)
        losses.append(loss * len(rows["input_ids"]))
        chosen.append(answers)
    loss = sum(losses) / count
    constant = task.constant(train, held_out, vocab_size)
    return {
        "loss": loss,
        "score": task.score(held_out, loss, tuple(map(np.concatenate, zip(*chosen, strict=True)))),
        **{f"constant_{name}": value for name, value in dataclasses.asdict(constant).items()},
    }
