"""A step's operations on a CPU, in their order, with the memory that they read and write: to be run again.

Python takes longer over a token's small operations than the library takes over its matrices, if they are of few bits.
Of a tape, those that the library knows are run by one call, and Python is left with a handful of others.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opt_common.native import Operation, Task, library
from opt_torch import native

aten = torch.ops.aten

NEW = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default)
"""What gives memory without numbers."""


class NotRecordedError(Exception):
    """A step can't be run again as it was: it waits for a number, and goes on as that says."""


class Entry(NamedTuple):
    """One operation of a tape.

    Attributes:
        reads: where what it reads is kept.
        writes: where what it writes is kept.
        is_fixed: whether it gives the same each time.
        operation: what the library is to compute, or None.
        call: what Python calls, if so.
    """

    reads: set[int]
    writes: set[int]
    is_fixed: bool
    operation: Operation | None
    call: Callable[[], None]


class Tape(TorchDispatchMode):
    """Records the operations of a `with` statement.

    The memory of whatever they read or write is kept as long as the tape is, whoever else gives it up.
    """

    def __init__(self, fixed: Iterable[Tensor] = ()) -> None:
        """A tape with nothing on it.

        Args:
            fixed: inputs that have the same numbers whenever the tape is run.
        """
        super().__init__()
        self.entries: list[Entry] = []
        self.memory: dict[int, torch.UntypedStorage] = {}
        self.fixed = self.places(fixed)
        self.changed: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else PyTorch imports its compiler to say that this is not to be compiled, which takes a second.
        return False

    def __enter__(self) -> "Tape":
        native.recording.tape = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        native.recording.tape = None
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            raise NotRecordedError
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if not all(each is None or isinstance(each, Tensor) for each in tree_leaves(outputs)):
            raise NotRecordedError
        schema = func._schema
        given = [
            *zip(schema.arguments, args, strict=False),
            *((each, kwargs.get(each.name)) for each in schema.arguments),
        ]
        changed = self.places(
            tree_leaves([value for argument, value in given if argument.alias_info and argument.alias_info.is_write])
        )
        reads, gives = self.places(tree_leaves((args, kwargs))), self.places(tree_leaves(outputs))
        if func in NEW or (not changed and gives <= reads):
            return outputs  # memory without numbers, or a part of what is there

        def call() -> None:
            found = func(*args, **kwargs)
            if not changed:
                for old, new in zip(tree_leaves(outputs), tree_leaves(found), strict=True):
                    if old is not None:
                        old.copy_(new)

        is_random = torch.Tag.nondeterministic_seeded in func.tags
        operation = None if kwargs else lowered(func, args, outputs)
        self.add(reads, changed or gives, call, operation, changed=changed, is_random=is_random)
        return outputs

    def places(self, values: Iterable[Any]) -> set[int]:
        """Where tensors are kept, for which they are kept from now on. Those that hide it are kept by who calls."""
        found: set[int] = set()
        for value in values:
            if isinstance(value, Tensor) and value.layout is torch.strided:
                storage = value.untyped_storage()
                self.memory[storage.data_ptr()] = storage
                found.add(storage.data_ptr())
        return found

    def add(
        self,
        reads: set[int],
        writes: set[int],
        call: Callable[[], None],
        operation: Operation | None = None,
        *,
        changed: Set[int] = frozenset(),
        is_random: bool = False,
    ) -> None:
        """Put one operation on the tape, which has been computed; `changed` is what it reads and writes."""
        is_fixed = not changed and not is_random and reads <= self.fixed
        self.fixed = self.fixed | writes if is_fixed else self.fixed - writes
        self.changed |= changed
        self.entries.append(Entry(reads, writes, is_fixed, operation, call))

    def add_operation(
        self,
        operation: Operation,
        reads: Iterable[Tensor | None],
        writes: Iterable[Tensor],
        changed: Iterable[Tensor] = (),
    ) -> None:
        """Put on the tape what the library has computed."""
        changed_places = self.places(changed)
        self.add(
            self.places(reads) | changed_places,
            self.places(writes) | changed_places,
            runner([operation]),
            operation,
            changed=changed_places,
        )

    def replay(self, results: Iterable[Tensor]) -> Callable[[], None]:
        """A function that computes anew what some tensors hold: all that they depend on, unless it is fixed."""
        needed = self.places(results)
        entries: list[Entry] = []
        for entry in reversed(self.entries):
            # What is changed afterwards has to be made anew, too.
            if entry.writes & needed and not (entry.is_fixed and not entry.writes & self.changed):
                needed |= entry.reads
                entries.insert(0, entry)
        parts: list[Callable[[], None]] = []
        run: list[Operation] = []
        for entry in entries:
            if entry.operation is not None:
                run.append(entry.operation)
                continue
            if run:
                parts.append(runner(run))
            parts.append(entry.call)
            run = []
        if run:
            parts.append(runner(run))
        return functools.partial(run_parts, parts, self.memory)


def run_parts(parts: Iterable[Callable[[], None]], memory: Mapping[int, torch.UntypedStorage]) -> None:
    """Run the parts of a tape, whose memory is kept as long as what calls this is."""
    del memory
    for part in parts:
        part()


def runner(operations: Sequence[Operation]) -> Callable[[], None]:
    """A function by which the library computes some operations."""
    loaded = library()
    assert loaded is not None
    array = (Operation * len(operations))(*operations)

    def run() -> None:
        if loaded.opt_run(torch.get_num_threads(), native.TEAM, array, len(array)) != 0:
            raise MemoryError(f"A step of {len(array)} operations found no memory.")

    return run


def lowered(func: Any, args: Sequence[Any], outputs: Any) -> Operation | None:
    """The operation of the library's that computes the same, if there is one for such tensors."""
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    if library() is None or func not in LOWERED or not isinstance(output, Tensor) or output.dtype not in native.EITHER:
        return None
    tensors = [each for each in args if isinstance(each, Tensor)]
    suits = output.is_contiguous() and all(each.dtype is output.dtype and each.device.type == "cpu" for each in tensors)
    return LOWERED[func](output, *args) if suits else None


def lowered_norm(
    output: Tensor, inputs: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> Operation | None:
    """`native_layer_norm`."""
    if len(shape) != 1 or not all(each is None or each.is_contiguous() for each in (inputs, weight, bias)):
        return None
    sizes = (output.numel() // shape[0], shape[0])
    return native.operation(Task.LAYER_NORM, output.dtype, *sizes, inputs, weight, bias, output, number=epsilon)


def lowered_sum(output: Tensor, left: Tensor, right: Any) -> Operation | None:
    """`add`, of two alike."""
    if (
        not isinstance(right, Tensor)
        or left.shape != right.shape
        or not (left.is_contiguous() and right.is_contiguous())
    ):
        return None
    return native.operation(Task.ADD, output.dtype, output.numel(), left, right, output)


def lowered_scaling(output: Tensor, inputs: Tensor, factor: Any) -> Operation | None:
    """`mul` of a number and of inputs (B, 1, D), which may be parts of longer rows."""
    if isinstance(factor, Tensor) or inputs.dim() != 3 or inputs.shape[1] != 1 or inputs.stride(2) != 1:
        return None
    B, _, D = inputs.shape
    return native.operation(Task.SCALE, output.dtype, B, D, inputs, inputs.stride(0), output, number=factor)


def lowered_relu(output: Tensor, inputs: Tensor) -> Operation | None:
    """`relu`."""
    return native.operation(Task.RELU, output.dtype, output.numel(), inputs, output) if inputs.is_contiguous() else None


LOWERED: dict[Any, Callable[..., Operation | None]] = {
    aten.native_layer_norm.default: lowered_norm,
    aten.add.Tensor: lowered_sum,
    aten.mul.Tensor: lowered_scaling,
    aten.relu.default: lowered_relu,
}
"""What the library computes besides products and attention, by PyTorch's name."""
