"""What training needs beside the model: the language model's loss, and gradient checkpointing.

Axis letters: B batch, T length, E word_embed_proj_dim, V vocabulary, X = B·(T - 1) scored positions,
C of them at a time in each of K chunks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from opt_common.params import Head
from opt_common.reference import IGNORED_LABEL
from opt_flax.attention import Masking

CHUNK_LOGITS = 2**24
"""Logits that the loss holds at a time: 64 MiB in float32, where a batch of 8 × 512 tokens has 785 MiB of them."""


class Trainable:
    """What every model class can do for training."""

    head: ClassVar[Head | None]
    supports_gradient_checkpointing: ClassVar[bool] = True

    def gradient_checkpointing_enable(self, *, every_n_layers: int = 1) -> None:
        """Keep only each layer's input for the backward pass, and compute the rest again there.

        In training this trades about a third more time for most of the memory of activations; outputs, dropout and
        gradients stay the same. A call with a cache keeps everything.

        Args:
            every_n_layers: 2 does so in every second layer, and so on.
        """
        decoder_of(self).checkpoint_every = every_n_layers

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything for the backward pass, as a new model does."""
        decoder_of(self).checkpoint_every = 0

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return decoder_of(self).checkpoint_every > 0


def decoder_of(model: Any) -> Any:
    """The decoder inside a model of any class."""
    return model.decoder if model.head is None else model.model.decoder


def run_again(layer: Any, hidden_BTD: Array, masking: Masking, output_attentions: bool) -> tuple[Array, Array | None]:
    """A layer's output and attention probabilities, of which only the input is kept for the backward pass."""

    @nnx.remat
    def run(layer: Any, hidden_BTD: Array, bias_BNTS: Array | None) -> tuple[Array, Array | None]:
        hidden_BTD, _, probs_BNTS = layer(hidden_BTD, Masking(bias_BNTS), None, 0, output_attentions)
        return hidden_BTD, probs_BNTS

    return run(layer, hidden_BTD, masking.bias_BNTS)


def causal_lm_loss(
    head: Callable[[Array], Array],
    hidden_BTE: Array,
    labels_BT: Array,
    vocab_size: int,
    num_items_in_batch: int | Array | None = None,
) -> Array:
    """Cross-entropy of label t + 1 under the logits at t, in float32 at least; NaN if no label counts.

    The logits are computed `CHUNK_LOGITS` at a time; where that is not all of them, gradients along with the loss,
    which then has no forward-mode derivative.

    Args:
        head: hidden states (C, E) to logits (C, V).
        hidden_BTE: what the logits are computed from.
        labels_BT: ids; -100 does not count.
        vocab_size: V.
        num_items_in_batch: what the sum over labels is divided by; None means the number of labels that count.
    """
    hidden_XE = hidden_BTE[:, :-1].reshape(-1, hidden_BTE.shape[-1])
    labels_X = labels_BT[:, 1:].reshape(-1)
    rows = max(1, CHUNK_LOGITS // vocab_size)

    def chunk_loss(hidden_CE: Array, labels_C: Array) -> Array:
        logits_CV = head(hidden_CE)
        logits_CV = logits_CV.astype(jnp.promote_types(logits_CV.dtype, jnp.float32))
        counted_C = labels_C != IGNORED_LABEL
        picked_C = jnp.take_along_axis(logits_CV, jnp.where(counted_C, labels_C, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(counted_C, jax.nn.logsumexp(logits_CV, axis=-1) - picked_C, 0).sum()

    K = -(-hidden_XE.shape[0] // rows)
    if K <= 1:
        total = chunk_loss(hidden_XE, labels_X)
    else:
        missing = K * rows - hidden_XE.shape[0]
        hidden_KCE = jnp.pad(hidden_XE, ((0, missing), (0, 0))).reshape(K, rows, -1)
        labels_KC = jnp.pad(labels_X, (0, missing), constant_values=IGNORED_LABEL).reshape(K, rows)
        # The head's weights, which the loss closes over, become arguments: it has gradients with respect to them, too.
        loss, weights = jax.closure_convert(chunk_loss, hidden_KCE[0], labels_KC[0])
        total = cast(Array, _summed_losses(loss, hidden_KCE, labels_KC, weights))
    count = (labels_X != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_losses(loss: Callable[..., Array], hidden_KCE: Array, labels_KC: Array, weights: Sequence[Array]) -> Array:
    """The sum of the losses, chunk after chunk, with slopes that are computed along with it, from the same logits."""
    return lax.map(lambda chunk: loss(*chunk, *weights), (hidden_KCE, labels_KC)).sum()


def _losses_and_slopes(
    loss: Callable[..., Array], hidden_KCE: Array, labels_KC: Array, weights: Sequence[Array]
) -> tuple[Array, Any]:
    """The sum, and its slopes with respect to hidden states and weights."""

    def add(weight_slopes: Any, chunk: tuple[Array, Array]) -> tuple[Any, tuple[Array, Array]]:
        hidden_CE, labels_C = chunk
        value, pull = jax.vjp(lambda hidden_CE, weights: loss(hidden_CE, labels_C, *weights), hidden_CE, weights)
        hidden_slope_CE, more = pull(jnp.ones_like(value))
        return jax.tree.map(jnp.add, weight_slopes, more), (value, hidden_slope_CE)

    zeros = jax.tree.map(jnp.zeros_like, weights)
    weight_slopes, (values_K, hidden_slopes_KCE) = lax.scan(add, zeros, (hidden_KCE, labels_KC))
    return values_K.sum(), (hidden_slopes_KCE, weight_slopes)


def _slopes(loss: Callable[..., Array], slopes: Any, upstream: Array) -> tuple[Array, None, Any]:
    """The gradients of hidden states and weights, given that of what comes after."""
    del loss
    hidden_slopes_KCE, weight_slopes = jax.tree.map(lambda slope: (slope * upstream).astype(slope.dtype), slopes)
    return hidden_slopes_KCE, None, weight_slopes


_summed_losses.defvjp(_losses_and_slopes, _slopes)
