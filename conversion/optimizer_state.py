"""The file in which AdamW's state travels between the frameworks: safetensors, canonical names and layouts."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from conversion.dtypes import BY_NUMPY
from conversion.formats import safetensors_file
from conversion.tensors import Array, TensorInfo, TensorSpec
from conversion.write import staged
from opt_common.adamw import MOMENTS, AdamWState
from opt_common.errors import CheckpointError, join_problems
from opt_common.params import Parameter

OPTIMIZER_FILE = "optimizer.safetensors"

ReadMoment = Callable[[Parameter, str], Array]
"""Gives a moment of a parameter, in the canonical layout."""

WriteMoment = Callable[[Parameter, str, Array], None]
"""Takes a moment of a parameter, in the canonical layout."""


def save_optimizer_state(
    directory: str | os.PathLike[str], table: Sequence[Parameter], state: AdamWState, read: ReadMoment
) -> None:
    """Write `optimizer.safetensors`, beside a checkpoint or an adapter. It appears whole or not at all.

    Args:
        directory: where to; made if it does not exist.
        table: the parameters that train.
        state: what is not a moment.
        read: gives each moment.

    Raises:
        OSError: if the disk is full or not writable.
    """
    directory = Path(directory).resolve()
    keys = {f"{moment}.{parameter.name}": (parameter, moment) for parameter in table for moment in MOMENTS}
    specs = [TensorSpec(name=name, info=_info(read(*key))) for name, key in keys.items()]
    with staged(directory, OPTIMIZER_FILE) as place:
        safetensors_file.write(
            place / OPTIMIZER_FILE, specs, lambda name: read(*keys[name]), metadata=state.to_metadata()
        )


def load_optimizer_state(
    directory: str | os.PathLike[str], table: Sequence[Parameter], write: WriteMoment
) -> AdamWState:
    """Read `optimizer.safetensors`. Nothing is written to before all of the file has been checked.

    Args:
        directory: holds the file.
        table: the parameters that train.
        write: takes each moment.

    Raises:
        CheckpointError: if the file is absent or damaged, or naming each tensor that does not fit the table.
    """
    path = Path(directory) / OPTIMIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"There is no {path}. Name a directory that save_optimizer wrote to.")
    reader = safetensors_file.open_reader(path)
    try:
        state = AdamWState.from_metadata(reader.metadata, str(path))
        keys = {f"{moment}.{parameter.name}": (parameter, moment) for parameter in table for moment in MOMENTS}
        problems = [f"missing: {name}." for name in keys if name not in reader.tensors]
        problems += [f"unexpected: {name}." for name in reader.tensors if name not in keys]
        for name, info in reader.tensors.items():
            if name in keys and (info.shape != keys[name][0].shape or not BY_NUMPY[info.dtype].floating):
                problems.append(f"{name} is {list(info.shape)} of {info.dtype}, expected {list(keys[name][0].shape)}.")
        if problems:
            raise CheckpointError(f"{path} does not fit what trains in the model. {join_problems(problems)}")
        for name, key in keys.items():
            write(*key, reader.read(name))
        return state
    finally:
        reader.close()


def _info(array: Array) -> TensorInfo:
    return TensorInfo(array.dtype, array.shape)
