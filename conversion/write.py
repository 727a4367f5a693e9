"""Carry out a plan: the files are written beside their target, and moved into place when they are whole."""

import contextlib
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

from conversion.formats import metaseq_file
from conversion.plan import FORMAT_MODULES, Plan, ReadParameter, Tensor, index_content
from conversion.target import check_disk, check_target, publish, sync
from conversion.tensors import Array
from opt_common.hub import METASEQ


def write_plan(
    directory: Path,
    plan: Plan,
    read: ReadParameter,
    documents: Mapping[str, bytes],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Carry out a plan, atomically as `save_checkpoint` says.

    Args:
        directory: where to.
        plan: what to write.
        read: gives each parameter; called as for `save_checkpoint`, in the order of the plan.
        documents: further files by name, or by their path below the directory.
        progress: called with the bytes of each tensor that has been written.
    """
    directory = directory.resolve()  # a link to a directory on another disk needs its staging there
    documents = dict(documents)
    if plan.index is not None:
        documents[plan.index] = index_content(plan)
    check_target(directory, plan.format, {*plan.files, *documents})
    check_disk(directory, plan, documents)
    with staged(directory, plan.key_file) as staging:
        for file, shard in zip(plan.files, plan.shards, strict=True):
            _write_shard(staging / file, plan, shard, read, progress or (lambda _: None))
        for name, content in documents.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)


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
