"""Checkpoints of a run: whole or not there, whenever the process ends.

A checkpoint is a directory `checkpoint-<step>` with the model (or adapter), the tokenizer, AdamW's state and
`progress.json`. It is written beside its place and renamed when it is complete.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conversion.target import sync

_PROGRESS = "progress.json"
_UNFINISHED = ".unfinished"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        directory: its checkpoint; None at the start.
        losses: of every step so far.
    """

    directory: Path | None = None
    losses: tuple[float, ...] = ()


def latest(output: Path, decisive: Mapping[str, Any]) -> Progress:
    """How far the run in a directory is.

    Args:
        output: the run's directory; it need not exist.
        decisive: what must be as it was when the run began.

    Raises:
        SystemExit: if it is a run with other options.
    """
    found = _checkpoints(output)
    if not found:
        return Progress()
    progress = json.loads((found[-1] / _PROGRESS).read_text(encoding="utf-8"))
    before = progress["options"]
    if before != decisive:
        changed = ", ".join(
            f"{name} was {before.get(name)} and is {decisive.get(name)}"
            for name in {**before, **decisive}
            if before.get(name) != decisive.get(name)
        )
        raise SystemExit(f"{output} holds a run with other options: {changed}. Name another directory with --output.")
    return Progress(directory=found[-1], losses=tuple(progress["losses"]))


def save(
    output: Path, losses: tuple[float, ...], decisive: Mapping[str, Any], write: Callable[[Path], None]
) -> Progress:
    """Add a checkpoint, and remove those before it.

    Args:
        output: the run's directory.
        losses: of every step so far.
        decisive: the options.
        write: writes model and optimizer into a directory.
    """
    unfinished = output / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    progress = {"options": dict(decisive), "losses": losses}
    (unfinished / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
    for path in (*unfinished.iterdir(), unfinished):
        sync(path)
    before = _checkpoints(output)
    directory = unfinished.rename(output / f"checkpoint-{len(losses)}")
    sync(output)
    for path in before:
        shutil.rmtree(path)
    return Progress(directory=directory, losses=losses)


def _checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints in the order of their steps."""
    names = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.glob("checkpoint-*")}
    steps = {path: int(name[1]) for path, name in names.items() if name}
    return sorted(steps, key=steps.__getitem__)
