"""What reading a checkpoint may not do, watched from inside the process.

An audit hook hears of every file that is opened for writing or outside the input's directory, of every module that is
imported, of every program that is started, code object that is run and file that is removed. A timer ends what hangs,
and Python's own accounting says how much memory was taken at the peak.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import tracemalloc
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 10
"""What takes longer hangs; an input takes a few milliseconds."""

FACTOR, CONSTANT = 2, 8 << 20
"""Bytes that may be allocated: `FACTOR` × the input's files + `CONSTANT`."""

_FORBIDDEN = (
    *("exec", "compile", "import", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "fcntl."),
    *("pickle.find_class", "marshal.", "code.__new__", "builtins.input", "builtins.breakpoint", "webbrowser."),
    *("tempfile.", "sys._", "cpython.", "_thread.", "signal.", "http.", "urllib.", "ftplib.", "mmap.resize"),
)
"""Beginnings of the names of events that reading has no use for."""

_HARMLESS = ("os.listdir", "os.scandir", "sys._getframe", "os.walk", "fcntl.flock")
"""Of these: looking about, and the lock of a target, which is a file that was opened before and judged then."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hang(BaseException):
    """An input takes too long. No `Exception`, so that nothing on the way takes it for a damaged file."""


@dataclasses.dataclass
class Watch:
    """What happened while an input was read.

    Attributes:
        readable: the directory of the input.
        writable: a directory that may be written to, or None.
        violations: what was forbidden, a text each.
        peak: bytes that were allocated at the peak.
    """

    readable: str
    writable: str | None = None
    violations: list[str] = dataclasses.field(default_factory=list)
    peak: int = 0


_current: Watch | None = None
_installed = False


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    watch = _current
    if watch is None:
        return
    if event == "open":
        _hear_open(watch, *arguments)
    elif event.startswith(_FORBIDDEN) and not event.startswith(_HARMLESS):
        where = [os.fspath(argument) for argument in arguments if isinstance(argument, str | os.PathLike)]
        inside = watch.writable is not None and where and all(_lies_in(path, watch.writable) for path in where)
        if not inside:
            watch.violations.append(f"{event} {arguments!r:.200}")


def _hear_open(watch: Watch, path: Any, mode: Any, flags: Any) -> None:
    if isinstance(path, int):
        return
    text = os.fsdecode(path)
    writes = (isinstance(mode, str) and any(letter in mode for letter in "wxa+")) or bool(flags & _WRITING)
    if watch.writable is not None and _lies_in(text, watch.writable):
        return
    if writes or not _lies_in(text, watch.readable):
        watch.violations.append(f"open {text} {mode} {flags}")


def _lies_in(path: str, directory: str) -> bool:
    # The parts of the path as it was named: whether a link leads elsewhere is for the reader to find out.
    whole = os.path.normpath(os.path.join(directory, path))  # noqa: PTH118  # pathlib would audit
    return whole == directory or whole.startswith(directory + os.sep)


def _end(number: int, frame: FrameType | None) -> None:
    raise Hang


@contextlib.contextmanager
def watched(readable: Path, writable: Path | None = None) -> Generator[Watch]:
    """Watch what is done inside the `with` statement; needs the main thread, and for the peak `tracemalloc`."""
    global _current, _installed  # noqa: PLW0603  # an audit hook can't be taken away, so there is one for the process
    if not _installed:
        sys.addaudithook(_hear)
        _installed = True
    watch = Watch(str(readable.resolve()), None if writable is None else str(writable.resolve()))
    previous = signal.signal(signal.SIGALRM, _end)
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _current = watch
    try:
        yield watch
    finally:
        _current = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.peak = tracemalloc.get_traced_memory()[1] - before
        signal.signal(signal.SIGALRM, previous)
