"""LoRA adapters on Keras models; the rules and names are in `opt_common.lora`, PEFT's files in `conversion.adapter`.

model.add_lora(LoraConfig(r=8))       # then train: only the adapter does
model.save_adapter("my-adapter")      # loads in PEFT, and in the other two frameworks
model.load_adapter("my-adapter")
"""

import os
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from conversion.adapter import checked_adapter, open_adapter, save_adapter
from opt_common.config import OPTConfig
from opt_common.lora import (
    AdaptedLayer,
    AdapterTable,
    LoraConfig,
    adapter_bound,
    adapter_table,
    check_adapter,
    check_no_adapter,
    resolve_lora,
)
from opt_common.params import Head, Parameter
from opt_tf.checkpoint import find, to_array, to_numpy
from opt_tf.generation import forget_compiled


class LoraLinear(keras.layers.Layer):
    """A linear layer with an adapter: `base_layer(x) + scaling * lora_B(lora_A(lora_dropout(x)))`.

    A and B are in float32 at least, whatever the base layer is in. While merged, the base layer computes it all.
    """

    def __init__(self, base_layer: keras.layers.Dense, layer: AdaptedLayer, lora: LoraConfig) -> None:
        super().__init__(dtype=base_layer.dtype_policy, name=base_layer.name)
        a, b = layer.matrices
        self.base_layer = base_layer
        self.scaling = layer.scaling
        self.lora_dropout = keras.layers.Dropout(lora.lora_dropout, dtype=base_layer.dtype_policy)
        self.lora_A = adapter_linear(a, base_layer, name="lora_A")
        self.lora_B = adapter_linear(b, base_layer, name="lora_B")
        self.unmerged: np.ndarray | None = None
        self.built = True

    @property
    def kernel(self) -> Any:
        """The base layer's kernel."""
        return self.base_layer.kernel

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.base_layer.bias

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The layer's output for x (…, in), (…, out), in the base layer's dtype."""
        base = self.base_layer(x)
        if self.unmerged is not None:
            return base
        adapted = self.lora_B(self.lora_A(self.lora_dropout(x)))
        return tf.cast(tf.cast(base, adapted.dtype) + self.scaling * adapted, base.dtype)

    def merge(self) -> None:
        """Add the adapter to the base kernel, which is kept aside."""
        a, b = tf.convert_to_tensor(self.lora_A.kernel), tf.convert_to_tensor(self.lora_B.kernel)
        change = self.scaling * tf.matmul(a, b)
        self.unmerged = self.kernel.value.numpy()
        self.kernel.assign(tf.cast(tf.cast(self.kernel.value, change.dtype) + change, self.kernel.dtype))

    def unmerge(self) -> None:
        """Put the base kernel back, bit for bit."""
        self.kernel.assign(self.unmerged)
        self.unmerged = None


class Adaptable:
    """What every model class can do with adapters. A model has one at most."""

    config: OPTConfig
    head: Head | None
    lora_config: LoraConfig | None = None
    lora_merged: bool = False

    def add_lora(self, lora: LoraConfig) -> None:
        """Give the model a new adapter. From then on only the adapter trains, and what it says besides.

        Args:
            lora: which layers, how strong.

        Raises:
            ConfigError: if the model has an adapter, or `lora` does not fit it.
        """
        check_no_adapter(self.lora_config)
        lora = resolve_lora(self.config, lora, self.head)
        table = adapter_table(self.config, lora, self.head)
        wrap(self, lora, table)
        for layer in table.layers:
            for parameter in layer.matrices:
                start(find(self, parameter), parameter, lora)

    def load_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Give the model an adapter that any of the three backends or PEFT saved; it may train on.

        Args:
            directory: holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

        Raises:
            ConfigError: if the model has an adapter, or the file asks for what is not supported.
            CheckpointError: if the adapter is absent, damaged, or does not fit the model.
        """
        check_no_adapter(self.lora_config)
        with open_adapter(directory) as adapter:
            table, names = checked_adapter(adapter, self.config, self.head)
            wrap(self, adapter.lora, table)
            for parameter, name in names.items():
                fill(self, parameter, adapter.read(name))

    def save_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter, in PEFT's format, without the base model.

        Args:
            directory: where to; made if it does not exist.

        Raises:
            ConfigError: if the model has no adapter.
        """
        lora = check_adapter(self.lora_config)
        table = adapter_table(self.config, lora, self.head)
        save_adapter(directory, lora, table, lambda parameter: to_numpy(find(self, parameter), parameter))

    def merge_adapter(self) -> None:
        """Add the adapter to the base weights: the same function, as fast as without it. It can be undone.

        Raises:
            ConfigError: if the model has no adapter.
        """
        lora = check_adapter(self.lora_config)
        if not self.lora_merged:
            for layer in adapter_table(self.config, lora, self.head).layers:
                adapted(self, layer).merge()
        self.lora_merged = True
        forget_compiled(self)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`: the base weights are what they were, bit for bit.

        Raises:
            ConfigError: if the model has no adapter.
        """
        lora = check_adapter(self.lora_config)
        if self.lora_merged:
            for layer in adapter_table(self.config, lora, self.head).layers:
                adapted(self, layer).unmerge()
        self.lora_merged = False
        forget_compiled(self)

    def merge_and_unload(self) -> None:
        """Merge the adapter for good: what is left is a plain model, all of which trains.

        Raises:
            ConfigError: as for `merge_adapter`.
        """
        self.merge_adapter()
        lora = check_adapter(self.lora_config)
        for layer in adapter_table(self.config, lora, self.head).layers:
            module, name = outer_place(self, layer)
            replace(module, name, getattr(module, name).base_layer)
        self.lora_config, self.lora_merged = None, False
        for variable in cast(keras.Model, self).weights:
            variable.trainable = True
        forget_compiled(self)


def wrap(model: Any, lora: LoraConfig, table: AdapterTable) -> None:
    """Put an adapter around each of a model's adapted layers, and let nothing else train."""
    for layer in table.layers:
        module, name = outer_place(model, layer)
        replace(module, name, LoraLinear(getattr(module, name), layer, lora))
    for variable in model.weights:
        variable.trainable = False
    for parameter in table.parameters:
        find(model, parameter).trainable = True
    model.lora_config = lora
    forget_compiled(model)


def replace(module: keras.layers.Layer, name: str, layer: keras.layers.Layer) -> None:
    """Put another layer in a layer's place. Keras lets nobody do that once a layer is built, its own LoRA excepted."""
    module._tracker.replace_tracked_value("layers", getattr(module, name), layer)
    setattr(module, name, layer)


def adapted(model: Any, layer: AdaptedLayer) -> LoraLinear:
    """The model's own module of an adapted layer."""
    module, name = outer_place(model, layer)
    return getattr(module, name)


def outer_place(model: Any, layer: AdaptedLayer) -> tuple[Any, str]:
    """The submodule of a model that holds an adapted layer, and the layer's name there."""
    path = layer.module.split(".")
    *modules, name = path[1:] if model.head is None else path
    module = model
    for part in modules:
        module = module[int(part)] if part.isdecimal() else getattr(module, part)
    return module, name


def adapter_linear(matrix: Parameter, base_layer: keras.layers.Dense, *, name: str) -> keras.layers.Dense:
    """A layer for A or B, with zeros for numbers."""
    out_features, in_features = matrix.shape
    half = base_layer.variable_dtype in ("float16", "bfloat16")
    dtype = "float32" if half else base_layer.dtype_policy
    layer = keras.layers.Dense(out_features, use_bias=False, kernel_initializer="zeros", dtype=dtype, name=name)
    layer.build((None, in_features))
    return layer


def start(variable: Any, matrix: Parameter, lora: LoraConfig) -> None:
    """Fill a new A or B as `LoraConfig.init_lora_weights` says."""
    r, bound = matrix.shape[0], adapter_bound(matrix.shape[1])
    if matrix.axes.endswith("R") and lora.init_lora_weights is not False:
        variable.assign(tf.zeros_like(variable.value))
    elif lora.init_lora_weights == "gaussian":
        variable.assign(tf.random.normal(variable.shape, stddev=1 / r, dtype=variable.dtype))
    else:
        variable.assign(tf.random.uniform(variable.shape, -bound, bound, dtype=variable.dtype))


def fill(model: Any, parameter: Parameter, array: np.ndarray) -> None:
    """Give a tensor of the adapter its numbers, in the dtype that the model has there."""
    variable = find(model, parameter)
    variable.assign(to_array(array, parameter, variable.dtype))
