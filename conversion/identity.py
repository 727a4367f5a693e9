"""Whether files are still what they were: noticed by what the file system notes of them, without reading them."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from opt_common.errors import CheckpointError

Identity = tuple[int, int, int, int]
"""Size, time of the last change of the content and of the entry, and number of the file in its file system.

The time of the entry is there because the other can be set back by a program that copies files; that one cannot.
"""


def identities(files: Iterable[Path]) -> dict[Path, Identity]:
    """What the file system notes of files, and of those in directories; those that are absent are left out."""
    found: dict[Path, Identity] = {}
    for path in itertools.chain.from_iterable((path, *sorted(path.rglob("*"))) for path in files):
        try:
            status = path.stat()
        except OSError:
            continue
        found[path] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return found


def changed(before: Mapping[Path, Identity]) -> list[Path]:
    """The files that are no longer what they were."""
    now = identities(before)
    return [path for path, identity in before.items() if now.get(path) != identity]


def check_unchanged(before: Mapping[Path, Identity]) -> None:
    """Make sure that files are what they were.

    Raises:
        CheckpointError: naming those that are not.
    """
    if paths := changed(before):
        raise CheckpointError(changed_meanwhile(paths))


def changed_meanwhile(paths: Sequence[Path]) -> str:
    """The sentence for a source that was written to while it was read."""
    names = ", ".join(os.fspath(path) for path in paths[:5]) + (" …" if len(paths) > 5 else "")
    return (
        f"The source was changed while it was read: {names}. Nothing was written. "
        f"Run the command again when nothing writes there any more."
    )
