"""The variables in a file of Keras 3's weights: an HDF5 file whose groups are layers, without names for variables.

A layer is a group at the path of its attributes; its variables are `vars/0`, `vars/1`, … in the order in which it made
them. The members of a list are called after their class and numbered, `transformer_decoder_3`. Newer releases note the
layer's own name beside them. Which path means which tensor is for the callers to know.
"""

import dataclasses
import mmap
from collections.abc import Iterator
from pathlib import Path

from conversion.formats.hdf5_structure import DamagedError, Dataset, File, Object
from conversion.tensors import Array, TensorInfo, damaged, view

DROPPED_GROUPS = {
    "optimizer": "the optimizer's state; not a weight",
    "seed_generator": "the state of a random generator; not a weight",
    "metrics": "running sums of metrics; not weights",
}
"""Groups that are left out on purpose, by name, and why."""

_VARIABLES = "vars"
_MAX_DEPTH = 32


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer on the way to a variable: its group's name, and the layer's own name where it is noted."""

    group: str
    name: str | None

    @property
    def number(self) -> int:
        """The place of a member in its list: 0 for "decoder_layer", 3 for "decoder_layer_3"."""
        _, _, number = self.group.rpartition("_")
        return int(number) if number.isdecimal() and number.isascii() else 0


@dataclasses.dataclass(frozen=True)
class Variable:
    """One variable: the layers around it, its number in the innermost one, and where its numbers lie."""

    steps: tuple[Step, ...]
    number: int
    dataset: Dataset

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.dataset.dtype.numpy, self.dataset.shape)


class KerasVariables:
    """The variables of a mapped HDF5 file."""

    def __init__(self, path: Path, buffer: mmap.mmap | memoryview) -> None:
        """Find them.

        Args:
            path: the file, for messages.
            buffer: the HDF5 file, which may be a part of `path`.

        Raises:
            CheckpointError: for anything that Keras does not write; see `hdf5_structure`.
        """
        self._buffer = buffer
        try:
            self.variables = tuple(self._walk(File(buffer).root, (), set()))
        except DamagedError as error:
            raise damaged(path, str(error)) from None

    def read(self, variable: Variable) -> Array:
        """The numbers of a variable: read-only, a view of the mapped file where possible."""
        return view(self._buffer, variable.dataset.start, variable.info)

    def close(self) -> None:
        """Let go of the file. The map itself goes when the last array that looks into it does."""
        del self._buffer

    def _walk(self, where: Object, steps: tuple[Step, ...], seen: set[int]) -> Iterator[Variable]:
        if len(steps) > _MAX_DEPTH:
            raise DamagedError(f"its groups are nested more than {_MAX_DEPTH} deep")
        for name, address in where.children.items():
            # A group that is reached twice could be one of those around it.
            if address in seen:
                raise DamagedError(f"the group {name!r} lies in two places")
            seen.add(address)
            child = where.child(name)
            assert child is not None
            if name == _VARIABLES:
                yield from self._variables(child, steps, seen)
            elif name not in DROPPED_GROUPS:
                yield from self._walk(child, (*steps, Step(name, _own_name(child))), seen)

    def _variables(self, group: Object, steps: tuple[Step, ...], seen: set[int]) -> Iterator[Variable]:
        for name, address in group.children.items():
            if address in seen or not (name.isdecimal() and name.isascii()):
                raise DamagedError(f"the variable {name!r} lies in two places, or has no number for a name")
            seen.add(address)
            child = group.child(name)
            assert child is not None
            yield Variable(steps, int(name), child.dataset())


def _own_name(layer: Object) -> str | None:
    """The name that a layer notes beside its variables."""
    variables = layer.child(_VARIABLES) if layer.is_group else None
    name = variables.attributes.get("name") if variables is not None and variables.is_group else None
    return name if isinstance(name, str) else None
