"""LoRA adapters on PyTorch models; the rules and names are in `opt_common.lora`, PEFT's files in `conversion.adapter`.

model.add_lora(LoraConfig(r=8))       # then train: only the adapter does
model.save_adapter("my-adapter")      # loads in PEFT, and in the other two frameworks
model.load_adapter("my-adapter")
"""

import os
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from conversion.adapter import checked_adapter, open_adapter, save_adapter
from opt_common.config import OPTConfig
from opt_common.errors import ConfigError
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
from opt_torch.checkpoint import find, to_numpy, to_tensor


class LoraLinear(nn.Module):
    """A linear layer with an adapter: `base_layer(x) + scaling * lora_B(lora_A(lora_dropout(x)))`.

    A and B are in float32 at least, whatever the base layer is in. While merged, the base layer computes it all.
    """

    def __init__(self, base_layer: nn.Module, layer: AdaptedLayer, lora: LoraConfig) -> None:
        super().__init__()
        a, b = layer.matrices
        self.base_layer = base_layer
        self.scaling = layer.scaling
        self.lora_dropout = nn.Dropout(lora.lora_dropout)
        self.lora_A = adapter_linear(a, base_layer)
        self.lora_B = adapter_linear(b, base_layer)
        self.register_buffer("unmerged", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast(Tensor | None, self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x (…, in), (…, out), in the base layer's dtype."""
        base = self.base_layer(x)
        if self.unmerged is not None:
            return base
        adapted = self.lora_B(self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype))))
        return (base + self.scaling * adapted).to(base.dtype)

    def merge(self) -> None:
        """Add the adapter to the base weight, which is kept aside."""
        # A matrix that is made anew each time would take the sum and forget it.
        if not isinstance(self.weight, nn.Parameter) or not self.weight.dtype.is_floating_point:
            raise ConfigError(
                "Quantised or packed base weights can't take an adapter. Merge it into the base model as it was loaded."
            )
        with torch.no_grad():
            a, b = self.lora_A.weight, self.lora_B.weight
            change = self.scaling * (b @ a)
            self.unmerged = self.weight.detach().clone()
            self.weight.copy_(self.weight.to(change.dtype) + change)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        with torch.no_grad():
            self.weight.copy_(cast(Tensor, self.unmerged))
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
        save_adapter(directory, lora, table, lambda parameter: to_numpy(find(self, parameter)))

    def merge_adapter(self) -> None:
        """Add the adapter to the base weights: the same function, as fast as without it. It can be undone.

        Raises:
            ConfigError: if the model has no adapter, or its base weights are quantised.
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
        for layer in adapter_table(self.config, lora, self.head).layers:
            module, name = outer_place(self, layer)
            setattr(module, name, getattr(module, name).base_layer)
        self.lora_config, self.lora_merged = None, False
        cast(nn.Module, self).requires_grad_(True)


def wrap(model: Any, lora: LoraConfig, table: AdapterTable) -> None:
    """Put an adapter around each of a model's adapted layers, and let nothing else train."""
    for layer in table.layers:
        module, name = outer_place(model, layer)
        setattr(module, name, LoraLinear(getattr(module, name), layer, lora).train(model.training))
    model.requires_grad_(False)
    for parameter in table.parameters:
        find(model, parameter).requires_grad_(True)
    model.lora_config = lora


def adapted(model: Any, layer: AdaptedLayer) -> LoraLinear:
    """The model's own module of an adapted layer."""
    module, name = outer_place(model, layer)
    return getattr(module, name)


def outer_place(model: Any, layer: AdaptedLayer) -> tuple[Any, str]:
    """The submodule of a model that holds an adapted layer, and the layer's name there."""
    path = layer.module.split(".")
    *modules, name = path[1:] if model.head is None else path
    return model.get_submodule(".".join(modules)), name


def adapter_linear(matrix: Parameter, base_layer: Any) -> nn.Linear:
    """A layer for A or B, beside its base layer, without numbers yet."""
    out_features, in_features = matrix.shape
    like = base_layer.weight
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    layer = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
    return layer.to_empty(device=like.device)


def start(variable: nn.Parameter, matrix: Parameter, lora: LoraConfig) -> None:
    """Fill a new A or B as `LoraConfig.init_lora_weights` says."""
    r, bound = matrix.shape[0], adapter_bound(matrix.shape[1])
    if matrix.axes.endswith("R") and lora.init_lora_weights is not False:
        nn.init.zeros_(variable)
    elif lora.init_lora_weights == "gaussian":
        nn.init.normal_(variable, std=1 / r)
    else:
        nn.init.uniform_(variable, -bound, bound)


def fill(model: Any, parameter: Parameter, array: np.ndarray) -> None:
    """Give a tensor of the adapter its numbers, in the dtype that the model has there."""
    with torch.no_grad():
        find(model, parameter).copy_(to_tensor(array))
