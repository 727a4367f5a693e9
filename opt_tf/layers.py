"""The pieces that the Keras model is made of: its activation functions, and its layers with their initial weights."""

# Keras' annotations know no initialiser but a name.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from opt_common.config import LAYER_NORM_EPS, OPTConfig
from opt_common.native import KINDS
from opt_common.quantization import check_quantization
from opt_tf import native
from opt_tf.quantized import AVAILABLE, Int8Embedding, Int8Linear

ACTIVATION_FUNCTIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "relu": tf.nn.relu,
    # tf.nn.gelu rounds its constants to float32, whatever the dtype of x.
    "gelu": lambda x: 0.5 * x * (1.0 + tf.math.erf(x * 0.5**0.5)),
    "gelu_new": lambda x: 0.5 * x * (1.0 + tf.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1.0 + tf.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * tf.sigmoid(1.702 * x),
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


def multiply(inputs: tf.Tensor, matrix: tf.Tensor, *, transposed: bool = False) -> tf.Tensor:
    """Inputs (…, D) times a matrix (D, F), or the transpose of one that is (F, D); in generation, by the library.

    It is one two-dimensional product: the matrix is read as it lies, not copied first.
    """
    *outer, D = keras.ops.shape(inputs)
    inputs_MD = tf.reshape(inputs, (-1, D))
    kind = KINDS.get((matrix.dtype.name, not transposed))
    if kind is not None and inputs.dtype == matrix.dtype and native.suits(inputs):
        outputs_MF = native.product(kind, inputs_MD, matrix)
    else:
        outputs_MF = tf.matmul(inputs_MD, matrix, transpose_b=transposed)
    return tf.reshape(outputs_MF, (*outer, matrix.shape[0 if transposed else 1]))


class Linear(keras.layers.Dense):
    """A `Dense` layer that knows its input's width, so that it can be built before it is called."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(out_features, **options)
        self.in_features = in_features

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        super().build((None, self.in_features))

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Inputs (…, in_features) to outputs (…, out_features)."""
        outputs = multiply(inputs, tf.convert_to_tensor(self.kernel))
        return outputs if self.bias is None else outputs + tf.convert_to_tensor(self.bias)


class Embedding(keras.layers.Embedding):
    """An `Embedding` layer with a dense gradient.

    TensorFlow's own is a list of rows, in which a token that occurs twice has two; Keras' optimizers square each for
    itself, so that AdamW takes other steps than it should.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Rows of the table."""

        @tf.custom_gradient
        def look_up(table_VE: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                upstream_XE = tf.cast(tf.reshape(upstream, (-1, self.output_dim)), self.variable_dtype)
                sums_VE = tf.math.unsorted_segment_sum(upstream_XE, tf.reshape(inputs, (-1,)), self.input_dim)
                return tf.cast(sums_VE, table_VE.dtype)

            return tf.cast(tf.gather(table_VE, inputs), self.compute_dtype), gradient

        return look_up(tf.convert_to_tensor(self.embeddings))


class LayerNorm(keras.layers.LayerNormalization):
    """A `LayerNormalization` that knows its input's width, so that it can be built before it is called."""

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(**options)
        self.features = features

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        super().build((None, self.features))


class Builder:
    """Makes the layers of one model: same dtype policy, same initial weights.

    New weights are normal with deviation `init_std`; biases and the pad row zero; layer norms the identity.
    """

    def __init__(self, config: OPTConfig, dtype: Any, new_weights: bool) -> None:
        self.dtype = dtype
        self.std = config.init_std if new_weights else 0.0
        self.quantization = config.quantization
        check_quantization(config, AVAILABLE)

    def normal(self) -> keras.initializers.Initializer:
        """A new initialiser: one that is used twice gives the same numbers twice."""
        return keras.initializers.RandomNormal(stddev=self.std) if self.std else keras.initializers.Zeros()

    def linear(self, in_features: int, out_features: int, *, use_bias: bool, name: str) -> Linear | Int8Linear:
        """A linear layer. In few bits it starts as zeros."""
        if self.quantization is not None:
            return Int8Linear(in_features, out_features, use_bias=use_bias, dtype=self.dtype, name=name)
        return Linear(
            in_features, out_features, use_bias=use_bias, kernel_initializer=self.normal(), dtype=self.dtype, name=name
        )

    def embedding(self, rows: int, features: int, *, pad: int | None = None, name: str) -> Embedding:
        """A table of embeddings; row `pad` starts as zeros."""
        normal = self.normal()

        def initialise(shape: tuple[int, ...], dtype: Any = None) -> tf.Tensor:
            table = normal(shape, dtype)
            is_pad_VE = (tf.range(rows) == (-1 if pad is None else pad))[:, None]
            return tf.where(is_pad_VE, tf.zeros_like(table), table)

        return Embedding(rows, features, embeddings_initializer=initialise, dtype=self.dtype, name=name)

    def vocabulary(
        self, rows: int, features: int, *, pad: int | None = None, name: str
    ) -> keras.layers.Embedding | Int8Embedding:
        """A table of the vocabulary's embeddings. In few bits it starts as zeros."""
        if self.quantization is None:
            return self.embedding(rows, features, pad=pad, name=name)
        return Int8Embedding(rows, features, dtype=self.dtype, name=name)

    def head(self, in_features: int, out_features: int, *, name: str) -> Linear | Int8Linear:
        """A linear layer onto the vocabulary, in as many bits as its table."""
        return self.linear(in_features, out_features, use_bias=False, name=name)

    def layer_norm(self, features: int, *, affine: bool, name: str) -> LayerNorm:
        """A layer norm."""
        return LayerNorm(features, epsilon=LAYER_NORM_EPS, center=affine, scale=affine, dtype=self.dtype, name=name)

    def dropout(self, rate: float) -> keras.layers.Dropout:
        """A dropout layer."""
        return keras.layers.Dropout(rate, dtype=self.dtype)
