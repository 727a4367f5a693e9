"""Carry out a plan: the files are written beside their target, and moved into place when they are whole."""

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from conversion.formats import metaseq_file
from conversion.identity import Identity, changed, changed_meanwhile, check_unchanged
from conversion.plan import FORMAT_MODULES, Plan, ReadParameter, Tensor, index_content
from conversion.target import check_disk, check_target, publish, sync
from conversion.tensors import Array
from conversion.unfinished import Task, Work, place_beside, sha256, work_on
from opt_common.errors import CheckpointError
from opt_common.hub import METASEQ

_FLUSH_SECONDS = 0.25

Progress = Callable[[int], None]


def write_plan(
    directory: Path,
    plan: Plan,
    read: ReadParameter,
    documents: Mapping[str, bytes],
    progress: Progress = lambda _: None,
    *,
    source: Mapping[Path, Identity] | None = None,
    resume: bool = False,
) -> None:
    """Carry out a plan, atomically as `save_checkpoint` says.

    Args:
        directory: where to.
        plan: what to write.
        read: gives each parameter; called as for `save_checkpoint`, in the order of the plan.
        documents: further files by name, or by their path below the directory.
        progress: called with the bytes of each tensor that has been written, or needs not be.
        source: the files that `read` reads and what they were when they were opened. They must stay so, and what is
            finished can then be gone on with after an interruption; None for arrays in memory.
        resume: go on with the work of an earlier run with the same arguments, if there is any.

    Raises:
        CheckpointError: as `save_checkpoint`; if the source changes; or if an earlier run's work is in the way.
    """
    directory = directory.resolve()  # a link to a directory on another disk needs its staging there
    documents = dict(documents)
    if plan.index is not None:
        documents[plan.index] = index_content(plan)
    names = (*plan.files, *documents)
    check_target(directory, plan.format, set(names))
    task = None if source is None else Task.of(source, plan, documents)
    if not place_beside(directory).exists():  # else what lies there is to be named first: it takes room itself
        check_disk(directory, plan, documents)
    with work_on(directory, names, task, resume=resume) as work:
        if work.published:
            return
        if not work.whole:
            check_disk(directory, plan, documents, finished=work.finished_bytes)
            _write_files(work, plan, read, documents, progress, source or {})
        work.publish(plan.key_file)


def _write_files(
    work: Work,
    plan: Plan,
    read: ReadParameter,
    documents: Mapping[str, bytes],
    progress: Progress,
    source: Mapping[Path, Identity],
) -> None:
    """Write every file that is not finished, and wait until all are on the disk."""
    try:
        with _Finisher(work, source) as finisher:
            for file, shard in zip(plan.files, plan.shards, strict=True):
                if file in work.finished:
                    progress(sum(tensor.stored_bytes for tensor in shard))
                    continue
                with finisher.following(file, noted=file != plan.files[-1]):
                    _write_shard(work.files / file, plan, shard, read, progress)
            for name, content in documents.items():
                (work.files / name).parent.mkdir(parents=True, exist_ok=True)
                (work.files / name).write_bytes(content)
                sync(work.files / name)
        check_unchanged(source)
        for path in (work.files, *(path for path in work.files.rglob("*") if path.is_dir())):
            sync(path)
    except CheckpointError as error:
        work.discard()  # another run would come to the same end
        if paths := changed(source):
            raise CheckpointError(changed_meanwhile(paths)) from error
        raise


class _Finisher:
    """Brings files to the disk while others are written, and notes those that are finished."""

    def __init__(self, work: Work, source: Mapping[Path, Identity]) -> None:
        self._work, self._source = work, source
        self._pool = ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []

    def __enter__(self) -> "_Finisher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._check()

    @contextlib.contextmanager
    def following(self, name: str, *, noted: bool) -> Generator[None]:
        """While a file is written, bring what there is of it to the disk; finish it in the background afterwards.

        Args:
            name: the file.
            noted: whether to take its digest and note it as finished. The last one needs no note: nothing is left to
                be interrupted but the move of all of them to their place.
        """
        self._check()
        flusher = _Flusher(self._work.files / name)
        try:
            yield
        except BaseException:
            flusher.stop()
            raise
        self._pending.append(self._pool.submit(self._finish, flusher, name, noted))

    def _finish(self, flusher: "_Flusher", name: str, noted: bool) -> None:
        flusher.finish()
        if noted:
            digest = sha256(self._work.files / name)
            check_unchanged(self._source)
            self._work.note(name, digest)

    def _check(self) -> None:
        """Raise what went wrong in the background."""
        for pending in self._pending:
            if pending.done():
                pending.result()


class _Flusher:
    """Brings what there is of a file to the disk from time to time, so that disk and processor work together."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._descriptor: int | None = None
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all of the file is on the disk.

        Raises:
            OSError: if it does not get there.
        """
        self.stop(close=False)
        try:
            self._flush()
            # What the system reports to one descriptor it does not report to the next.
            if self._error is not None:
                raise self._error
        finally:
            self._close()

    def stop(self, *, close: bool = True) -> None:
        """Flush no more."""
        self._stop.set()
        self._thread.join()
        if close:
            self._close()

    def _run(self) -> None:
        while not self._stop.wait(_FLUSH_SECONDS):
            try:
                self._flush()
            except FileNotFoundError:
                continue
            except OSError as error:
                self._error = error
                return

    def _flush(self) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDWR)
        os.fsync(self._descriptor)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_shard(
    path: Path, plan: Plan, shard: Sequence[Tensor], read: ReadParameter, progress: Callable[[int], None]
) -> None:
    tensors = {tensor.spec.name: tensor for tensor in shard}

    def read_native(name: str) -> Array:
        array = tensors[name].build(read)
        progress(tensors[name].stored_bytes)
        return array

    specs = [tensor.spec for tensor in shard]
    if plan.format == METASEQ:
        metaseq_file.write(path, specs, read_native, plan.arguments)
    else:
        FORMAT_MODULES[plan.format].write(path, specs, read_native)


@contextlib.contextmanager
def staged(directory: Path, key_file: str) -> Generator[Path]:
    """A new directory beside the target. What is in it at the end of the `with` statement is moved into the target.

    Args:
        directory: the target, resolved.
        key_file: the file without which none of the others is taken for something whole.
    """
    staging = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.part"
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in staging.iterdir():
            sync(path)
        sync(staging)
        publish(staging, directory, key_file)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
