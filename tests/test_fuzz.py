"""Two thousand damaged checkpoints out of a seed; `make fuzz` does a hundred thousand. See `tests/fuzz`."""

import os
import signal
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import guard, inputs, seeds
from tests.fuzz.inputs import ACTIONS, KINDS, Outcome, WrongError, attempt, make
from tests.fuzz.run import MEMORY, Totals, fuzz, table, warm_up

SEED, COUNT = 0, 2000


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory for the inputs, after everything that is imported lazily was."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        warm_up(SEED, Path(directory))
        tracemalloc.start()
        yield Path(directory)
        tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_never_does_more_than_fail(place: Path, kind: str):
    totals = Totals()
    for number in range(tuple(KINDS).index(kind), COUNT, len(KINDS)):
        totals.add(number, attempt(SEED, number, place))
    assert not totals.findings, totals.findings[0]
    assert totals.results[kind, "loaded"] > 5, "an input that every check refuses at once tests nothing"
    assert totals.results[kind, "refused"] > 5


def test_the_seeds_are_whole(place: Path):
    found = [*seeds.metaseq(), *seeds.by_pytorch(old=True), *seeds.by_pytorch(old=False)]
    found += [seed for name in inputs.FORMATS for sharded in (False, True) for seed in seeds.checkpoints(name, sharded)]
    for number, seed in enumerate(found):
        directory = place / f"seed-{number}"
        directory.mkdir()
        for name, content in seed.files.items():
            (directory / name).write_bytes(content)
        ACTIONS["load"](directory, directory)


def test_an_input_is_the_same_each_time():
    assert [make(7, number) for number in range(30)] == [make(7, number) for number in range(30)]
    assert make(7, 0) != make(8, 0)


def opens_elsewhere(_: Path) -> None:
    Path("/etc/hostname").read_bytes() if Path("/etc/hostname").exists() else Path("/proc/self/stat").read_bytes()


def imports(_: Path) -> None:
    import this  # noqa: F401  # pyright: ignore


def hides_a_hang(_: Path) -> None:
    try:
        time.sleep(5)
    except Exception:  # what a reader might do
        return


def misreads(_: Path) -> None:
    raise WrongError


@pytest.mark.parametrize(
    ("does", "result"),
    [
        (lambda _: os.system("true"), "execution"),
        (lambda _: eval("1 + 1"), "execution"),
        (lambda directory: (directory / "x").write_text("x"), "execution"),
        (lambda directory: (directory / "config.json").unlink(missing_ok=True), "execution"),
        (opens_elsewhere, "execution"),
        (imports, "execution"),
        (lambda _: bytearray(40 << 20), "oversize"),
        (lambda _: {}["absent"], "crash"),
        (misreads, "wrong"),
        (hides_a_hang, "hang"),
    ],
)
def test_what_a_reader_may_not_do_is_seen(
    place: Path, monkeypatch: pytest.MonkeyPatch, does: Callable[[Path], Any], result: str
):
    monkeypatch.setattr(guard, "SECONDS", 1)
    monkeypatch.setattr(inputs, "ACTIONS", {**ACTIONS, "load": lambda source, _: does(source)})
    assert attempt(SEED, 0, place).result == result


def dies(seed: int, numbers: range, pipe: Connection) -> None:
    """What a process does, but it dies of input 3."""
    for number in numbers:
        pipe.send(number)
        if number == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        pipe.send([(number, Outcome("config", "load", "refused"))])
    pipe.send(None)


def test_a_process_that_dies_is_replaced_and_its_input_named():
    totals = fuzz(SEED, 6, 1, work=dies)
    assert [(number, outcome.result) for number, outcome in totals.findings] == [(3, "crash")]
    assert totals.done == 6
    assert table(totals, 1).splitlines()[-1].startswith("6 inputs in 1 s")
