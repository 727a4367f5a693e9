"""The pieces that the PyTorch model is made of: its activation functions, and its layers with their initial weights."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from opt_common.config import LAYER_NORM_EPS, OPTConfig

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


class Builder:
    """Makes the layers of one model: same dtype, same device, same initial weights.

    New weights are normal with deviation `init_std`; biases and the pad row zero; layer norms the identity.
    """

    def __init__(self, config: OPTConfig, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        self.dtype = dtype
        self.device = device
        self.normal = functools.partial(nn.init.normal_, std=config.init_std)

    def linear(self, in_features: int, out_features: int, *, use_bias: bool) -> nn.Linear:
        """A linear layer."""
        layer = nn.Linear(in_features, out_features, bias=use_bias, device=self.device, dtype=self.dtype)
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

    def layer_norm(self, features: int, *, affine: bool) -> nn.LayerNorm:
        """A layer norm."""
        return nn.LayerNorm(
            features, eps=LAYER_NORM_EPS, elementwise_affine=affine, device=self.device, dtype=self.dtype
        )

    def dropout(self, rate: float) -> nn.Dropout:
        """A dropout layer."""
        return nn.Dropout(rate)
