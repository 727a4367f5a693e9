"""Layers that are alike, traced once in what is compiled: of a deep model, writing down each takes longest."""

# TensorFlow's and Keras' annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from typing import Any

import keras
import tensorflow as tf

from opt_tf.attention import Masking
from opt_tf.layers import LayerNorm, Linear
from opt_tf.quantized import Int8Linear

PARTS = (Linear, Int8Linear, LayerNorm, keras.layers.Dropout)
"""What the layers of a model are made of, but for classes of `modeling.py`, if all are alike."""


class SharedLayer:
    """Calls layers by way of one function for all that are like the first."""

    def __init__(self, *, by_xla: bool) -> None:
        """With no first layer yet.

        Args:
            by_xla: whether it is XLA that compiles.
        """
        self.by_xla = by_xla
        self.first: Any = None
        self.function = tf.function(self.call_first, autograph=False, experimental_attributes={"_noinline": True})

    def __call__(
        self,
        layer: Any,
        hidden_BTD: tf.Tensor,
        masking: Masking,
        past: tuple[tf.Tensor, tf.Tensor],
        offset: int | tf.Tensor,
        output_attentions: bool,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor], tf.Tensor | None]:
        """What a layer gives, whose arguments are the others."""
        apart = output_attentions or tf.config.functions_run_eagerly() or not is_plain(layer)
        if apart or not alike(layer, self.first or layer):
            return layer(hidden_BTD, masking=masking, past=past, offset=offset, output_attentions=output_attentions)
        self.first = self.first or layer
        # Not cast to the dtype of the arithmetic, as a variable's value is within a layer.
        weights = [tf.convert_to_tensor(weight._value) for weight in layer.weights]
        arguments = (weights, hidden_BTD, masking.bias_BNTS, past, offset)
        if not self.by_xla:
            return *self.function(*arguments), None
        # What becomes a program of XLA's has its functions inlined, and each of a layer's operations costs up to
        # milliseconds then; a choice of one function is translated once.
        traced = self.function.get_concrete_function(*arguments)
        results = tf.raw_ops.StatelessCase(
            branch_index=tf.constant(0),
            input=[each for each in tf.nest.flatten(arguments) if each is not None],
            Tout=[each.dtype for each in traced.outputs],
            branches=[traced],
            output_shapes=[each.shape for each in traced.outputs],
        )
        return *tf.nest.pack_sequence_as(traced.structured_outputs, results), None

    def call_first(
        self,
        weights: list[tf.Tensor],
        hidden_BTD: tf.Tensor,
        bias_BNTS: tf.Tensor | None,
        past: tuple[tf.Tensor, tf.Tensor],
        offset: int | tf.Tensor,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
        """What the first layer would give if it had these weights."""
        with keras.StatelessScope(state_mapping=list(zip(self.first.weights, weights, strict=True))):
            hidden_BTD, present, _ = self.first(hidden_BTD, masking=Masking(bias_BNTS), past=past, offset=offset)
        return hidden_BTD, present


def alike(layer: Any, other: Any) -> bool:
    """Whether layers are made of the same parts, which compute in the same dtypes."""
    kinds, other_kinds = (
        [(type(part), part.dtype_policy.name) for part in each._flatten_layers()] for each in (layer, other)
    )
    return kinds == other_kinds


def is_plain(layer: Any) -> bool:
    """Whether a layer is what this package built: it computes what its class and its weights say."""
    return all(
        (type(part) in PARTS or type(part).__module__ == "opt_tf.modeling")
        and "call" not in vars(part)
        and not getattr(part, "lora_enabled", False)
        and part.dtype_policy.quantization_mode is None
        for part in layer._flatten_layers()
    )
