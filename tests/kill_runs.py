"""Conversions that are killed, run out of disk, or whose source changes under them: what is there afterwards?

    python -m tests.kill_runs --kills 200 --full 200 --changes 200 --seed 0

So many runs are made that the numbers asked for were really killed, out of disk, or had their source changed in time.
Every run takes a random pair of formats, in one file or in shards, a new target or one that exists (`--force`), and a
random moment. Afterwards: the target is absent or whole (of an existing one: old, new, or without weights that load),
the source has the bytes it had, files of others are where they were, a run without --resume says what lies there and
what to do, and one with --resume ends with the very bytes of a run that nothing happened to, and nothing beside them.

The disk is made full by a small file system where the user may mount one (root on Linux), else in turns by a budget of
bytes for all files that are written and by the system's limit on the length of a file.

Runs are children of this process by `fork`, which saves them the imports; it must therefore have no other threads.
"""

import argparse
import builtins
import collections
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py  # noqa: F401  (imported here so that no child has to)

from conversion import cli, convert, save_checkpoint, target
from conversion.plan import TARGETS
from opt_common.config import OPTConfig
from opt_common.native_files import KERAS_HUB
from opt_common.params import parameter_table
from tests.seeded import seeded_weight

SHARD = "150KB"
PLACE = ".target.part"
SINGLE = (KERAS_HUB,)
"""Formats that have one weight file only."""

_CONFIG = OPTConfig(
    vocab_size=512,
    hidden_size=64,
    word_embed_proj_dim=64,
    ffn_dim=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
)


def content(directory: Path) -> dict[str, str]:
    """Digest of every file under a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@dataclasses.dataclass(frozen=True)
class Pair:
    """What is converted to what."""

    source: str
    sharded_source: bool
    to: str
    sharded: bool

    @property
    def folder(self) -> str:
        """Name of the source."""
        return f"{self.source}-{'sharded' if self.sharded_source else 'single'}"

    @property
    def options(self) -> list[str]:
        """The command's options."""
        split = ["--model-parts", "4"] if self.to == "metaseq" else ["--max-shard-size", SHARD]
        return ["--to", self.to, "--quiet", *(split if self.sharded else [])]


class Runner:
    """The directories, and what a run that nothing happens to gives."""

    def __init__(self, directory: Path, seed: int, *, mount: bool) -> None:
        self.directory, self.random, self.mount = directory, random.Random(seed), mount
        self.outcomes: collections.Counter[str] = collections.Counter()
        self._expected: dict[tuple[str, str, bool], tuple[dict[str, str], float]] = {}
        for number in (1, 2):
            first = directory / f"model{number}"
            save_checkpoint(
                first,
                _CONFIG,
                parameter_table(_CONFIG),
                lambda parameter, number=number: seeded_weight(number, parameter.name, parameter.shape),
            )
        for to in TARGETS:
            for sharded in (False,) if to in SINGLE else (False, True):
                split = {"model_parts": 4} if to == "metaseq" else {"max_shard_size": SHARD}
                name = Pair(to, sharded, to, sharded).folder
                convert(directory / "model1", directory / "sources" / name, to, **(split if sharded else {}))

    def pair(self) -> Pair:
        """A random pair."""
        draw = self.random
        source, to = draw.choice(TARGETS), draw.choice(TARGETS)
        many, sharded = draw.random() < 0.5, draw.random() < 0.7
        return Pair(source, many and source not in SINGLE, to, sharded and to not in SINGLE)

    def expected(self, pair: Pair) -> tuple[dict[str, str], float]:
        """What the target holds in the end, and how long that takes."""
        key = (pair.folder, pair.to, pair.sharded)
        if key not in self._expected:
            place = self.directory / "expected"
            start = time.perf_counter()
            code, said = self.run(self.directory / "sources" / pair.folder, place, pair)
            seconds = time.perf_counter() - start
            assert code == 0, said
            self._expected[key] = content(place), seconds
            shutil.rmtree(place)
        return self._expected[key]

    def start(self, source: Path, new: Path, pair: Pair, *extra: str, before: Callable[[], None] = lambda: None) -> int:
        """A child that converts; its process id."""
        arguments = ["convert", str(source), str(new), *pair.options, *extra]
        child = os.fork()
        if child:
            return child
        code = 70
        signal.alarm(60)  # whoever hangs is ended, and found by it
        try:
            said = os.open(self.directory / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            before()
            code = cli.main(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException as error:
            os.write(2, f"Traceback {error!r}".encode())
        finally:
            os._exit(code)

    def end(self, child: int) -> tuple[int, str]:
        """The exit code of a child (negative: the signal that killed it), and what it said."""
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, (self.directory / "said").read_text()

    def run(self, source: Path, new: Path, pair: Pair, *extra: str) -> tuple[int, str]:
        """A conversion to its end."""
        return self.end(self.start(source, new, pair, *extra))

    # The three kinds of runs

    def killed(self) -> bool:
        """Killed at a random moment; whether the run was not done before."""
        pair = self.pair()
        source, new = self.directory / "sources" / pair.folder, self.directory / "target"
        expected, seconds = self.expected(pair)
        before = content(source)
        old = self.prepare(new, pair)
        force = ["--force"] if old else []
        child = self.start(source, new, pair, *force)
        time.sleep(self.random.random() * seconds * 1.1)
        os.kill(child, signal.SIGKILL)
        code, said = self.end(child)
        assert code in (0, -signal.SIGKILL), said
        self.count("killed" if code else "was done before")
        assert content(source) == before
        self.check(new, expected, old)
        self.check_without_resume(source, new, pair, force)
        self.complete(source, new, pair, force, expected, old)
        return code != 0

    def full(self) -> bool:
        """The disk is full after a random number of bytes; whether they were too few."""
        pair = self.pair()
        source = self.directory / "sources" / pair.folder
        expected, _ = self.expected(pair)
        before = content(source)
        needed = 4096 * 8 + sum((self.directory / "sources" / pair.folder / name).stat().st_size for name in before)
        room = self.random.randrange(needed)
        kinds = ["tmpfs"] if self.mount else ["budget", "length"]
        kind = self.random.choice(kinds)
        with self.disk(kind, room) as (place, before_start, make_room):
            new = place / "target"
            child = self.start(source, new, pair, before=before_start)
            code, said = self.end(child)
            self.count(f"full disk ({kind})" if code else "fitted in")
            assert content(source) == before
            if code:
                assert code == 1, (code, said)
                assert any(os.strerror(number) in said for number in (errno.ENOSPC, errno.EFBIG)), said
                kept = (place / PLACE).exists()
                assert ("--resume" in said) == kept, said
                assert kept or "Nothing was left half-written" in said
                self.count("finished files kept" if kept else "nothing left")
            self.check(new, expected, {})
            make_room()
            self.complete(source, new, pair, [], expected, {})
        return code != 0

    def changed(self) -> bool:
        """The source is changed at a random moment; whether it was while it was read."""
        pair = self.pair()
        source, new = self.directory / "changing", self.directory / "target"
        expected, seconds = self.expected(pair)
        shutil.copytree(self.directory / "sources" / pair.folder, source)
        weights = [path for path in sorted(source.iterdir()) if path.is_file() and path.suffix != ".json"]
        child = self.start(source, new, pair)
        while not (self.directory / PLACE / "files").exists() and not new.exists():
            time.sleep(1e-4)
        time.sleep(self.random.random() * seconds)
        change(self.random, self.random.choice(weights))
        after = content(source)
        code, said = self.end(child)
        assert content(source) == after
        self.check(new, expected, {})
        if code:
            assert code == 1, (code, said)
            assert "The source was changed while it was read" in said, said
            assert "Run the command again" in said
            assert not new.exists()
            assert not (self.directory / PLACE).exists()
        self.count("change noticed" if code else "was done before")
        shutil.rmtree(source)
        shutil.copytree(self.directory / "sources" / pair.folder, source)
        if code:
            self.complete(source, new, pair, [], expected, {})
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(source)
        return code != 0

    # What they share

    def prepare(self, new: Path, pair: Pair) -> dict[str, str]:
        """In a third of the runs a target that exists, with other weights and a file of somebody else's."""
        if self.random.random() < 2 / 3:
            return {}
        code, said = self.run(self.directory / "model2", new, pair)
        assert code == 0, said
        (new / "notes.txt").write_text("not ours")
        return content(new)

    def check(self, new: Path, expected: dict[str, str], old: dict[str, str]) -> None:
        """The target is absent or whole."""
        found = content(new) if new.exists() else {}
        if not old:
            assert found in ({}, expected), found
            return
        theirs = {"notes.txt": old["notes.txt"]}
        assert theirs.items() <= found.items()
        if found not in (old, {**expected, **theirs}):
            assert cli.main(["verify", str(new)]) == 1, "a mixture of old and new files loads"

    def check_without_resume(self, source: Path, new: Path, pair: Pair, force: list[str]) -> None:
        """A run without --resume tells about work that was left, and leaves it."""
        left = content(self.directory / PLACE) if (self.directory / PLACE / "files").exists() else {}
        if not left or (new.exists() and not force):
            return
        code, said = self.run(source, new, pair, *force)
        if "manifest.json" not in left:
            assert code == 0, said
            return
        assert code == 1, said
        assert str(self.directory / PLACE) in said, said
        assert "--resume" in said, said
        assert content(self.directory / PLACE) == left
        self.count("work was left, and told")

    def complete(
        self, source: Path, new: Path, pair: Pair, force: list[str], expected: dict[str, str], old: dict[str, str]
    ) -> None:
        """A run with --resume ends with the bytes of a run that nothing happened to."""
        # Killed between its last two steps, a run leaves the directory that it worked in, empty.
        with contextlib.suppress(OSError):
            (new.parent / PLACE).rmdir()
        done = new.exists() and not (new.parent / PLACE).exists() and not force
        code, said = self.run(source, new, pair, "--resume", *force)
        assert code == 0 or (done and "exists" in said), said
        theirs = {"notes.txt": old["notes.txt"]} if old else {}
        assert content(new) == {**expected, **theirs}
        assert not (new.parent / PLACE).exists()
        shutil.rmtree(new)

    def count(self, outcome: str) -> None:
        """Count what came of a run."""
        self.outcomes[outcome] += 1

    @contextlib.contextmanager
    def disk(self, kind: str, room: int) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
        """A directory with little room; what a child has to do first; how to make room."""
        place = self.directory / "disk"
        place.mkdir()

        def nothing_known() -> None:
            # Whoever else writes there takes the room after it was measured.
            target.free_bytes = lambda _: 1 << 60

        def limited() -> None:
            nothing_known()
            if kind == "length":
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            elif kind == "budget":
                spend(room)

        def mounted(*command: str) -> None:
            subprocess.run([*command, str(place)], check=True)

        if kind == "tmpfs":
            mounted("mount", "-t", "tmpfs", "-o", f"size={max(4096, room)}", "tmpfs")
        try:
            make_room = (lambda: mounted("mount", "-o", "remount,size=1g")) if kind == "tmpfs" else (lambda: None)
            yield place, limited, make_room
        finally:
            if kind == "tmpfs":
                mounted("umount")
        shutil.rmtree(place)


def spend(budget: int) -> None:
    """From now on, this process can write so many bytes to files that Python opens, and then the disk is full."""
    left, lock = [budget], threading.Lock()

    class Limited(io.FileIO):
        def write(self, data: object, /) -> int:
            view = memoryview(data).cast("B")  # type: ignore[arg-type]
            with lock:
                if not left[0] and len(view):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.name))
                count = super().write(view[: left[0]])
                left[0] -= count
            return count

    real = io.open

    def limited(file: object, mode: str = "r", buffering: int = -1, *rest: object, **options: object) -> object:
        if "b" in mode and any(letter in mode for letter in "wxa+"):
            raw = Limited(file, mode.replace("b", ""))
            return raw if buffering == 0 else (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return real(file, mode, buffering, *rest, **options)

    io.open = builtins.open = limited  # type: ignore[assignment]


def change(draw: random.Random, path: Path) -> None:
    """Change a file in one of the ways in which files are changed."""
    size = path.stat().st_size
    kind = draw.choice(["overwrite", "cut", "empty", "append", "replace", "remove", "touch"])
    if kind == "overwrite":
        with path.open("r+b") as file:
            file.seek(draw.randrange(size))
            file.write(draw.randbytes(64))
    elif kind in ("cut", "empty"):
        os.truncate(path, draw.randrange(size) if kind == "cut" else 0)
    elif kind == "append":
        with path.open("ab") as file:
            file.write(b"more")
    elif kind == "replace":
        new = path.with_name("incoming")
        new.write_bytes(draw.randbytes(size))
        new.replace(path)
    elif kind == "remove":
        path.unlink()
    else:
        path.touch()


def main() -> None:
    """Make the runs, and print what came of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ("kills", "full", "changes"):
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mount", action="store_true", help="make small file systems for the runs out of disk")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        runner = Runner(Path(directory), arguments.seed, mount=arguments.mount)
        counts = {"killed": arguments.kills, "full": arguments.full, "changed": arguments.changes}
        for kind, count in counts.items():
            done = 0
            while done < count:
                try:
                    done += getattr(runner, kind)()
                except BaseException:
                    print(f"run {done} of kind {kind} with seed {arguments.seed} failed", file=sys.stderr)
                    raise
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"runs": counts, "outcomes": dict(sorted(runner.outcomes.items())), "seconds": seconds}))


if __name__ == "__main__":
    main()
