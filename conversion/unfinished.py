"""Work on a target that is not whole yet: a directory beside the target, with a note of what is finished in it.

    .<target>.part/files/…           the files that will be the target
    .<target>.part/manifest.json     what the work is, and bytes and SHA-256 of each file that is finished

The note says what the source was and what is to be written, so that nobody goes on with a source that has changed
since, or with other options. One process at a time holds the directory; that of a process that was killed is free.
Nothing is deleted but files of the names that the work writes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

from conversion.identity import Identity
from conversion.plan import Plan, json_bytes
from conversion.target import publish, resolved, sync
from opt_common.errors import CheckpointError

_MANIFEST = "manifest.json"
_NEW_MANIFEST = "manifest.json.new"
_FILES = "files"
_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What must be the same for work to be gone on with.

    Attributes:
        source: what the file system notes of each weight file that is read.
        content: a digest of everything that decides what is written: names, dtypes, shapes, files, documents.
        program: a digest of this package, another version of which might write other bytes.
    """

    source: Mapping[str, Identity]
    content: str
    program: str

    @classmethod
    def of(cls, source: Mapping[Path, Identity], plan: Plan, documents: Mapping[str, bytes]) -> "Task":
        """The task of writing a plan from the files of a checkpoint."""
        digest = hashlib.sha256()
        for file, shard in zip(plan.files, plan.shards, strict=True):
            for tensor in shard:
                rows = [parameter.name for parameter in tensor.parameters]
                digest.update(repr((file, tensor.spec, tensor.transposed, tensor.window, rows)).encode())
        digest.update(repr((plan.format, sorted(plan.arguments.items()))).encode())
        for name, content in sorted(documents.items()):
            digest.update(repr((name, content)).encode())
        return cls(
            source={str(path.resolve()): identity for path, identity in source.items()},
            content=digest.hexdigest(),
            program=_own_digest(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON gives it back."""
        return {**dataclasses.asdict(self), "source": {path: list(found) for path, found in self.source.items()}}


def place_beside(target: Path, mark: str | None = None) -> Path:
    """The directory in which a target is prepared; with a mark, one of its own that nobody goes on with."""
    return target.parent / (f".{target.name}.part" if mark is None else f".{target.name}.{mark}.part")


class Work:
    """The directory beside a target while it is written.

    Attributes:
        files: where the files are written.
        finished: bytes and digest of each file that is finished; those of an earlier run have been checked.
        published: whether an earlier run got as far as the target, so that there is nothing left to do.
    """

    def __init__(self, target: Path, names: tuple[str, ...], task: Task | None) -> None:
        """`names` are the files that the target will have; without a task, the work can't be gone on with."""
        self._target, self._names, self._task = target, names, task
        self.place = place_beside(target, None if task is not None else secrets.token_hex(4))
        self.files = self.place / _FILES
        self.finished: dict[str, tuple[int, str]] = {}
        self.published = False
        self._whole = False
        self._lock: int | None = None
        self._made: list[Path] = []

    @property
    def whole(self) -> bool:
        """Whether all files are written, and some of them may have their place already."""
        return self._whole

    @property
    def finished_bytes(self) -> int:
        """Bytes of the files that are finished."""
        return sum(size for size, _ in self.finished.values())

    def open(self, *, resume: bool) -> None:
        """Make the directory, or take over that of an earlier run.

        Raises:
            CheckpointError: if there is one and it is not to be gone on with, or can't be.
        """
        self._make()
        manifest: dict[str, Any] | None = {}
        try:
            self._lock = self._locked()
            manifest = self._manifest()
            if manifest is None:
                self._check_foreign({})
            elif not self.files.exists():  # renamed to the target; only the note was left
                self._take_away((_MANIFEST, _NEW_MANIFEST), self.place)
                self.published = resume and self._target.exists()
            else:
                self._take_over(manifest, resume=resume)
            if self.published:
                self._remove()
            else:
                self.files.mkdir(exist_ok=True)
                self._save()
        except BaseException as error:
            if manifest is None and isinstance(error, OSError):  # no room even for the note
                self._remove()
            self._unlock()
            raise

    def note(self, name: str, digest: str) -> None:
        """Note that a file is finished; it is on the disk by now."""
        finished = {**self.finished, name: ((self.files / name).stat().st_size, digest)}
        self._save(finished=finished, durable=True)
        self.finished = finished

    def publish(self, last: str) -> None:
        """Move the whole target to its place; `last` is the file without which it is no checkpoint."""
        if self._target.exists() and not self._whole:
            self._save(whole=True, durable=True)
            self._whole = True
        publish(self.files, self._target, last)
        self._remove()

    def discard(self) -> None:
        """Nothing of this work is worth going on with."""
        self.finished = {}
        self._whole = False

    def close(self, error: BaseException | None) -> None:
        """Let go of the directory; after an error, keep what can be gone on with and say so, and remove the rest."""
        try:
            if error is not None and not self.published:
                if self._whole or (self.finished and self._task is not None):
                    error.add_note(self._kept())
                else:
                    self._remove()
                    for path in self._made:
                        with contextlib.suppress(OSError):
                            path.rmdir()
        finally:
            self._unlock()

    def _kept(self) -> str:
        count = "All" if self._whole else f"{len(self.finished)} of {len(self._names)}"
        return (
            f"{count} files are finished and kept in {self.place}: run the same command with --resume (resume=True) "
            f"to go on from there, or delete that directory."
        )

    def _make(self) -> None:
        path = self.place.parent
        while not path.exists():
            self._made.append(path)
            path = path.parent
        self.place.mkdir(parents=True, exist_ok=True)

    def _locked(self) -> int | None:
        """Hold the directory until this process ends or lets go of it."""
        try:
            import fcntl
        except ImportError:  # Windows
            return None
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(descriptor).st_ino == self.place.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError:  # a file system without locks
            mine = True
        if mine:
            return descriptor
        os.close(descriptor)
        raise CheckpointError(
            f"{self._target} is being written by another process, in {self.place}. "
            f"Wait until it is done, or choose another target."
        )

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _manifest(self) -> dict[str, Any] | None:
        path = self.place / _MANIFEST
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError:
            manifest = None
        if not _is_manifest(manifest):
            raise CheckpointError(
                f"{self.place} holds unfinished work whose {_MANIFEST} can't be read. Delete that directory."
            )
        return cast("dict[str, Any]", manifest)

    def _take_over(self, manifest: dict[str, Any], *, resume: bool) -> None:
        """Go on with the work of an earlier run, whose finished files are checked."""
        finished: dict[str, tuple[int, str]] = {name: tuple(found) for name, found in manifest["finished"].items()}
        if not resume:
            raise CheckpointError(
                f"{self.place} holds unfinished work: an earlier run was interrupted when "
                f"{'all' if manifest['whole'] else len(finished)} of {len(manifest['names'])} files of {self._target} "
                f"were finished. Go on with it by --resume (resume=True), or delete that directory to start anew."
            )
        assert self._task is not None
        self._check_same(manifest["task"], self._task.to_dict())
        self._check_foreign(manifest)
        self._whole = manifest["whole"]
        if self._whole:
            self.finished = finished
            return
        for name, (size, digest) in finished.items():
            path = self.files / name
            if path.is_file() and path.stat().st_size == size and sha256(path) == digest:
                self.finished[name] = (size, digest)
        self._take_away(tuple(name for name in self._names if name not in self.finished), self.files)

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        reasons = {
            "source": "the source is another one, or was changed",
            "content": "the options ask for something else, or the configuration or a file beside the weights changed",
            "program": "it was begun by another version of this package",
        }
        if differences := [reason for key, reason in reasons.items() if before.get(key) != now[key]]:
            raise CheckpointError(
                f"The unfinished work in {self.place} can't be gone on with: {'; '.join(differences)}. "
                f"Delete that directory and run without --resume."
            )

    def _check_foreign(self, manifest: Mapping[str, Any]) -> None:
        """Nothing of somebody else's may lie where files are removed and moved."""
        known = {*self._names, *manifest.get("names", ())}
        files = (path.relative_to(self.files).as_posix() for path in self.files.rglob("*") if not path.is_dir())
        inside = [name for name in files if name not in known]
        outside = [path.name for path in self.place.iterdir() if path.name not in (_FILES, _MANIFEST, _NEW_MANIFEST)]
        if foreign := sorted((*inside, *outside)):
            raise CheckpointError(
                f"{self.place}, where {self._target} is prepared, holds files of somebody else: "
                f"{', '.join(foreign[:5])}. Move them away."
            )

    def _save(
        self, *, finished: Mapping[str, tuple[int, str]] | None = None, whole: bool = False, durable: bool = False
    ) -> None:
        """Write the note, such that there always is a whole one."""
        if self._task is None:
            return
        new = self.place / _NEW_MANIFEST
        content = {
            "task": self._task.to_dict(),
            "names": self._names,
            "finished": self.finished if finished is None else finished,
            "whole": whole,
        }
        new.write_bytes(json_bytes(content))
        if durable:
            sync(self.files)
            sync(new)
        new.replace(self.place / _MANIFEST)
        if durable:
            sync(self.place)

    def _remove(self) -> None:
        """Remove what this work has written, and the directory if nothing else is in it."""
        self._take_away(self._names, self.files)
        with contextlib.suppress(OSError):
            self.files.rmdir()
        self._take_away((_NEW_MANIFEST, _MANIFEST), self.place)
        with contextlib.suppress(OSError):
            self.place.rmdir()

    def _take_away(self, names: tuple[str, ...], directory: Path) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                (directory / name).unlink()
            with contextlib.suppress(OSError):
                for parent in list(Path(name).parents)[:-1]:
                    (directory / parent).rmdir()


@contextlib.contextmanager
def work_on(target: Path, names: tuple[str, ...], task: Task | None, *, resume: bool) -> Generator[Work]:
    """The place to write the files of a target in.

    After an error it is gone, unless there are finished files in it: then the error has a note that says where they
    are and what to do.

    Args:
        target: the directory to be.
        names: its files.
        task: what must be the same for a later run to go on; None for work that no other run goes on with.
        resume: whether to go on with the work of an earlier run.

    Raises:
        CheckpointError: if an earlier run has left work that is not to be gone on with, or can't be.
    """
    work = Work(target, names, task)
    work.open(resume=resume)
    error: BaseException | None = None
    try:
        yield work
    except BaseException as raised:
        error = raised
        raise
    finally:
        work.close(error)


def is_left_to_publish(target: Path) -> bool:
    """Whether an earlier run was interrupted while, or just after, it moved a whole target to its place."""
    target = resolved(target)
    place = place_beside(target)
    try:
        manifest = json.loads((place / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return _is_manifest(manifest) and (not (place / _FILES).exists() or manifest["whole"])


def _is_manifest(value: Any) -> bool:
    """Whether a JSON value is a note as `Work` writes it."""
    if not isinstance(value, dict):
        return False
    manifest = cast("dict[str, Any]", value)
    finished, names = manifest.get("finished"), manifest.get("names")
    if not (isinstance(finished, dict) and isinstance(names, list) and isinstance(manifest.get("task"), dict)):
        return False
    entries = cast("dict[str, list[Any]]", finished).values()
    pairs = all(isinstance(entry, list) and [type(part) for part in entry] == [int, str] for entry in entries)  # pyright: ignore[reportUnnecessaryIsInstance]
    return pairs and isinstance(manifest.get("whole"), bool)


@functools.cache
def _own_digest() -> str:
    """A digest of the modules that decide which bytes are written."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The digest of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
