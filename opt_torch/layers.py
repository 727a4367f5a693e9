"""The pieces that the PyTorch model is made of: its activation functions, and its layers with their initial weights."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from opt_common.config import LAYER_NORM_EPS, OPTConfig
from opt_common.quantization import check_quantization
from opt_torch.quantized import AVAILABLE, Int4Linear, Int8Embedding, Int8Linear

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

# An operator without a promise: where a version of PyTorch lacks it, its own product serves.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """A linear layer that computes in the fastest way that this machine has, to the same numbers."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (…, in_features) to outputs (…, out_features)."""
        if self.suits_onednn(inputs):
            return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return super().forward(inputs)

    def suits_onednn(self, inputs: Tensor) -> bool:
        """Whether oneDNN is to multiply: float32 on a CPU, where PyTorch itself would call MKL.

        From 2 to 4 rows MKL is the faster one, for one row or many it is not. The operator has no gradients.
        """
        rows = inputs.numel() // self.in_features
        return (
            HAS_ONEDNN
            and inputs.dtype is torch.float32
            and inputs.device.type == "cpu"
            and (rows == 1 or rows > 4)
            # Whatever stands in a plain parameter's place brings its own product.
            and type(self.weight) is nn.Parameter
            and self.weight.dtype is torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class Builder:
    """Makes the layers of one model: same dtype, same device, same initial weights.

    New weights are normal with deviation `init_std`; biases and the pad row zero; layer norms the identity.
    """

    def __init__(self, config: OPTConfig, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        self.dtype = dtype
        self.device = device
        self.quantization = config.quantization
        check_quantization(config, AVAILABLE)
        self.normal = functools.partial(nn.init.normal_, std=config.init_std)

    def linear(self, in_features: int, out_features: int, *, use_bias: bool) -> nn.Module:
        """A linear layer. In few bits it starts as zeros."""
        placing: dict[str, Any] = {"use_bias": use_bias, "device": self.device, "dtype": self.dtype}
        if self.quantization == "int4":
            return Int4Linear(in_features, out_features, **placing)
        if self.quantization is not None:
            return Int8Linear(in_features, out_features, dynamic=self.quantization == "int8-dynamic", **placing)
        layer = Linear(in_features, out_features, bias=use_bias, device=self.device, dtype=self.dtype)
        self.normal(layer.weight)
        if use_bias:
            nn.init.zeros_(layer.bias)
        return layer

    def embedding(self, rows: int, features: int, *, pad: int | None = None) -> nn.Embedding:
        """A table of embeddings; row `pad` starts as zeros and gets no gradient from look-ups."""
        layer = nn.Embedding(rows, features, padding_idx=pad, device=self.device, dtype=self.dtype)
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
