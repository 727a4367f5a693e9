"""What a tokenizer returns, and the steps between rows of ids and tensors: lengths, truncation, padding, frameworks."""

import dataclasses
import importlib
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, cast, runtime_checkable

import numpy as np

from opt_common.errors import MissingFrameworkError, TokenizerError

SIDES = ("left", "right")
"""Values of `padding_side` and `truncation_side`."""

TRUNCATION = {
    None: None,
    False: None,
    "do_not_truncate": None,
    True: "longest_first",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
}
PADDING = {False: None, "do_not_pad": None, True: "longest", "longest": "longest", "max_length": "max_length"}


@runtime_checkable
class _HasToList(Protocol):
    """A NumPy, torch or JAX array."""

    def tolist(self) -> Any: ...


class BatchEncoding(dict[str, Any]):
    """Token ids and what goes with them: a dict whose entries are attributes too, ready for `model(**encoding)`.

    Entries: `input_ids`; `attention_mask`, 1 at tokens and 0 at padding; `special_tokens_mask`, 1 at padding and at
    the tokens that the tokenizer put in, 0 elsewhere. Each is a list of ints for one text, a list of such lists for a
    list of texts, or with `return_tensors` an array (B, T).
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"This encoding has no {name!r}, only {', '.join(self)}.") from None

    def to(self, device: Any, *, non_blocking: bool = False) -> Self:
        """Move the torch tensors to a device, in place, and return this encoding.

        Raises:
            TokenizerError: if an entry is no torch tensor.
        """
        torch: Any = sys.modules.get("torch")
        for name, value in self.items():
            if torch is None or not isinstance(value, torch.Tensor):
                kind = type(value).__name__
                raise TokenizerError(f"to: {name} is a {kind}, not a torch tensor. Encode with return_tensors='pt'.")
            self[name] = value.to(device, non_blocking=non_blocking)
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How long the rows of a batch become, checked once for a call."""

    truncation: str | None
    padding: str | None
    max_length: int | None
    multiple: int
    padding_side: str
    truncation_side: str


@dataclasses.dataclass(frozen=True)
class Row:
    """The ids of one text or pair, and 1 where the tokenizer put a token in."""

    ids: list[int]
    special: list[int]


# Arguments


def option(name: str, value: object, meanings: Mapping[Any, str | None]) -> str | None:
    """What a value of `padding` or `truncation` means. True and "1" differ, though a dict of bools takes 1 for True."""
    if isinstance(value, bool | str | None) and value in meanings:
        return meanings[value]
    raise TokenizerError(f"{name} is {value!r}, expected one of {', '.join(map(repr, meanings))}.")


def as_texts(text: object, name: str) -> tuple[list[str], bool]:
    """A list of texts, and whether one text was given instead of a list."""
    if isinstance(text, str):
        return [text], True
    if isinstance(text, list | tuple):
        texts = cast("Sequence[object]", text)
        bad = [index for index, item in enumerate(texts) if not isinstance(item, str)]
        if not bad:
            return [cast("str", item) for item in texts], False
        raise TokenizerError(f"{name}[{bad[0]}] is a {type(texts[bad[0]]).__name__}, expected a string.")
    raise TokenizerError(f"{name} is a {type(text).__name__}, expected a string or a list of strings.")


@dataclasses.dataclass(frozen=True)
class _Ids:
    """A row of ids, and whether one id was given instead of a row."""

    ids: list[int]
    is_one: bool


def as_ids(values: Any) -> _Ids:
    """Plain ints out of an int, a list, or an array of any framework."""
    # TensorFlow's tensors have no `tolist`, but become NumPy arrays.
    if isinstance(values, _HasToList):
        values = values.tolist()
    elif not isinstance(values, int | list | tuple):
        values = np.asarray(values).tolist()
    is_one = not isinstance(values, list | tuple)
    row = [values] if is_one else cast("Sequence[Any]", values)
    try:
        ids = [operator.index(value) for value in row]
    except TypeError:
        kinds = ", ".join(sorted({type(value).__name__ for value in row}))
        raise TokenizerError(
            f"Token ids are {kinds}, expected a row of integers. Use batch_decode for several rows."
        ) from None
    bad = [token_id for token_id in ids if not 0 <= token_id < 2**32]
    if bad:
        raise TokenizerError(f"Got token id {bad[0]}, expected ids from 0. Replace label fillers such as -100 first.")
    return _Ids(ids, is_one)


# Truncation


def truncated(parts: Sequence[list[int]], added: int, layout: Layout) -> tuple[list[int], ...]:
    """The parts of a row, cut so that with `added` tokens they fit `max_length`."""
    room = cast("int", layout.max_length) - added
    if room < 0:
        raise TokenizerError(f"max_length is {layout.max_length}, but {added} tokens are put in. Give a larger one.")
    lengths = [len(part) for part in parts]
    excess = sum(lengths) - room
    if excess > 0:
        if layout.truncation == "longest_first":
            lengths = _longest_first(lengths, excess)
        else:
            which = 0 if layout.truncation == "only_first" else 1
            if which >= len(lengths) or lengths[which] <= excess:
                raise TokenizerError(
                    f"truncation={layout.truncation!r} can't take {excess} tokens from texts of {lengths}. "
                    f"Use truncation=True."
                )
            lengths[which] -= excess
    return tuple(
        part[:length] if layout.truncation_side == "right" else part[len(part) - length :]
        for part, length in zip(parts, lengths, strict=True)
    )


def _longest_first(lengths: list[int], excess: int) -> list[int]:
    """Take tokens one at a time from the longer text, from the second of two that are equally long."""
    if len(lengths) == 1:
        return [lengths[0] - excess]
    first, second = lengths
    for _ in range(excess):
        if first > second:
            first -= 1
        else:
            second -= 1
    return [first, second]


# Tensors


def rectangular(column: list[list[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows of equal lengths as an array (B, T)."""
    lengths = {len(row) for row in column}
    if len(lengths) > 1:
        raise TokenizerError(
            f"Rows of {min(lengths)} to {max(lengths)} tokens are no tensor. Pass padding=True, or truncation too."
        )
    return np.array(column, dtype=np.int64).reshape(len(column), max(lengths, default=0))


def _numpy(array: np.ndarray[Any, Any]) -> Any:
    return array


def _torch(array: np.ndarray[Any, Any]) -> Any:
    return _framework("torch", "torch", "pt").from_numpy(array)


def _tensorflow(array: np.ndarray[Any, Any]) -> Any:
    # int32 as in Hugging Face's: TensorFlow's own default for integers.
    return _framework("tensorflow", "tf", "tf").constant(array.astype(np.int32))


def _jax(array: np.ndarray[Any, Any]) -> Any:
    # JAX has no int64 unless it is switched on, and warns.
    return _framework("jax.numpy", "flax", "jax").asarray(array.astype(np.int32))


_TENSORS: Mapping[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "np": _numpy,
    "pt": _torch,
    "tf": _tensorflow,
    "jax": _jax,
}


def tensor_maker(name: str) -> Callable[[np.ndarray[Any, Any]], Any]:
    if name not in _TENSORS:
        raise TokenizerError(f"return_tensors is {name!r}, expected one of {', '.join(map(repr, _TENSORS))} or None.")
    return _TENSORS[name]


def _framework(module: str, extra: str, name: str) -> Any:
    """Import a framework that only this call needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingFrameworkError(
            f"return_tensors={name!r} needs {module.partition('.')[0]}, which can't be imported ({error}). "
            f"Run `pip install 'opt-models[{extra}]'`."
        ) from None
