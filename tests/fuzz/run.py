"""Many inputs in several processes: `python -m tests.fuzz.run --count 100000`.

A process that dies or hangs is replaced, and the input that it had in hand is named. Each finding says how to see it
again: the same seed and number make the same input.
"""

import argparse
import collections
import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fuzz.guard import CONSTANT, FACTOR, SECONDS
from tests.fuzz.inputs import FINDINGS, KINDS, ROUND, Outcome, attempt, kind_of

_ADDRESS_SPACE = 8 << 30
"""Bytes that a process may map: what the accounting of Python does not see ends here."""

_STALLED = 6 * SECONDS
"""Seconds without an answer after which a process hangs where no signal reaches it."""

_BATCH = 100

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where the inputs are written: no disk, if the system has such a place."""


@dataclasses.dataclass
class Totals:
    """What became of the inputs so far."""

    results: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    findings: list[tuple[int, Outcome]] = dataclasses.field(default_factory=list)
    largest: int = 0
    done: int = 0

    def add(self, number: int, outcome: Outcome) -> None:
        """Count one input."""
        self.done += 1
        self.results[outcome.kind, outcome.result] += 1
        self.largest = max(self.largest, outcome.allocated[0] - FACTOR * outcome.allocated[1])
        if outcome.is_finding:
            self.findings.append((number, outcome))


def warm_up(seed: int, place: Path) -> None:
    """Do each action with inputs of each kind: whatever is imported lazily is there before it would be a finding."""
    b"x".decode("raw_unicode_escape")  # a codec that old pickles name
    for number in range(len(KINDS) * ROUND):
        attempt(seed, number, place)


def do_inputs(seed: int, numbers: range, pipe: Connection) -> None:
    """Do some inputs, and tell of each: its number before it is read, then the outcomes, in batches."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        warm_up(seed, Path(place))
        tracemalloc.start()
        found: list[tuple[int, Outcome]] = []
        for number in numbers:
            pipe.send(number)
            found.append((number, attempt(seed, number, Path(place))))
            if len(found) == _BATCH or found[-1][1].is_finding:
                pipe.send(found)
                found = []
        pipe.send(found)
        pipe.send(None)


Work = Callable[[int, range, Connection], None]
"""What a process does: `do_inputs`."""


class _Worker:
    """A process and what it is to do."""

    def __init__(self, work: Work, seed: int, numbers: range) -> None:
        self.work, self.seed, self.numbers = work, seed, numbers
        self.current = numbers.start
        self.heard = time.monotonic()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(seed, numbers, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """End the process, however it is."""
        self.process.join(timeout=1)  # one that has ended says how
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def after(self) -> "_Worker":
        """Another process, for what comes after the input in hand."""
        return _Worker(self.work, self.seed, self.numbers[self.numbers.index(self.current) + 1 :])


def fuzz(
    seed: int, count: int, workers: int, *, first: int = 0, progress: bool = False, work: Work | None = None
) -> Totals:
    """Do `count` inputs from `first` on, by `do_inputs` or another function of a module.

    `progress` prints on the way.
    """
    totals = Totals()
    end = first + count
    running = [_Worker(work or do_inputs, seed, range(start, end, workers)) for start in range(first, first + workers)]
    shown, told = time.monotonic(), 0
    while running:
        ready = wait([worker.pipe for worker in running], timeout=1)
        for worker in list(running):
            if worker.pipe in ready:
                lost = not _heard(worker, totals, running)
            else:
                lost = time.monotonic() - worker.heard > _STALLED
            if lost:
                running.remove(worker)
                worker.end()
                code = worker.process.exitcode
                result = "hang" if time.monotonic() - worker.heard > _STALLED else "crash"
                kind = kind_of(worker.current)
                totals.add(worker.current, Outcome(kind, "", result, f"the process ended with code {code}"))
                running.append(worker.after())
        for number, outcome in totals.findings[told:] if progress else ():
            where = f"input {number} ({outcome.kind}, {outcome.action})"
            print(f"{where}: {outcome.result}\n{outcome.detail}", flush=True)
        told = len(totals.findings)
        if progress and time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{totals.done:7} of {count}, {len(totals.findings)} findings", file=sys.stderr, flush=True)
    return totals


def _heard(worker: _Worker, totals: Totals, running: list[_Worker]) -> bool:
    """Take in one message; whether the process still lives or has done all."""
    try:
        message: Any = worker.pipe.recv()
    except EOFError:
        return False
    worker.heard = time.monotonic()
    if message is None:
        running.remove(worker)
        worker.end()
    elif isinstance(message, int):
        worker.current = message
    else:
        for number, outcome in message:
            totals.add(number, outcome)
    return True


def main() -> int:
    """Run, print a table and each finding; the exit code is 1 if there is one."""
    parser = argparse.ArgumentParser("python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="where to begin, to go in stretches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="read one input, and say what becomes of it")
    arguments = parser.parse_args()
    if arguments.only is not None:
        with tempfile.TemporaryDirectory() as place:
            warm_up(arguments.seed, Path(place))
            tracemalloc.start()
            outcome = attempt(arguments.seed, arguments.only, Path(place))
        print(f"{outcome.kind}, {outcome.action}: {outcome.result}\n{outcome.detail}")
        return int(outcome.is_finding)
    started = time.monotonic()
    totals = fuzz(arguments.seed, arguments.count, arguments.workers, first=arguments.first, progress=True)
    print(table(totals, time.monotonic() - started))
    return int(bool(totals.findings))


def table(totals: Totals, seconds: float) -> str:
    """What became of all inputs, by kind, for people."""
    columns = ("loaded", "refused", *FINDINGS)
    lines = [f"{'kind':18}" + "".join(f"{name:>11}" for name in columns)]
    for kind in KINDS:
        lines.append(f"{kind:18}" + "".join(f"{totals.results[kind, name]:11}" for name in columns))
    sums = [sum(totals.results[kind, name] for kind in KINDS) for name in columns]
    lines.append(f"{'all':18}" + "".join(f"{number:11}" for number in sums))
    over = f"at most {max(0, totals.largest):,} bytes beyond {FACTOR} × the files (allowed: {CONSTANT:,})"
    lines.append(f"{totals.done:,} inputs in {seconds:,.0f} s; allocated {over}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
