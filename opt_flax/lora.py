"""LoRA adapters on Flax models; the rules and names are in `opt_common.lora`, PEFT's files in `conversion.adapter`.

model.add_lora(LoraConfig(r=8))       # then train: only the adapter does
model.save_adapter("my-adapter")      # loads in PEFT, and in the other two frameworks
model.load_adapter("my-adapter")
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

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
from opt_flax.checkpoint import find, local_place, to_array, to_numpy


class LoraLinear(nnx.Module):
    """A linear layer with an adapter: `base_layer(x) + scaling * lora_B(lora_A(lora_dropout(x)))`.

    A and B are in float32 at least, whatever the base layer is in. While merged, the base layer computes it all.
    """

    def __init__(self, base_layer: nnx.Linear, layer: AdaptedLayer, lora: LoraConfig, rngs: nnx.Rngs) -> None:
        a, b = layer.matrices
        self.base_layer = base_layer
        self.scaling = layer.scaling
        self.lora_dropout = nnx.Dropout(lora.lora_dropout, rngs=rngs)
        self.lora_A = adapter_linear(a, base_layer)
        self.lora_B = adapter_linear(b, base_layer)
        self.unmerged: nnx.Variable[Array] | None = nnx.data(None)

    @property
    def kernel(self) -> Any:
        """The base layer's kernel."""
        return self.base_layer.kernel

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.base_layer.bias

    def __call__(self, x: Array) -> Array:
        """The layer's output for x (…, in), (…, out), in the base layer's dtype."""
        base = self.base_layer(x)
        if self.unmerged is not None:
            return base
        adapted = self.lora_B(self.lora_A(self.lora_dropout(x)))
        return (base + self.scaling * adapted).astype(base.dtype)

    def merge(self) -> None:
        """Add the adapter to the base kernel, which is kept aside."""
        a, b = self.lora_A.kernel[...], self.lora_B.kernel[...]
        change = self.scaling * (a @ b)
        self.unmerged = nnx.Variable(self.kernel[...])
        self.kernel[...] = (self.kernel[...].astype(change.dtype) + change).astype(self.kernel.dtype)

    def unmerge(self) -> None:
        """Put the base kernel back, bit for bit."""
        assert self.unmerged is not None
        self.kernel[...] = self.unmerged[...]
        self.unmerged = nnx.data(None)


class Adaptable:
    """What every model class can do with adapters. A model has one at most."""

    config: OPTConfig
    head: Head | None
    lora_config: LoraConfig | None = None
    lora_merged: bool = False

    def add_lora(self, lora: LoraConfig, *, rngs: nnx.Rngs | None = None) -> None:
        """Give the model a new adapter. What trains from then on are the variables of type `nnx.LoRAParam`.

        Args:
            lora: which layers, how strong.
            rngs: source of A's and of dropout's random numbers; None means `nnx.Rngs(0)`.

        Raises:
            ConfigError: if the model has an adapter, or `lora` does not fit it.
        """
        check_no_adapter(self.lora_config)
        lora = resolve_lora(self.config, lora, self.head)
        table = adapter_table(self.config, lora, self.head)
        rngs = rngs or nnx.Rngs(0)
        wrap(self, lora, table, rngs)
        for layer in table.layers:
            for parameter in layer.matrices:
                start(find(self, parameter), parameter, lora, rngs)

    def load_adapter(self, directory: str | os.PathLike[str], *, rngs: nnx.Rngs | None = None) -> None:
        """Give the model an adapter that any of the three backends or PEFT saved; it may train on.

        Args:
            directory: holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
            rngs: source of dropout's random numbers, should it be trained; None means `nnx.Rngs(0)`.

        Raises:
            ConfigError: if the model has an adapter, or the file asks for what is not supported.
            CheckpointError: if the adapter is absent, damaged, or does not fit the model.
        """
        check_no_adapter(self.lora_config)
        with open_adapter(directory) as adapter:
            table, names = checked_adapter(adapter, self.config, self.head)
            wrap(self, adapter.lora, table, rngs or nnx.Rngs(0))
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
        save_adapter(directory, lora, table, lambda parameter: to_numpy(find(self, parameter)[...], parameter))

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

    def merge_and_unload(self) -> None:
        """Merge the adapter for good: what is left is a plain model, all of which trains.

        Raises:
            ConfigError: as for `merge_adapter`.
        """
        self.merge_adapter()
        lora = check_adapter(self.lora_config)
        table = adapter_table(self.config, lora, self.head)
        for layer in table.layers:
            module, name = outer_place(self, layer)
            setattr(module, name, getattr(module, name).base_layer)
        self.lora_config, self.lora_merged = None, False
        for parameter in table.others:
            retype(self, parameter, nnx.Param)


def wrap(model: Any, lora: LoraConfig, table: AdapterTable, rngs: nnx.Rngs) -> None:
    """Put an adapter around each of a model's adapted layers, and let nothing else train."""
    for layer in table.layers:
        module, name = outer_place(model, layer)
        setattr(module, name, LoraLinear(getattr(module, name), layer, lora, rngs))
    for parameter in table.parameters:
        retype(model, parameter, nnx.LoRAParam)
    model.lora_config = lora
    (model.train if model.training else model.eval)()


def retype(model: Any, parameter: Parameter, kind: type[nnx.Param[Array]]) -> None:
    """Give a model's variable another type: by its type, a filter knows what trains."""
    module, leaf = local_place(model, parameter)
    module = module.base_layer if isinstance(module, LoraLinear) else module
    setattr(module, leaf, kind(getattr(module, leaf)[...]))


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


def adapter_linear(matrix: Parameter, base_layer: nnx.Linear) -> nnx.Linear:
    """A layer for A or B, with zeros for numbers."""
    out_features, in_features = matrix.shape
    half = jnp.dtype(base_layer.param_dtype).itemsize == 2
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=False,
        kernel_init=nnx.initializers.zeros,
        dtype=jnp.float32 if half else base_layer.dtype,
        param_dtype=jnp.float32 if half else base_layer.param_dtype,
        rngs=nnx.Rngs(0),
    )


def start(variable: nnx.Param[Array], matrix: Parameter, lora: LoraConfig, rngs: nnx.Rngs) -> None:
    """Fill a new A or B as `LoraConfig.init_lora_weights` says."""
    r, bound = matrix.shape[0], adapter_bound(matrix.shape[1])
    if matrix.axes.endswith("R") and lora.init_lora_weights is not False:
        variable[...] = jnp.zeros_like(variable[...])
    elif lora.init_lora_weights == "gaussian":
        variable[...] = jax.random.normal(rngs.params(), variable.shape, variable.dtype) / r
    else:
        variable[...] = jax.random.uniform(rngs.params(), variable.shape, variable.dtype, -bound, bound)


def fill(model: Any, parameter: Parameter, array: np.ndarray) -> None:
    """Give a tensor of the adapter its numbers, in the dtype that the model has there."""
    variable = find(model, parameter)
    variable[...] = to_array(array, parameter, variable.dtype)
