"""What training needs beside the model: the language model's loss, and gradient checkpointing.

Axis letters: B batch, T length, E word_embed_proj_dim, V vocabulary, X = B·(T - 1) scored positions,
C of them at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from opt_common.errors import InputError
from opt_common.params import Head
from opt_common.reference import IGNORED_LABEL
from opt_torch.attention import Masking

CHUNK_LOGITS = 2**24
"""Logits that the loss holds at a time: 64 MiB in float32, where a batch of 8 × 512 tokens has 785 MiB of them."""


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

    The logits are computed `CHUNK_LOGITS` at a time and, where that is not all of them, again in the backward pass.

    Args:
        head: hidden states (C, E) to logits (C, V).
        hidden_BTE: what the logits are computed from.
        labels_BT: ids; -100 does not count.
        vocab_size: V.
        num_items_in_batch: what the sum over labels is divided by; None means the number of labels that count.
    """
    hidden_XE = hidden_BTE[:, :-1].flatten(0, 1)
    labels_X = labels_BT[:, 1:].to(hidden_XE.device, torch.long).flatten()
    rows = max(1, CHUNK_LOGITS // vocab_size)

    def chunk_loss(hidden_CE: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = head(hidden_CE)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        return functional.cross_entropy(logits_CV, labels_C, ignore_index=IGNORED_LABEL, reduction="sum")

    chunks = list(zip(hidden_XE.split(rows), labels_X.split(rows), strict=True))
    if len(chunks) == 1:
        total = chunk_loss(*chunks[0])
    else:
        total = torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    count = (labels_X != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
