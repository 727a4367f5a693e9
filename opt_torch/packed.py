"""Matrices in the order that oneDNN reads, for models that only infer on a CPU.

model = OPTForCausalLM.from_pretrained("facebook/opt-1.3b", dtype=torch.bfloat16)
pack(model)
model.generate(...)

Of a matrix as PyTorch has it, oneDNN brings the numbers into an order of its own in every call. For many tokens at a
time that hardly counts; where they are few, it takes as long as the product itself.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from opt_common.lora import check_no_adapter
from opt_common.params import head_of, parameter_table
from opt_torch import native
from opt_torch.layers import Linear


def pack(model: Any) -> None:
    """Replace a model's linear layers by packed ones, one at a time. Layers that would gain nothing stay.

    Packed are matrices in float32 and bfloat16 on a CPU. From then on the model is for inference: no parameter asks for
    a gradient. It computes, saves, and takes an adapter, which trains; whatever needs a matrix itself unpacks it each
    time. A head that is the token table is packed beside it, for rows of a packed table can't be looked up.

    Args:
        model: a model of this package without an adapter.

    Raises:
        ConfigError: if the model has an adapter.
    """
    check_no_adapter(model.lora_config)
    model.requires_grad_(False)
    paths = [
        row.path("torch")[1 if model.head is None else 0 : -1]
        for row in parameter_table(model.config, head=model.head)
        if row.kind == "linear.weight" and head_of(row.name) is None
    ]
    for *modules, name in [*paths, ("lm_head",)] if model.head == "lm" else paths:
        module = model.get_submodule(".".join(modules))
        layer = getattr(module, name)
        if type(layer) is Linear and gains(layer.weight):
            setattr(module, name, PackedLinear(layer).train(layer.training))


def gains(weight_FD: Tensor) -> bool:
    """Whether oneDNN multiplies by such a matrix and has an order of its own for it."""
    if not native.HAS_ONEDNN or weight_FD.device.type != "cpu":
        return False
    return weight_FD.dtype is torch.float32 or (weight_FD.dtype is torch.bfloat16 and native.HAS_BFLOAT16)


class PackedLinear(nn.Module):
    """A linear layer for inference. To what moves, copies, saves or loads it, it is a linear layer like any other.

    Attributes:
        matrix: the weight in oneDNN's order, or in rows where that would gain nothing, such as on a GPU.
        bias: (F,) or None.
    """

    matrix: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: Linear) -> None:
        """Take the place of a layer."""
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.matrix = in_order(layer.weight.detach())
        self.register_parameter("bias", layer.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, D) to outputs (…, F)."""
        if torch.compiler.is_compiling():
            return outside_of_graphs(self, inputs)  # pyright: ignore[reportCallIssue]
        inputs = inputs.to(self.matrix.dtype)
        if not self.matrix.is_mkldnn or (torch.is_grad_enabled() and inputs.requires_grad):
            return functional.linear(inputs, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(inputs, self.matrix, self.bias, "none", [], "")

    @property
    def weight(self) -> Tensor:
        """The matrix in rows, (F, D), made anew each time."""
        return self.matrix.to_dense(self.matrix.dtype) if self.matrix.is_mkldnn else self.matrix

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.matrix = in_order(fn(self.weight))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        *_, missing_keys, _, error_msgs = arguments
        name, weight_FD = f"{prefix}weight", self.weight
        others = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(others, prefix, *arguments)
        new_FD = state_dict.get(name)
        if new_FD is None:
            missing_keys.append(name)
        elif new_FD.shape != weight_FD.shape:
            error_msgs.append(f"{name} has the shape {tuple(new_FD.shape)}, expected {tuple(weight_FD.shape)}.")
        else:
            self.matrix = in_order(new_FD.to(weight_FD, copy=True))

    def __getstate__(self) -> dict[str, Any]:
        # What oneDNN has ordered can be neither copied nor pickled.
        return {**self.__dict__, "matrix": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.matrix = in_order(self.matrix)


def in_order(weight_FD: Tensor) -> Tensor:
    """A matrix in oneDNN's order, or in rows where that would gain nothing."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_FD) if gains(weight_FD) else weight_FD


# As torch.compiler.disable, which would import the compiler, and with it most of a second, for everybody.
@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def outside_of_graphs(layer: PackedLinear, inputs: Tensor) -> Tensor:
    """A layer's outputs, computed where a compiler does not look: it knows no matrix in oneDNN's order."""
    return layer(inputs)
