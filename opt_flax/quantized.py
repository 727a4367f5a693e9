"""Layers whose weights are integers: `opt_common.quantization` in Flax.

They stand where linear layers and tables of embeddings stand. Their integers are no `nnx.Param`, so that no optimiser
moves them; gradients flow through them to what comes before.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from opt_common.native import Kind
from opt_common.quantization import INT8_LIMIT, OUTLIER, Rows, quantize_rows
from opt_flax import native

AVAILABLE = ("int8-dynamic",)
"""Values of `OPTConfig.quantization` that this backend has: XLA multiplies integers by integers well, nothing else."""


class Rounded(nnx.Variable[Array]):
    """Integers and scales of a rounded matrix."""


class Int8Linear(nnx.Module):
    """A linear layer with 8-bit weights.

    Attributes:
        codes_FD: the integers.
        scales_F: what a row of them is multiplied by.
        bias: (F,) or None.
    """

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool, dtype: DTypeLike, param_dtype: DTypeLike
    ) -> None:
        self.dtype = jnp.dtype(dtype)
        self.codes_FD = Rounded(jnp.zeros((out_features, in_features), jnp.int8))
        self.scales_F = Rounded(jnp.zeros(out_features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else None

    def __call__(self, inputs: Array) -> Array:
        """Inputs (…, D) to outputs (…, F)."""
        inputs_MD = inputs.reshape(-1, inputs.shape[-1])
        outputs_MF = int8_product(inputs_MD, self.codes_FD[...], self.scales_F[...])
        outputs_MF = outputs_MF if self.bias is None else outputs_MF + self.bias[...]
        return outputs_MF.astype(self.dtype).reshape(*inputs.shape[:-1], -1)

    def assign_rounded(self, weight_FD: Rows, dtype: DTypeLike) -> None:
        """Take over the numbers of a matrix, (F, D)."""
        self.assign_stored(quantize_rows(weight_FD), dtype)

    def assign_stored(self, parts: Sequence[np.ndarray], dtype: DTypeLike) -> None:
        """Take over the parts of a matrix, as `opt_common.quantization.stored_parts` names them."""
        del dtype  # it is known
        self.codes_FD, self.scales_F = (Rounded(jnp.asarray(part)) for part in parts)

    def stored(self, index: int) -> Array:
        """One of those parts."""
        return (self.codes_FD, self.scales_F)[index][...]

    @property
    def kernel(self) -> Array:
        """The matrix as Flax has it, (D, F), float32, made anew each time."""
        return (self.codes_FD[...] * self.scales_F[...][:, None]).T


class Int8Embedding(nnx.Module):
    """A table of embeddings with 8-bit rows; attributes are those of `Int8Linear`."""

    def __init__(self, rows: int, features: int, *, dtype: DTypeLike) -> None:
        self.dtype = jnp.dtype(dtype)
        self.codes_FD = Rounded(jnp.zeros((rows, features), jnp.int8))
        self.scales_F = Rounded(jnp.zeros(rows, jnp.float32))

    def __call__(self, ids: Array) -> Array:
        """Ids (…,) to rows (…, D)."""
        return (self.codes_FD[ids] * self.scales_F[ids][..., None]).astype(self.dtype)

    def assign_rounded(self, weight_FD: Rows, dtype: DTypeLike) -> None:
        """Take over the numbers of a table, (V, D)."""
        self.assign_stored(quantize_rows(weight_FD), dtype)

    def assign_stored(self, parts: Sequence[np.ndarray], dtype: DTypeLike) -> None:
        """Take over the parts of a matrix, as `opt_common.quantization.stored_parts` names them."""
        del dtype  # it is known
        self.codes_FD, self.scales_F = (Rounded(jnp.asarray(part)) for part in parts)

    def stored(self, index: int) -> Array:
        """One of those parts."""
        return (self.codes_FD, self.scales_F)[index][...]

    def attend(self, query: Array) -> Array:
        """The head: hidden states (…, D) to logits (…, V)."""
        inputs_MD = query.reshape(-1, query.shape[-1])
        outputs_MF = int8_product(inputs_MD, self.codes_FD[...], self.scales_F[...])
        return outputs_MF.astype(self.dtype).reshape(*query.shape[:-1], -1)

    @property
    def embedding(self) -> Array:
        """The table, (V, D), made anew each time."""
        return (self.codes_FD[...] * self.scales_F[...][:, None]).astype(self.dtype)


def int8_product(inputs_MD: Array, codes_FD: Array, scales_F: Array) -> Array:
    """The product of "int8-dynamic", (M, F) in float32."""
    if native.suits(inputs_MD):
        return native.product(Kind.INT8_DYNAMIC_ROWS, inputs_MD.astype(jnp.float32), codes_FD, scales_F)
    return rounded_product(inputs_MD, codes_FD, scales_F)


@jax.custom_vjp
def rounded_product(inputs_MD: Array, codes_FD: Array, scales_F: Array) -> Array:
    """The same as XLA multiplies; its gradient is that of the product with `codes * scales`."""
    inputs_MD = inputs_MD.astype(jnp.float32)
    large_MD = jnp.where(jnp.abs(inputs_MD) > OUTLIER, inputs_MD, 0)

    def all_at_once(inputs_MD: Array) -> Array:
        rounded_MD, steps_M = round_rows(inputs_MD)
        return multiply_integers(rounded_MD, codes_FD) * steps_M

    def large_ones_apart(inputs_MD: Array) -> Array:
        M = len(inputs_MD)
        large_rounded_MD, large_steps_M = round_rows(large_MD)
        rounded_MD, steps_M = round_rows(inputs_MD - large_rounded_MD * large_steps_M)
        products_XF = multiply_integers(jnp.concatenate((large_rounded_MD, rounded_MD)), codes_FD)
        return products_XF[:M] * large_steps_M + products_XF[M:] * steps_M

    if len(inputs_MD) == 1:
        # XLA takes as long for one row of integers as for fifty; for two it does not.
        return large_ones_apart(inputs_MD) * scales_F
    return lax.cond(large_MD.any(), large_ones_apart, all_at_once, inputs_MD) * scales_F


def _rounded_product_forward(
    inputs_MD: Array, codes_FD: Array, scales_F: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return rounded_product(inputs_MD, codes_FD, scales_F), (inputs_MD[:0], codes_FD, scales_F)


def _rounded_product_backward(saved: tuple[Array, Array, Array], gradient_MF: Array) -> tuple[Array, Any, Array]:
    like_0D, codes_FD, scales_F = saved
    gradient_MD = (gradient_MF * scales_F) @ codes_FD.astype(jnp.float32)
    nothing = np.zeros(codes_FD.shape, jax.dtypes.float0)
    return gradient_MD.astype(like_0D.dtype), nothing, jnp.zeros_like(scales_F)


rounded_product.defvjp(_rounded_product_forward, _rounded_product_backward)


def round_rows(inputs_MD: Array) -> tuple[Array, Array]:
    """8-bit integers and the step of each row, (M, 1)."""
    peaks_M = jnp.abs(inputs_MD).max(axis=1, keepdims=True)
    # The smallest normal number keeps rows of zeros from being divided by zero.
    steps_M = jnp.maximum(peaks_M / INT8_LIMIT, jnp.finfo(jnp.float32).tiny)
    return jnp.rint(inputs_MD / steps_M).astype(jnp.int8), steps_M


def multiply_integers(rounded_MD: Array, codes_FD: Array) -> Array:
    """The product of integers with a transposed matrix of them, (M, F)."""
    dimensions = (((1,), (1,)), ((), ()))
    products_MF = lax.dot_general(rounded_MD, codes_FD, dimensions, preferred_element_type=jnp.int32)
    return products_MF.astype(jnp.float32)
