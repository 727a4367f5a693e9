"""Layers that are alike, traced once in what is compiled: of a deep model, writing down each takes longest."""

import functools
from typing import Any

import jax
from flax import nnx
from jax import Array

from opt_common.native import is_decoding
from opt_flax.attention import Masking


def call_layer(
    layer: Any,
    hidden_BTD: Array,
    masking: Masking,
    past: tuple[Array, Array],
    offset: int | Array,
    output_attentions: bool,
) -> tuple[Array, tuple[Array, Array], Array | None]:
    """What a layer gives, whose arguments are the others, by way of one function for all that are like it."""
    graphdef, state = nnx.split(layer)
    # What is traced where the library is called is not what is traced elsewhere.
    return _call(graphdef, is_decoding.get(), output_attentions, state, hidden_BTD, masking.bias_BNTS, past, offset)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(
    graphdef: nnx.GraphDef[Any],
    calls_library: bool,
    output_attentions: bool,
    state: Any,
    hidden_BTD: Array,
    bias_BNTS: Array | None,
    past: tuple[Array, Array],
    offset: int | Array,
) -> tuple[Array, tuple[Array, Array], Array | None]:
    del calls_library
    return nnx.merge(graphdef, state)(hidden_BTD, Masking(bias_BNTS), past, offset, output_attentions)
