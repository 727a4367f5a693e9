"""The pickles inside PyTorch's files, read and written without PyTorch and without Python's unpickler.

`load` is a machine for the few opcodes that a state dict is made of. It imports nothing and calls nothing: a global
is a name that is either in `_KNOWN` or refused, and calling a known one builds a plain value here. Python's own
`pickle.Unpickler` is no base for this: even with `find_class` overridden, hostile opcodes make it allocate memory or
set attributes.
"""

import dataclasses
import io
import mmap
import pickletools
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from conversion.dtypes import BY_TORCH_STORAGE, DType
from conversion.tensors import TensorInfo, are_lengths, is_length, is_shape


class RefusedError(Exception):
    """A pickle that holds something else than tensors in plain containers; the text says what."""


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names. Nothing but its name: it can't be called."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The flat array of numbers that tensors look into.

    Attributes:
        key: its name in the file.
        dtype: type of its elements.
        size: number of its elements.
    """

    key: str
    dtype: DType
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a strided view of a storage; offset and strides count elements, and lie inside the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        """Dtype and shape."""
        return TensorInfo(self.storage.dtype.numpy, self.shape)


@dataclasses.dataclass(eq=False, slots=True)
class Inert:
    """What is left of an object of a foreign class: the class's name and plain values. Nothing of it was executed.

    Attributes:
        kind: its class, or the function that would have made it.
        state: its attributes, as the pickle would have set them; None if it sets none.
        items: its items, where it is a kind of dict.
    """

    kind: Global
    state: Any = None
    items: dict[Any, Any] = dataclasses.field(default_factory=dict[Any, Any])


def load(pickle: bytes | mmap.mmap, *, inert: bool = False) -> Any:
    """Read one pickle, from the current position where `pickle` is a mapped file.

    Args:
        pickle: its bytes.
        inert: whether to keep objects of the classes that training programs pickle beside their tensors (arguments,
            mostly) as `Inert`, instead of refusing them. The caller must see to it that no tensor is made of one.

    Returns:
        Numbers, strings, tuples, lists and dicts, with a `StoredTensor` for each tensor.

    Raises:
        RefusedError: for anything else in the pickle, and for bytes that are no pickle.
    """
    machine = _Machine(inert=inert)
    source: Any = _Source(io.BytesIO(pickle) if isinstance(pickle, bytes) else pickle)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of odd escapes in texts of protocol 0
            for opcode, argument, _ in pickletools.genops(source):
                machine.step(opcode.name, argument)
        return machine.result()
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error, RecursionError) as error:
        raise RefusedError(f"not a well-formed pickle ({error})") from None


_MAX_STEPS = 500_000
"""A step of one byte can make an object of a hundred; a state dict takes some thirty steps for each of its tensors, and
the largest OPT has fifteen hundred."""

_MAX_BYTES = 8_000_000
"""A text can take four times its bytes; the state dict of the largest OPT takes half a megabyte."""


class _Source:
    """The bytes of a pickle, of which no more are taken than any state dict has."""

    def __init__(self, stream: io.BytesIO | mmap.mmap) -> None:
        self._stream = stream
        self._left = _MAX_BYTES
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        data = self._stream.read(min(size, self._left + 1))
        self._count(len(data))
        return data

    def readline(self) -> bytes:
        """The bytes up to the end of the line."""
        start = self.tell()
        data = self._stream.read(_LONGEST_LINE)
        line = data[: data.find(b"\n") + 1]
        self._stream.seek(start + len(line))
        self._count(len(line))
        return line

    def _count(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise RefusedError(f"the pickle has more than {_MAX_BYTES} bytes, far more than a state dict needs")


_LONGEST_LINE = 10_000  # a line is a number or the name of a class

_MARK = object()


class _Machine:
    """Stack and memo of a pickle that is being read. Python's own errors stand for a pickle that is malformed."""

    def __init__(self, *, inert: bool) -> None:
        self._inert = inert
        self._left = _MAX_STEPS
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        (value,) = self._stack
        return value

    def step(self, opcode: str, argument: Any) -> None:
        """Carry out one opcode."""
        self.spend(1)
        if opcode in _PUSH_ARGUMENT:
            self._stack.append(argument)
        elif opcode in _PUSH_CONSTANT:
            self._stack.append(_PUSH_CONSTANT[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[int(argument)] = self.top()
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self.top()
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            self._stack.append(self._memo[int(argument)])
        elif opcode in _STEPS:
            _STEPS[opcode](self)
        elif self._inert and opcode in _INERT_STEPS:
            _INERT_STEPS[opcode](self)
        elif opcode == "GLOBAL":
            module, _, name = argument.partition(" ")
            self.push_global(Global(module, name))
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise RefusedError(f"the pickle uses {opcode}, which no state dict needs")

    def spend(self, steps: int) -> None:
        """Count steps, of which a pickle may take so many."""
        self._left -= steps
        if self._left < 0:
            raise RefusedError(f"the pickle has more than {_MAX_STEPS} steps, far more than a state dict needs")

    def top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark where a value is expected")
        return self._stack[-1]

    def pop(self) -> Any:
        value = self.top()
        del self._stack[-1]
        return value

    def pop_to_mark(self) -> list[Any]:
        start = len(self._stack) - 1
        while self._stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("a mark is missing")
        values = self._stack[start + 1 :]
        del self._stack[start:]
        return values

    def push_dict(self) -> None:
        self._stack.append({})

    def push_list(self) -> None:
        self._stack.append([])

    def push_tuple(self) -> None:
        self._stack.append(tuple(self.pop_to_mark()))

    def push_short_tuple(self, length: int) -> None:
        self._stack.append(tuple(reversed([self.pop() for _ in range(length)])))

    def append(self) -> None:
        value = self.pop()
        self.top_list().append(value)

    def appends(self) -> None:
        values = self.pop_to_mark()
        self.top_list().extend(values)

    def top_list(self) -> list[Any]:
        if isinstance(self.top(), Inert):
            return []  # the items of a foreign kind of list are of no use to anyone here
        if not isinstance(self.top(), list):
            raise TypeError("an item for something that is no list")
        return self._stack[-1]

    def set_item(self) -> None:
        value = self.pop()
        key = self.pop()
        self.fill_top([key, value])

    def set_items(self) -> None:
        self.fill_top(self.pop_to_mark())

    def fill_top(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("an item for something that is no dict")
        pairs = zip(items[::2], items[1::2], strict=True)
        _fill(cast("dict[Any, Any]", target), _usable(pairs) if self._inert else pairs)

    def push_stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a global whose name is no string")
        self.push_global(Global(module, name))

    def push_global(self, name: Global) -> None:
        self._stack.append(name if self._inert and _is_foreign(name) else _known(name))

    def push_storage(self) -> None:
        self._stack.append(_storage(self.pop()))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise RefusedError("the pickle calls something that is no known function")
        # A dict made of a list that is still there takes memory again, each time.
        given = cast("tuple[Any, ...]", arguments)
        self.spend(sum(len(cast("list[Any]", value)) for value in given if isinstance(value, list | tuple)))
        foreign = self._inert and _is_foreign(function)
        self._stack.append(Inert(function) if foreign else _call(function, cast("tuple[Any, ...]", arguments)))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        # A state dict carries the versions of its modules as an attribute; nobody needs them.
        elif not isinstance(target, dict):
            raise RefusedError("the pickle sets the attributes of an object")

    def push_inert(self, arguments: int) -> None:
        """An object of a class, in place of calling the class with what lies above it on the stack."""
        for _ in range(arguments):
            self.pop()
        kind = self.pop()
        if not isinstance(kind, Global) or not _is_foreign(kind):
            raise RefusedError("the pickle makes an object of something that is no known class")
        self._stack.append(Inert(kind))


_PUSH_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_PUSH_CONSTANT: dict[str, Any] = {"MARK": _MARK, "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_STEPS: dict[str, Callable[[_Machine], None]] = {
    "EMPTY_DICT": _Machine.push_dict,
    "EMPTY_LIST": _Machine.push_list,
    "TUPLE": _Machine.push_tuple,
    "TUPLE1": lambda machine: machine.push_short_tuple(1),
    "TUPLE2": lambda machine: machine.push_short_tuple(2),
    "TUPLE3": lambda machine: machine.push_short_tuple(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "STACK_GLOBAL": _Machine.push_stack_global,
    "BINPERSID": _Machine.push_storage,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}

_INERT_STEPS: dict[str, Callable[[_Machine], None]] = {
    "NEWOBJ": lambda machine: machine.push_inert(1),
    "NEWOBJ_EX": lambda machine: machine.push_inert(2),
    "EMPTY_SET": _Machine.push_list,
    "ADDITEMS": _Machine.appends,
    "FROZENSET": _Machine.push_tuple,
}
"""Opcodes of foreign objects; a set becomes a list."""


# What a pickle may name and call


def _known(name: Global) -> Global:
    if name not in _KNOWN and name.module + "." + name.name not in _STORAGE_CLASSES:
        raise RefusedError(
            f"the pickle wants {name.module}.{name.name}, which is no part of a state dict; nothing was executed"
        )
    return name


def _is_foreign(name: Global) -> bool:
    """Whether a global may be kept as a name that stands for nothing."""
    if name in _KNOWN or name.module + "." + name.name in _STORAGE_CLASSES:
        return False
    if name.module in ("builtins", "__builtin__"):
        return name.name in _FOREIGN_BUILTINS
    return name.module.partition(".")[0] in _FOREIGN_PACKAGES


def _call(function: Global, arguments: tuple[Any, ...]) -> Any:
    if function not in _KNOWN:
        raise RefusedError(f"the pickle calls {function.module}.{function.name}")
    return _KNOWN[function](*arguments)


def _storage(identifier: Any) -> Storage:
    """The storage that a persistent id of `torch.save` stands for."""
    # ("storage", class, key, device, elements), in the old container with a sixth: a view into another storage.
    if not isinstance(identifier, tuple) or len(cast("tuple[Any, ...]", identifier)) not in (5, 6):
        raise RefusedError("a storage is not described as torch.save describes one")
    kind, storage_class, key, _, size, *rest = cast("tuple[Any, ...]", identifier)
    if kind != "storage" or not isinstance(storage_class, Global) or not isinstance(key, str) or not is_length(size):
        raise RefusedError("a storage is not described as torch.save describes one")
    if rest not in ([], [None]):
        raise RefusedError(f"storage {key!r} is a view of another one; save the state dict with a newer PyTorch")
    row = _STORAGE_CLASSES.get(storage_class.module + "." + storage_class.name)
    if row is None:
        raise RefusedError(f"storage {key!r} is of class {storage_class.name}, which holds no plain numbers")
    return Storage(key, row, size)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """A strided view of a storage, checked to lie inside it. Further arguments concern gradients only."""
    if not isinstance(storage, Storage) or not is_length(offset) or not is_shape(shape) or not are_lengths(strides):
        raise RefusedError("a tensor is not described by a storage, an offset, a shape and strides")
    if len(shape) != len(strides):
        raise RefusedError(f"a tensor has shape {shape} but strides {strides}")
    tensor = StoredTensor(storage, offset, tuple(shape), tuple(strides))
    size = tensor.info.size
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    # The second condition keeps strides of zero from blowing a few bytes up to terabytes.
    if size and (last >= storage.size or size > storage.size - offset):
        raise RefusedError(
            f"a tensor of shape {list(shape)} does not lie in its storage {storage.key!r} of {storage.size} elements"
        )
    return tensor


def _rebuild_parameter(tensor: Any, *_: Any) -> StoredTensor:
    """A parameter is its tensor; the other arguments concern gradients only."""
    if not isinstance(tensor, StoredTensor):
        raise RefusedError("a parameter is made of something that is no tensor")
    return tensor


def _ordered_dict(items: Any = ()) -> dict[str, Any]:
    result: dict[Any, Any] = {}
    if not isinstance(items, list | tuple):
        raise TypeError("an OrderedDict of something that is no list")
    _fill(result, cast("list[Any]", items))
    return result


def _fill(target: dict[Any, Any], items: Iterable[Any]) -> None:
    for key, value in items:
        # Hashing a tuple that is nested a million deep would end the process.
        if not isinstance(key, str | int):
            raise RefusedError(f"a dict has a key of type {type(key).__name__}")
        if key in target:
            raise RefusedError(f"the key {key!r} occurs twice in a dict")
        target[key] = value


def _usable(items: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, Any]]:
    """The items of a foreign dict without those of unusual keys, which no tensor and no argument has."""
    for key, value in items:
        if isinstance(key, str | int):
            yield key, value
        elif isinstance(value, StoredTensor):
            raise RefusedError(f"a tensor has a name of type {type(key).__name__}")


def _size(shape: Any = ()) -> tuple[int, ...]:
    if not is_shape(shape):
        raise RefusedError("a torch.Size holds something else than lengths")
    return tuple(shape)


_ORDERED_DICT = Global("collections", "OrderedDict")
_REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")

_KNOWN: Mapping[Global, Callable[..., Any]] = {
    _ORDERED_DICT: _ordered_dict,
    _REBUILD_TENSOR: _rebuild_tensor,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Global("torch", "Size"): _size,
}
_STORAGE_CLASSES = {f"torch.{name}": row for name, row in BY_TORCH_STORAGE.items()}

_FOREIGN_PACKAGES = frozenset(
    "argparse omegaconf metaseq fairseq fairscale megatron typing enum collections pathlib copyreg copy_reg "
    "numpy _codecs torch".split()
)
"""Where the classes come from that metaseq pickles beside its tensors. Their names are kept, never looked up."""

_FOREIGN_BUILTINS = frozenset(
    "object dict list tuple set frozenset str unicode int long float bool bytes bytearray complex slice range".split()
)


# Writing


def dump(value: Any) -> bytes:
    """The pickle of a state dict, or of plain values around one, in protocol 2 and without the memo.

    A plain dict of tensors gives what `torch.save` writes for it.

    Args:
        value: dicts with names as keys, lists, texts, numbers, truth values, None and `StoredTensor`.
    """
    return b"\x80\x02" + _value(value) + b"."


def _value(value: Any) -> bytes:
    if isinstance(value, StoredTensor):
        return _tensor(value)
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return b"}(" + b"".join(_text(key) + _value(item) for key, item in items) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_value, cast("list[Any]", value))) + b"e"
    if isinstance(value, str):
        return _text(value)
    return _number(value)


def _number(value: float | None) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    assert value >= 0, value
    return _integer(value)


def _tensor(tensor: StoredTensor) -> bytes:
    row = tensor.storage.dtype
    assert row.torch_storage is not None, row.name
    parts = [
        _global(_REBUILD_TENSOR),
        b"((",
        _text("storage") + _global(Global("torch", row.torch_storage)),
        _text(tensor.storage.key) + _text("cpu") + _integer(tensor.storage.size) + b"tQ",
        _integer(tensor.offset) + _integers(tensor.shape) + _integers(tensor.strides),
        b"\x89" + _global(_ORDERED_DICT) + b")RtR",
    ]
    return b"".join(parts)


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _global(name: Global) -> bytes:
    return f"c{name.module}\n{name.name}\n".encode()


def _integer(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + number.to_bytes(4, "little")
    return b"\x8a\x08" + number.to_bytes(8, "little")


def _integers(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"
