"""The products and the attention of `opt_common.native` on JAX's arrays."""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_common.native import COLUMNS, DTYPES, MAX_ROWS, XLA_ATTENTION, XLA_PRODUCTS, Kind, is_decoding, xla_handlers


@functools.cache
def is_registered() -> bool:
    """Whether XLA's programs can call the library: there is one, and this XLA takes its functions."""
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    handlers = xla_handlers()
    try:
        for name, address in handlers.items():
            jax.ffi.register_ffi_target(name, capsule(address, None, None), platform="cpu")
        if handlers:
            with jax.ensure_compile_time_eval():
                ones = jnp.asarray(np.ones((1, 1), np.float32))
                product(Kind.FLOAT32_ROWS, ones, ones).block_until_ready()
    except jax.errors.JaxRuntimeError:
        # An XLA of another version of the interface.
        return False
    return len(handlers) > 0


def is_called() -> bool:
    """Whether the library is called here: on one CPU, for XLA can't divide what it does not know among more."""
    return is_decoding.get() and jax.default_backend() == "cpu" and jax.device_count() == 1 and is_registered()


def suits(inputs: Array) -> bool:
    """Whether the library is to multiply inputs (…, D): some rows of them."""
    return is_called() and inputs.dtype.name in DTYPES and 0 < inputs.size <= MAX_ROWS * inputs.shape[-1]


def product(kind: Kind, inputs_MD: Array, matrix: Array, scales_F: Array | None = None) -> Array:
    """Inputs (M, D) times a matrix of a kind, (M, F) in the dtype of the inputs."""
    F = matrix.shape[1 if kind in COLUMNS else 0]
    outputs_MF = jax.ShapeDtypeStruct((len(inputs_MD), F), inputs_MD.dtype)
    arguments = [inputs_MD, matrix, *([] if scales_F is None else [scales_F])]
    return jax.ffi.ffi_call(XLA_PRODUCTS[kind], outputs_MF, vmap_method="sequential")(*arguments)


def suits_attention(q_BTNH: Array, past: tuple[Array, Array]) -> bool:
    """Whether the library is to compute attention: of one new token a row."""
    return (
        is_called()
        and q_BTNH.shape[1] == 1
        and q_BTNH.size > 0
        and all(each.dtype.name in DTYPES for each in (q_BTNH, *past))
    )


def attention(
    q_B1NH: Array,
    k_B1NH: Array,
    v_B1NH: Array,
    bias_BN1S: Array,
    past: tuple[Array, Array],
    offset: int | Array,
) -> tuple[Array, tuple[Array, Array]]:
    """The context of scaled queries, (B, 1, N, H), and the buffers with the keys and values in slot `offset`."""
    results = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (q_B1NH, *past)]
    call = jax.ffi.ffi_call(XLA_ATTENTION, results, vmap_method="sequential", input_output_aliases={3: 1, 4: 2})
    slot = jnp.asarray(offset, jnp.int32)
    context_B1NH, *present = call(q_B1NH, k_B1NH, v_B1NH, *past, slot, bias_BN1S)
    return context_B1NH, (present[0], present[1])
