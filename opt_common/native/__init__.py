"""Products of a few rows of inputs with a matrix, and attention of one token, in C: what decoding on a CPU consists of.

A token that is decoded reads every weight once, so that memory sets the pace; the frameworks' own products do not keep
it, least of all in few bits. Where these suit, a handful of rows on a CPU and no gradients, PyTorch calls them, and
generation's programs in JAX and TensorFlow.

The library is built when the package is installed. Without a C compiler there is none, and each backend multiplies as
its framework does; so it does if the environment variable `OPT_NATIVE` is 0.
"""

import contextlib
import contextvars
import ctypes
import enum
import functools
import os
from collections.abc import Generator
from pathlib import Path

MAX_ROWS = 16
"""Rows of inputs that a product is made for: of more, so many at a time. The numbers here are those of `products.h`."""

VERSION = 5
"""The library's functions as this file knows them. One that was built for another version is not used."""


class Kind(enum.IntEnum):
    """How a matrix is stored, for inputs (M, D) and outputs (M, F): (F, D), or (D, F) where it is of columns.

    Inputs, bias and outputs are float32 or bfloat16. 8-bit integers have a scale for each row, (F,) in float32; 4-bit
    ones, two to a byte, a scale and an offset for each 32 in a row, (F, D / 32, 2) in bfloat16.
    """

    FLOAT32_ROWS = 0
    BFLOAT16_ROWS = 1
    INT8_ROWS = 2
    INT8_DYNAMIC_ROWS = 3
    INT4_ROWS = 4
    FLOAT32_COLUMNS = 5
    BFLOAT16_COLUMNS = 6


class Task(enum.IntEnum):
    """What one operation of a step computes; `steps.h` says what its arguments are."""

    PRODUCT = 0
    ATTENTION = 1
    LAYER_NORM = 2
    ADD = 3
    SCALE = 4
    RELU = 5


class Operation(ctypes.Structure):
    """One operation of a step, as the library takes it."""

    _fields_ = (("task", ctypes.c_int64), ("arguments", ctypes.c_int64 * 16), ("number", ctypes.c_double))


KINDS = {
    ("float32", True): Kind.FLOAT32_COLUMNS,
    ("float32", False): Kind.FLOAT32_ROWS,
    ("bfloat16", True): Kind.BFLOAT16_COLUMNS,
    ("bfloat16", False): Kind.BFLOAT16_ROWS,
}
"""The kind of a matrix by its dtype and whether it is of columns."""

COLUMNS = (Kind.FLOAT32_COLUMNS, Kind.BFLOAT16_COLUMNS)
"""The kinds that are (D, F)."""

DTYPES = ("float32", "bfloat16")
"""What inputs and attention may be in."""

XLA_ATTENTION = "opt_attention"
"""The name by which XLA's programs call attention of one token."""

XLA_PRODUCTS = {kind: f"opt_{kind.name.lower()}" for kind in (*KINDS.values(), Kind.INT8_DYNAMIC_ROWS)}
"""The names by which they call products."""

is_decoding = contextvars.ContextVar("is_decoding", default=False)
"""Whether what XLA compiles is to call the library."""


@contextlib.contextmanager
def decoding(*, by_xla: bool = True) -> Generator[None, None, None]:
    """Where what XLA compiles calls the library: it has no gradients there, and can't be exported.

    Generation's step is compiled so. It decorates a function, too, for it to be traced so.

    Args:
        by_xla: whether it is XLA that compiles; what else may compile can't call the library.
    """
    token = is_decoding.set(by_xla)
    try:
        yield
    finally:
        is_decoding.reset(token)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where there is none."""
    path = Path(__file__).with_name("_library.abi3.so")
    if os.environ.get("OPT_NATIVE") == "0" or not path.is_file():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        if loaded.opt_version() != VERSION:
            return None
    except (OSError, AttributeError):
        # Built for another machine, or before this version of the package.
        return None
    pointer, size, flag = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    loaded.opt_product.argtypes = [
        *(flag, flag, pointer, size, size, size),
        *(pointer, flag),
        *(pointer, pointer),
        *(pointer, flag),
        *(pointer, flag),
    ]
    loaded.opt_attention.argtypes = [
        *(flag, pointer, size, size, size, size, size),
        *(pointer, size, pointer, pointer, size, flag),
        *(pointer, size),
        *(pointer, pointer, flag, pointer),
    ]
    loaded.opt_prompt_attention.argtypes = [
        *(flag, pointer, size, size, size, size),
        *(pointer, size, pointer, size, pointer, size),
        *(flag, pointer),
    ]
    loaded.opt_run.argtypes = [flag, pointer, pointer, size]
    loaded.opt_register_xla.argtypes = [pointer, ctypes.c_char_p, pointer]
    return loaded


def xla_handlers() -> dict[str, int]:
    """The addresses of the functions that XLA's programs call, by name; none where there is no library."""
    loaded = library()
    if loaded is None:
        return {}
    found: dict[str, int] = {}
    for name in (XLA_ATTENTION, *XLA_PRODUCTS.values()):
        address = ctypes.cast(getattr(loaded, f"{name}_xla"), ctypes.c_void_p).value
        assert address is not None
        found[name] = address
    return found
