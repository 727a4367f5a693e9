"""The directory that a checkpoint is written to: what may lie in it, what room it has, how files get their place."""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from conversion.plan import Plan
from opt_common.errors import CheckpointError
from opt_common.hub import WEIGHT_FILES, MetaseqName
from opt_common.native_files import KERAS_ARCHIVE, KERAS_INDEX, KERAS_WEIGHTS

_OVERHEAD_BYTES = 4096
"""What a file system and the structure of a file take, at most, for each tensor and each file."""


def resolved(target: Path) -> Path:
    """Where the path of a target leads, links followed.

    Raises:
        CheckpointError: if it leads nowhere, by links that come back to themselves.
    """
    try:
        target.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{target} is behind a link that leads to itself. Choose another target.") from None
    return target.resolve()


def needed_bytes(plan: Plan, documents: Mapping[str, bytes]) -> int:
    """Bytes of the disk that writing a plan takes, a little more than the files will have."""
    tensors = sum(map(len, plan.shards))
    return plan.total_bytes + sum(map(len, documents.values())) + _OVERHEAD_BYTES * (tensors + len(documents) + 1)


def free_bytes(directory: Path) -> int:
    """Bytes that are free where a directory would be written."""
    place = directory.resolve().parent
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_disk(directory: Path, plan: Plan, documents: Mapping[str, bytes], *, finished: int = 0) -> None:
    """Make sure that there is room for a plan, before hours are spent on it.

    Args:
        directory: where to.
        plan: what is to be written.
        documents: further files by name.
        finished: bytes of it that are on the disk already.

    Raises:
        CheckpointError: if there is not. Files that are to be replaced stay until the new ones are whole.
    """
    needed = needed_bytes(plan, documents) - finished
    if (free := free_bytes(directory)) < needed:
        raise CheckpointError(no_room(directory, needed, free))


def no_room(directory: Path, needed: int, free: int) -> str:
    """The sentence for a disk that is too small."""
    return (
        f"{directory} needs {needed:,} bytes, of which the disk has {free:,} free. "
        f"Make room, choose another target, or a narrower dtype."
    )


def check_target(directory: Path, format_name: str, names: set[str]) -> None:
    """Make sure that a checkpoint written to `directory` would be the only one in it.

    Raises:
        CheckpointError: if it is no directory, or it holds weights that would stay beside ours.
    """
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} exists and is no directory. Choose another target.")
    others = sorted(path.name for path in directory.iterdir() if path.name not in names and _is_weights(path.name))
    if others:
        raise CheckpointError(
            f"{directory} holds other weights, {', '.join(others[:5])}{' …' if len(others) > 5 else ''}; beside "
            f"{format_name} weights nobody could tell which are meant. Remove those files or choose another target."
        )


def _is_weights(name: str) -> bool:
    """Whether a file of this name is part of a checkpoint."""
    if name.endswith((KERAS_WEIGHTS, KERAS_ARCHIVE, KERAS_INDEX)):
        return True
    return MetaseqName.parse(name) is not None or any(
        name in (files.single, files.index) or files.is_shard(name) for files in WEIGHT_FILES.values()
    )


def publish(staging: Path, directory: Path, last: str) -> None:
    """Move a whole checkpoint to its place."""
    if not directory.exists():
        staging.rename(directory)
        sync(directory.parent)
        return
    # Whatever makes the directory a checkpoint goes first and comes last, so that an interruption in between leaves
    # one without weights, never a mixture of old and new ones.
    names = (path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    new = sorted(names, key=lambda name: (name == last, name))
    if last in new:  # else an earlier run was interrupted after it
        (directory / last).unlink(missing_ok=True)
        sync(directory)
    for name in new:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(directory / name)
    for path in {(directory / name).parent for name in new}:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no way to ask for it
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
