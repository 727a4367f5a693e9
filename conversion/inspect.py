"""What is in a checkpoint, without reading a tensor."""

import dataclasses
import os
import re
from collections import Counter
from typing import Any

from conversion.checkpoint import checked_parameters, open_checkpoint
from conversion.convert import locate
from opt_common.errors import CheckpointError
from opt_common.params import ARCHITECTURES, parameter_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor: canonical name, the file's name for it, dtype and canonical shape."""

    name: str
    native_name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """Result of `inspect`.

    Attributes:
        source: what was looked at.
        format: the format of its weights.
        files: the weight files.
        architecture: the class of the model, as PyTorch's is called.
        config: contents of `config.json`, defaults filled in.
        parameters: number of elements of all tensors; a quantised matrix counts as the matrix, without its scales.
        total_bytes: bytes of all tensors.
        dtypes: number of tensors of each dtype.
        tensors: every tensor, in the order of the files.
        problem: why the tensors do not fit the configuration, or None.
    """

    source: str
    format: str
    files: tuple[str, ...]
    architecture: str
    config: dict[str, Any]
    parameters: int
    total_bytes: int
    dtypes: dict[str, int]
    tensors: tuple[TensorEntry, ...]
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return dataclasses.asdict(self)

    def grouped(self) -> list[tuple[str, TensorEntry, int]]:
        """The tensors with those that only differ in the number of their layer put together: name, first, count."""
        groups: dict[tuple[str, str, tuple[int, ...]], list[TensorEntry]] = {}
        for tensor in self.tensors:
            pattern = re.sub(r"\.layers\.\d+\.", ".layers.*.", tensor.name)
            groups.setdefault((pattern, tensor.dtype, tensor.shape), []).append(tensor)
        return [(pattern, members[0], len(members)) for (pattern, _, _), members in groups.items()]


def inspect(src: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None, **hub: Any) -> Inspection:
    """Describe a checkpoint.

    Args:
        src: a directory, a weight file, or a hub id.
        config: a configuration file to use in place of the one beside the weights.
        **hub: arguments of `opt_common.hub.resolve`.

    Raises:
        ConfigError: if the configuration can't be read.
        CheckpointError: if a file can't be read. Tensors that do not fit the configuration are told in the result.
    """
    with open_checkpoint(locate(src, config=config, **hub), config=config) as checkpoint:
        stored = checkpoint.stored_tensors()
        problem = None
        try:
            table = parameter_table(checkpoint.config, head=checkpoint.head)
            checked_parameters(checkpoint, table, other_heads=False)
        except CheckpointError as error:
            problem = str(error)
        return Inspection(
            source=os.fspath(src),
            format=checkpoint.format,
            files=tuple(str(path) for path in checkpoint.files),
            architecture=ARCHITECTURES[checkpoint.head],
            config=checkpoint.config.to_dict(),
            parameters=sum(checkpoint.info(name).size for name in checkpoint.names),
            total_bytes=sum(tensor.info.nbytes for tensor in stored),
            dtypes=dict(Counter(tensor.info.dtype.name for tensor in stored)),
            tensors=tuple(
                TensorEntry(
                    name=tensor.name,
                    native_name=tensor.native_name,
                    dtype=tensor.info.dtype.name,
                    shape=tensor.info.shape,
                )
                for tensor in stored
            ),
            problem=problem,
        )
