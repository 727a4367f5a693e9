"""What training needs beside the model: the language model's loss, and gradient checkpointing.

Axis letters: B batch, T length, E word_embed_proj_dim, V vocabulary, X = B·(T - 1) scored positions,
C of them at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from opt_common.errors import InputError
from opt_common.params import Head
from opt_common.reference import IGNORED_LABEL
from opt_torch.attention import Masking
from opt_torch.layers import Linear, product

CHUNK_LOGITS = 2**25
"""Logits that the loss holds at a time, twice as many in half precision: 128 MiB, where a batch of 8 × 512 tokens has
785 MiB of them in float32."""

BLOCK_LOGITS = 2**20
"""Logits whose losses a processor computes at a time: few enough to stay in its cache."""


class Trainable:
    """What every model class can do for training."""

    head: ClassVar[Head | None]
    supports_gradient_checkpointing: ClassVar[bool] = True

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only each layer's input for the backward pass, and compute the rest again there.

        In training this trades about a third more time for most of the memory of activations; outputs, dropout and
        gradients stay the same. A call with a cache keeps everything.

        Args:
            gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`.
            every_n_layers: 2 does so in every second layer, and so on.
            offload: must be False; `transformers.Trainer` passes it.

        Raises:
            InputError: if `offload` is true.
        """
        if offload:
            raise InputError("offload=True is not supported. Leave it out, or wrap the step in save_on_cpu of PyTorch.")
        decoder = decoder_of(self)
        decoder.checkpoint_every = every_n_layers
        decoder.checkpoint_options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` by its newer name in `transformers`."""
        self.gradient_checkpointing_enable(
            activation_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything for the backward pass, as a new model does."""
        decoder_of(self).checkpoint_every = 0

    @property
    def loss_type(self) -> str | None:
        """What `transformers.Trainer` asks: whether labels are shifted inside, so that a row's first is not counted."""
        return "ForCausalLM" if self.head == "lm" else None

    @property
    def accepts_loss_kwargs(self) -> bool:
        """What `transformers.Trainer` asks: whether `num_items_in_batch` is taken, so that it need not average."""
        return self.head == "lm"

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return decoder_of(self).checkpoint_every > 0


def decoder_of(model: Any) -> Any:
    """The decoder inside a model of any class."""
    return model.decoder if model.head is None else model.model.decoder


def leave_out_tied_head(model: Any, tensors: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dict has a tied table once: `safetensors`, and with it `transformers.Trainer`, refuse it twice."""
    if model.config.tie_word_embeddings:
        tensors.pop(f"{prefix}lm_head.weight", None)


def put_back_tied_head(model: Any, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """What `load_state_dict` needs in order to take state dicts with and without the tied head."""
    table = f"{prefix}model.decoder.embed_tokens.weight"
    if model.config.tie_word_embeddings and table in tensors:
        tensors.setdefault(f"{prefix}lm_head.weight", tensors[table])


def run_again(
    layer: Any, hidden_BTD: Tensor, masking: Masking, output_attentions: bool, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """A layer's output and attention probabilities, of which only the input is kept for the backward pass."""

    def run(hidden_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_BTD, _, probs_BNTS = layer(hidden_BTD, masking, None, 0, output_attentions)
        return hidden_BTD, probs_BNTS

    return checkpoint(run, hidden_BTD, **options)


def causal_lm_loss(
    head: Callable[[Tensor], Tensor],
    hidden_BTE: Tensor,
    labels_BT: Tensor,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of label t + 1 under the logits at t, in float32 at least; NaN if no label counts.

    The logits are computed `CHUNK_LOGITS` at a time, at positions that count. Where gradients are wanted and the head
    is but a matrix, they are computed along with the loss; otherwise the logits are computed again in the backward
    pass, unless one time was all of them.

    Args:
        head: hidden states (C, E) to logits (C, V).
        hidden_BTE: what the logits are computed from.
        labels_BT: ids; -100 does not count.
        vocab_size: V.
        num_items_in_batch: what the sum over labels is divided by; None means the number of labels that count.
    """
    hidden_XE = hidden_BTE[:, :-1].flatten(0, 1)
    labels_X = labels_BT[:, 1:].to(hidden_XE.device, torch.long).flatten()
    counted_X = labels_X != IGNORED_LABEL
    count = counted_X.sum() if num_items_in_batch is None else num_items_in_batch
    rows = max(1, CHUNK_LOGITS // vocab_size)

    def chunk_loss(hidden_CE: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = head(hidden_CE)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        return functional.cross_entropy(logits_CV, labels_C, ignore_index=IGNORED_LABEL, reduction="sum")

    if is_matrix(head):
        places_X = counted_X.nonzero()[:, 0]
        total = SummedLosses.apply(hidden_XE.index_select(0, places_X), head.weight, labels_X[places_X], rows)
    else:
        chunks = list(zip(hidden_XE.split(rows), labels_X.split(rows), strict=True))
        if len(chunks) == 1:
            total = chunk_loss(*chunks[0])
        else:
            total = torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def is_matrix(head: Any) -> bool:
    """Whether a head is a product with a trained matrix that nobody watches or traces, and gradients are wanted."""
    return (
        type(head) is Linear
        and type(head.weight) is nn.Parameter
        and head.weight.requires_grad
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


class SummedLosses(torch.autograd.Function):
    """The sum of the losses of a head that is a matrix. The slopes are computed along with it, from the same logits."""

    @staticmethod
    def forward(ctx: Any, hidden_XE: Tensor, weight_VE: Tensor, labels_X: Tensor, rows: int) -> Tensor:
        """The sum, in float32 at least."""
        device = hidden_XE.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_XE.dtype
        total = hidden_XE.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        hidden_slopes_XE, weight_slope_VE = torch.empty_like(hidden_XE), None
        # Chunks of one size, and few: each of them costs a pass over the matrix's slope.
        chunks = max(1, -(-len(hidden_XE) // (rows * 2 if dtype.itemsize == 2 else rows)))
        with torch.autocast(device, enabled=False):
            matrix_VE = weight_VE.detach().to(dtype)
            parts = [tensor.tensor_split(chunks) for tensor in (hidden_XE, labels_X[:, None], hidden_slopes_XE)]
            for part_CE, labels_C1, hidden_slopes_CE in zip(*parts, strict=True):
                hidden_CE = part_CE.to(dtype)
                slopes_CV = product(hidden_CE, matrix_VE)
                block = max(1, BLOCK_LOGITS // len(weight_VE) if device == "cpu" else len(slopes_CV))
                for block_CV, block_C1 in zip(slopes_CV.split(block), labels_C1.split(block), strict=True):
                    total += turn_into_slopes(block_CV, block_C1)
                hidden_slopes_CE.copy_(product(slopes_CV, matrix_VE.T))
                more_VE = product(slopes_CV.T, hidden_CE.T)
                weight_slope_VE = (
                    more_VE.to(weight_VE.dtype) if weight_slope_VE is None else weight_slope_VE.add_(more_VE)
                )
        ctx.save_for_backward(hidden_slopes_XE, weight_slope_VE)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradients of hidden states and matrix."""
        hidden_slopes_XE, weight_slope_VE = ctx.saved_tensors
        return hidden_slopes_XE * gradients[0], weight_slope_VE * gradients[0], None, None


def turn_into_slopes(logits_CV: Tensor, labels_C1: Tensor) -> Tensor:
    """The sum of the losses, in float32 at least; slopes replace the logits: probabilities, less one at the label."""
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    probs_CV = torch.softmax(wide_CV, -1)
    # The largest logit's probability is one over the sum of exponentials: never 0, unlike the label's.
    log_sums_C = wide_CV.amax(-1) - probs_CV.amax(-1).log()
    total = (log_sums_C - wide_CV.gather(-1, labels_C1)[:, 0]).sum()
    logits_CV.copy_(probs_CV.scatter_add_(-1, labels_C1, probs_CV.new_full((), -1).expand_as(labels_C1)))
    return total
