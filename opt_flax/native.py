"""The products of `opt_common.native` on JAX's arrays."""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_common.native import MAX_ROWS, Kind, library, xla_handler


@functools.cache
def registered(kind: Kind) -> str | None:
    """The name by which XLA's programs call a product, or None where there is no library that this XLA takes."""
    if library() is None:
        return None
    name = f"opt_{kind.name.lower()}"
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    try:
        jax.ffi.register_ffi_target(name, capsule(xla_handler(kind), None, None), platform="cpu")
        with jax.ensure_compile_time_eval():
            ones = np.ones((1, 1), np.float32)
            call(name, jnp.asarray(ones), jnp.asarray(ones, jnp.int8), jnp.asarray(ones[0])).block_until_ready()
    except jax.errors.JaxRuntimeError:
        # An XLA of another version of the interface.
        return None
    return name


def call(name: str, inputs_MD: Array, matrix_FD: Array, scales_F: Array) -> Array:
    """A call in a program of XLA's."""
    outputs = jax.ShapeDtypeStruct((len(inputs_MD), len(matrix_FD)), inputs_MD.dtype)
    return jax.ffi.ffi_call(name, outputs, vmap_method="sequential")(inputs_MD, matrix_FD, scales_F)


def suits(inputs_MD: Array) -> bool:
    """Whether the library is to multiply: some rows, on one CPU. XLA can't divide what it does not know among more."""
    return (
        0 < len(inputs_MD) <= MAX_ROWS
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and registered(Kind.INT8_DYNAMIC_ROWS) is not None
    )


def product(kind: Kind, inputs_MD: Array, matrix_FD: Array, scales_F: Array) -> Array:
    """Inputs (M, D), float32, times the transposed matrix, (M, F). It has no gradient of its own."""
    name = registered(kind)
    assert name is not None
    return call(name, inputs_MD, matrix_FD, scales_F)
