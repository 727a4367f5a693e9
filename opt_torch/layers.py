"""The pieces that the PyTorch model is made of: its activation functions, and its layers with their initial weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from opt_common.config import LAYER_NORM_EPS, OPTConfig
from opt_common.native import Kind
from opt_common.quantization import check_quantization
from opt_torch import native
from opt_torch.native import onednn_product
from opt_torch.quantized import AVAILABLE, Int4Linear, Int8Embedding, Int8Linear, int4_linear

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}

ONEDNN_DTYPES = (torch.float32,) if native.HAS_BFLOAT16 else (torch.float32, torch.bfloat16)
"""Dtypes in which oneDNN's float32 product is faster on a CPU than what PyTorch would call."""


class Embedding(nn.Embedding):
    """A table of embeddings."""

    def reset_parameters(self) -> None:
        """Give it PyTorch's initial numbers, unless it is on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """A linear layer that computes in the fastest way that this machine has, to the same numbers.

    Attributes:
        kind: None, for `product` knows the kind of a matrix by its dtype.
    """

    kind = None

    def reset_parameters(self) -> None:
        """Give it PyTorch's initial numbers, unless it is on the meta device."""
        # There is nothing to fill there, and PyTorch would import its compiler to do so, which takes most of a second.
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, in_features) to outputs (…, out_features)."""
        # Whatever stands in a plain parameter's place brings its own product.
        if type(self.weight) is not nn.Parameter:
            return super().forward(inputs)
        if torch.is_grad_enabled() and suits_onednn(inputs, self.weight):
            return OneDNNProduct.apply(inputs, self.weight, self.bias)
        return product(inputs, self.weight, self.bias)


PARTS: dict[type[nn.Module], tuple[str, ...]] = {
    Linear: ("weight", "bias"),
    Int8Linear: ("codes_FD", "scales_F", "bias"),
    Int4Linear: ("codes", "groups", "bias"),
}
"""What a layer has a row of for each output: its matrix, scales if there are some, and a bias, which may be None."""


class Together:
    """Linear layers of the same inputs with their weights one after the other in memory: one matrix to inference."""

    def __init__(self, *layers: Any) -> None:
        """Move the weights and biases of layers there. Layers of other classes, or of several, stay as they are."""
        self.places: tuple[tuple[int, ...], ...] = ()
        self.layer_class = type(layers[0]) if layers else None
        if self.layer_class not in PARTS or any(not alike(layers[0], layer) for layer in layers):
            return
        self.rows = [layer.out_features for layer in layers]
        self.kind = layers[0].kind
        self.matrix, *self.scales, self.bias = (
            moved_together([getattr(layer, name) for layer in layers]) for name in PARTS[self.layer_class]
        )
        self.places = tuple(map(places_of, layers))

    def __deepcopy__(self, memo: Any) -> "Together":
        # A copied model has copied each matrix by itself.
        return Together()

    def holds(self, *layers: nn.Module) -> bool:
        """Whether layers are still those, in their places, and nobody wants to hear of their calls."""
        return len(self.places) > 0 and all(
            type(layer) is self.layer_class
            and places_of(layer) == place
            and "forward" not in layer.__dict__
            and not layer._forward_hooks
            and not layer._forward_pre_hooks
            for layer, place in zip(layers, self.places, strict=True)
        )

    def __call__(self, inputs: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
        """Inputs (…, in_features) to the outputs of each of the layers."""
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and self.holds(*layers):
            if self.kind is None:
                return product(inputs, self.matrix, self.bias).split(self.rows, dim=-1)
            if native.suits(inputs, self.matrix, self.bias):
                outputs = native.product(self.kind, inputs, self.matrix, *self.scales, bias_F=self.bias)
                return outputs.split(self.rows, dim=-1)
        return [layer(inputs) for layer in layers]


def alike(layer: Any, other: Any) -> bool:
    """Whether layers multiply alike, and all have a bias or none."""
    return type(layer) is type(other) and layer.kind == other.kind and (layer.bias is None) == (other.bias is None)


def places_of(layer: nn.Module) -> tuple[int, ...]:
    """Where the parts of a layer are; 0 for none, and for what is no plain tensor."""
    parts = [getattr(layer, name) for name in PARTS[type(layer)]]
    return tuple(part.data_ptr() if type(part) in (nn.Parameter, Tensor) else 0 for part in parts)


def moved_together(parts: Sequence[Any]) -> Any:
    """A tensor of the rows of all parts, which from now on are parts of it; None for parts that are None."""
    if parts[0] is None:
        return None
    rows = torch.cat([part.data for part in parts])
    for old, new in zip(parts, rows.split(list(map(len, parts))), strict=True):
        old.data = new
    return rows


def suits_onednn(inputs: Tensor, weight_FD: Tensor) -> bool:
    """Whether oneDNN is to multiply in float32, on a CPU: PyTorch itself would call MKL, which is slower."""
    return (
        native.HAS_ONEDNN
        and inputs.dtype in ONEDNN_DTYPES
        and inputs.device.type == "cpu"
        and weight_FD.dtype is inputs.dtype
        and not torch.is_autocast_enabled("cpu")
        and not native.watched()
    )


def product(inputs: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Inputs (…, D) times the transposed weight, and the bias, where no gradients are wanted of oneDNN."""
    if native.suits(inputs, weight_FD, bias_F):
        kind = Kind.FLOAT32_ROWS if weight_FD.dtype is torch.float32 else Kind.BFLOAT16_ROWS
        return native.product(kind, inputs, weight_FD, bias_F=bias_F)
    multiply = onednn_product if suits_onednn(inputs, weight_FD) else functional.linear
    return multiply(inputs, weight_FD, bias_F)


class OneDNNProduct(torch.autograd.Function):
    """`onednn_product` where gradients are wanted."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        """The product."""
        ctx.save_for_backward(inputs, weight_FD)
        return onednn_product(inputs, weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of inputs, weight and bias."""
        inputs, weight_FD = ctx.saved_tensors
        slopes_MF = gradients[0].reshape(-1, len(weight_FD))
        input_slopes = weight_slope_FD = bias_slope_F = None
        if ctx.needs_input_grad[0]:
            input_slopes = onednn_product(slopes_MF, weight_FD.T).view_as(inputs)
        if ctx.needs_input_grad[1]:
            weight_slope_FD = onednn_product(slopes_MF.T, inputs.reshape(-1, inputs.shape[-1]).T)
        if ctx.needs_input_grad[2]:
            bias_slope_F = slopes_MF.sum(0)
        return input_slopes, weight_slope_FD, bias_slope_F


class Builder:
    """Makes the layers of one model: same dtype, same device, same initial weights.

    New weights are normal with deviation `init_std`; biases and the pad row zero; layer norms the identity.
    """

    def __init__(self, config: OPTConfig, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        self.dtype = dtype
        self.device = device
        self.quantization = config.quantization
        check_quantization(config, AVAILABLE)
        self.init_std = config.init_std

    def normal(self, weight: Tensor) -> None:
        """Fill a new weight, unless it is on the meta device."""
        if not weight.is_meta:
            nn.init.normal_(weight, std=self.init_std)

    def linear(self, in_features: int, out_features: int, *, use_bias: bool) -> nn.Module:
        """A linear layer. In few bits it starts as zeros."""
        placing: dict[str, Any] = {"use_bias": use_bias, "device": self.device, "dtype": self.dtype}
        if self.quantization == "int4":
            return int4_linear(in_features, out_features, **placing)
        if self.quantization is not None:
            return Int8Linear(in_features, out_features, dynamic=self.quantization == "int8-dynamic", **placing)
        layer = Linear(in_features, out_features, bias=use_bias, device=self.device, dtype=self.dtype)
        self.normal(layer.weight)
        if use_bias:
            nn.init.zeros_(layer.bias)
        return layer

    def embedding(self, rows: int, features: int, *, pad: int | None = None) -> nn.Embedding:
        """A table of embeddings; row `pad` starts as zeros and gets no gradient from look-ups."""
        layer = Embedding(rows, features, padding_idx=pad, device=self.device, dtype=self.dtype)
        self.normal(layer.weight)
        if pad is not None:
            nn.init.zeros_(layer.weight[pad])
        return layer

    def vocabulary(self, rows: int, features: int, *, pad: int | None = None) -> nn.Embedding | Int8Embedding:
        """A table of the vocabulary's embeddings. In few bits, which are 8 at least, it starts as zeros."""
        if self.quantization is None:
            return self.embedding(rows, features, pad=pad)
        dynamic = self.quantization == "int8-dynamic"
        return Int8Embedding(rows, features, dynamic=dynamic, device=self.device, dtype=self.dtype)

    def head(self, in_features: int, out_features: int) -> Any:
        """A linear layer onto the vocabulary, in as many bits as its table."""
        table = self.vocabulary(out_features, in_features)
        if isinstance(table, Int8Embedding):
            return table.head()
        return self.linear(in_features, out_features, use_bias=False)

    def layer_norm(self, features: int, *, affine: bool) -> nn.LayerNorm:
        """A layer norm."""
        return nn.LayerNorm(
            features, eps=LAYER_NORM_EPS, elementwise_affine=affine, device=self.device, dtype=self.dtype
        )

    def dropout(self, rate: float) -> nn.Dropout:
        """A dropout layer."""
        return nn.Dropout(rate)
