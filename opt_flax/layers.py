"""The pieces that the Flax model is made of: its activation functions, and its layers with their initial weights."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from opt_common.config import LAYER_NORM_EPS, OPTConfig
from opt_common.errors import InputError
from opt_common.native import KINDS
from opt_common.quantization import check_quantization
from opt_flax import native
from opt_flax.quantized import AVAILABLE, Int8Embedding, Int8Linear

ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def multiply(inputs: Array, matrix: Array, dimensions: Any, precision: Any = None, out_sharding: Any = None) -> Array:
    """A product as `lax.dot_general` has it, of inputs (…, D) with a matrix; in generation, the library's.

    Without sums in float32, and for a single row even with them, XLA multiplies 16-bit numbers on a CPU over ten times
    slower than others.
    """
    ((_, (axis,)), _) = dimensions
    kind = KINDS.get((matrix.dtype.name, axis == 0))
    if kind is not None and inputs.dtype == matrix.dtype and native.suits(inputs):
        outputs_MF = native.product(kind, inputs.reshape(-1, inputs.shape[-1]), matrix)
        return outputs_MF.reshape(*inputs.shape[:-1], -1)
    options: dict[str, Any] = {"precision": precision, "out_sharding": out_sharding}
    if inputs.dtype.itemsize > 2:
        return lax.dot_general(inputs, matrix, dimensions, **options)
    alone = inputs.ndim > 1 and math.prod(inputs.shape[:-1]) == 1
    if alone:
        inputs = jnp.concatenate((inputs, jnp.zeros_like(inputs)))
    outputs = lax.dot_general(inputs, matrix, dimensions, preferred_element_type=jnp.float32, **options)
    return (outputs[:1] if alone else outputs).astype(inputs.dtype)


class Embedding(nnx.Embed):
    """An `Embed` layer whose product is `multiply`."""

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """The head: hidden states (…, D) to logits (…, V)."""
        query, table_VD = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        return multiply(query, table_VD, (((query.ndim - 1,), (1,)), ((), ())), out_sharding=out_sharding)


class Builder:
    """Makes the layers of one model: same dtypes, same initial weights, same source of random numbers.

    New weights are normal with deviation `init_std`; biases and the pad row zero; layer norms the identity.
    """

    def __init__(self, config: OPTConfig, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        if "float64" in (self.dtype.name, self.param_dtype.name) and not jax.config.read("jax_enable_x64"):
            raise InputError(
                "dtype is float64, which JAX has off. Run jax.config.update('jax_enable_x64', True) first."
            )
        self.rngs = rngs
        self.quantization = config.quantization
        check_quantization(config, AVAILABLE)
        self.normal = nnx.initializers.normal(config.init_std)

    def linear(self, in_features: int, out_features: int, *, use_bias: bool) -> nnx.Linear | Int8Linear:
        """A linear layer. In few bits it starts as zeros."""
        if self.quantization is not None:
            placing: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return Int8Linear(in_features, out_features, use_bias=use_bias, **placing)
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=self.normal,
            dot_general=multiply,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def embedding(self, rows: int, features: int, *, pad: int | None = None) -> Embedding:
        """A table of embeddings; row `pad` starts as zeros."""

        def embedding_init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            table = self.normal(key, shape, dtype)
            return table if pad is None else table.at[pad].set(0)

        return Embedding(
            rows,
            features,
            embedding_init=embedding_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def vocabulary(self, rows: int, features: int, *, pad: int | None = None) -> Embedding | Int8Embedding:
        """A table of the vocabulary's embeddings. In few bits it starts as zeros."""
        if self.quantization is None:
            return self.embedding(rows, features, pad=pad)
        return Int8Embedding(rows, features, dtype=self.dtype)

    def head(self, in_features: int, out_features: int) -> nnx.Linear | Int8Linear:
        """A linear layer onto the vocabulary, in as many bits as its table."""
        return self.linear(in_features, out_features, use_bias=False)

    def layer_norm(self, features: int, *, affine: bool) -> nnx.LayerNorm:
        """A layer norm, with the variance computed in the way that does not cancel."""
        return nnx.LayerNorm(
            features,
            epsilon=LAYER_NORM_EPS,
            use_bias=affine,
            use_scale=affine,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def dropout(self, rate: float) -> nnx.Dropout:
        """A dropout layer."""
        return nnx.Dropout(rate, rngs=self.rngs)
