"""Layers whose weights are integers: `opt_common.quantization` in Keras.

They stand where linear layers and tables of embeddings stand. Their integers are not trainable; gradients flow through
them to what comes before.
"""

# TensorFlow's and Keras' annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opt_common.native import Kind
from opt_common.quantization import INT8_LIMIT, OUTLIER, Rows, quantize_rows
from opt_tf import native

AVAILABLE = ("int8-dynamic",)
"""Values of `OPTConfig.quantization` that this backend has: XLA multiplies integers by integers well, nothing else."""


class Int8Linear(keras.layers.Layer):
    """A linear layer with 8-bit weights.

    Attributes:
        codes_FD: the integers.
        scales_F: what a row of them is multiplied by.
        bias: (F,) or None.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool, dtype: Any, name: str) -> None:
        super().__init__(dtype=dtype, name=name)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        self.codes_FD = rounded(self, "codes", (self.out_features, self.in_features), "int8")
        self.scales_F = rounded(self, "scales", (self.out_features,), "float32")
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.out_features,), initializer="zeros")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Inputs (…, D) to outputs (…, F)."""
        *outer, D = keras.ops.shape(inputs)
        inputs_MD = tf.reshape(inputs, (-1, D))
        outputs_MF = int8_product(inputs_MD, self.codes_FD.value, self.scales_F.value)
        outputs_MF = tf.cast(outputs_MF, self.compute_dtype)
        outputs_MF = outputs_MF if self.bias is None else outputs_MF + tf.cast(self.bias, self.compute_dtype)
        return tf.reshape(outputs_MF, (*outer, self.out_features))

    def assign_rounded(self, weight_FD: Rows, dtype: str) -> None:
        """Take over the numbers of a matrix, (F, D)."""
        self.assign_stored(quantize_rows(weight_FD), dtype)

    def assign_stored(self, parts: Sequence[np.ndarray], dtype: str) -> None:
        """Take over the parts of a matrix, as `opt_common.quantization.stored_parts` names them."""
        del dtype  # it is known
        for variable, part in zip((self.codes_FD, self.scales_F), parts, strict=True):
            variable.assign(part)

    def stored(self, index: int) -> Any:
        """One of those parts."""
        return (self.codes_FD, self.scales_F)[index]

    @property
    def kernel(self) -> Any:
        """The matrix as Keras has it, (D, F), float32, made anew each time."""
        return keras.Variable(tf.transpose(dequantized(self)), trainable=False)


class Int8Embedding(keras.layers.Layer):
    """A table of embeddings with 8-bit rows; attributes are those of `Int8Linear`."""

    def __init__(self, rows: int, features: int, *, dtype: Any, name: str) -> None:
        super().__init__(dtype=dtype, name=name)
        self.rows = rows
        self.features = features

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        self.codes_FD = rounded(self, "codes", (self.rows, self.features), "int8")
        self.scales_F = rounded(self, "scales", (self.rows,), "float32")

    def call(self, ids: tf.Tensor) -> tf.Tensor:
        """Ids (…,) to rows (…, D)."""
        codes = tf.cast(tf.gather(self.codes_FD.value, ids), tf.float32)
        return tf.cast(codes * tf.gather(self.scales_F.value, ids)[..., None], self.compute_dtype)

    def assign_rounded(self, weight_FD: Rows, dtype: str) -> None:
        """Take over the numbers of a table, (V, D)."""
        self.assign_stored(quantize_rows(weight_FD), dtype)

    def assign_stored(self, parts: Sequence[np.ndarray], dtype: str) -> None:
        """Take over the parts of a matrix, as `opt_common.quantization.stored_parts` names them."""
        del dtype  # it is known
        for variable, part in zip((self.codes_FD, self.scales_F), parts, strict=True):
            variable.assign(part)

    def stored(self, index: int) -> Any:
        """One of those parts."""
        return (self.codes_FD, self.scales_F)[index]

    def attend(self, query: tf.Tensor) -> tf.Tensor:
        """The head: hidden states (…, D) to logits (…, V)."""
        *outer, D = keras.ops.shape(query)
        inputs_MD = tf.reshape(query, (-1, D))
        outputs_MF = int8_product(inputs_MD, self.codes_FD.value, self.scales_F.value)
        return tf.reshape(tf.cast(outputs_MF, self.compute_dtype), (*outer, self.rows))

    @property
    def embeddings(self) -> Any:
        """The table, (V, D), made anew each time."""
        return keras.Variable(dequantized(self), trainable=False)


def rounded(layer: keras.layers.Layer, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """A variable of a layer that no optimiser moves and no dtype policy casts."""
    return layer.add_weight(name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False, autocast=False)


def dequantized(layer: Any) -> tf.Tensor:
    """The matrix that a layer's integers stand for, (F, D), float32."""
    return tf.cast(layer.codes_FD.value, tf.float32) * layer.scales_F.value[:, None]


def int8_product(inputs_MD: tf.Tensor, codes_FD: tf.Tensor, scales_F: tf.Tensor) -> tf.Tensor:
    """The product of "int8-dynamic", (M, F) in float32."""
    if native.suits(inputs_MD):
        return native.product(Kind.INT8_DYNAMIC_ROWS, tf.cast(inputs_MD, tf.float32), codes_FD, scales_F)
    return rounded_product(inputs_MD, codes_FD, scales_F)


@tf.custom_gradient
def rounded_product(
    inputs_MD: tf.Tensor, codes_FD: tf.Tensor, scales_F: tf.Tensor
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, None, None]]]:
    """The same as XLA multiplies; its gradient is that of the product with `codes * scales`."""
    dtype = inputs_MD.dtype
    inputs_MD = tf.cast(inputs_MD, tf.float32)
    large_MD = tf.where(tf.abs(inputs_MD) > OUTLIER, inputs_MD, 0.0)

    def all_at_once() -> tf.Tensor:
        rounded_MD, steps_M = round_rows(inputs_MD)
        return multiply_integers(rounded_MD, codes_FD) * steps_M

    def large_ones_apart() -> tf.Tensor:
        large_rounded_MD, large_steps_M = round_rows(large_MD)
        rounded_MD, steps_M = round_rows(inputs_MD - tf.cast(large_rounded_MD, tf.float32) * large_steps_M)
        products_XF = multiply_integers(tf.concat((large_rounded_MD, rounded_MD), axis=0), codes_FD)
        products_MF, rest_MF = tf.split(products_XF, 2)
        return products_MF * large_steps_M + rest_MF * steps_M

    def gradient(gradient_MF: tf.Tensor) -> tuple[tf.Tensor, None, None]:
        return tf.cast(tf.matmul(gradient_MF * scales_F, tf.cast(codes_FD, tf.float32)), dtype), None, None

    if inputs_MD.shape[0] == 1:
        # XLA takes as long for one row of integers as for many; for two it does not.
        return large_ones_apart() * scales_F, gradient
    any_large = tf.reduce_any(large_MD != 0)
    return tf.cond(any_large, large_ones_apart, all_at_once) * scales_F, gradient


def round_rows(inputs_MD: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """8-bit integers and the step of each row, (M, 1)."""
    peaks_M = tf.reduce_max(tf.abs(inputs_MD), axis=1, keepdims=True)
    # The smallest normal number keeps rows of zeros from being divided by zero.
    steps_M = tf.maximum(peaks_M / INT8_LIMIT, np.finfo(np.float32).tiny)
    return tf.cast(tf.round(inputs_MD / steps_M), tf.int8), steps_M


def multiply_integers(rounded_MD: tf.Tensor, codes_FD: tf.Tensor) -> tf.Tensor:
    """The product of integers with a transposed matrix of them, (M, F)."""
    products_MF = tf.matmul(rounded_MD, codes_FD, transpose_b=True, output_type=tf.int32)
    return tf.cast(products_MF, tf.float32)
