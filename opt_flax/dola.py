"""What the last layer has learnt over an earlier one, in JAX: `opt_common.dola`, on the device of the logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from opt_common.dola import RELATIVE_TOP
from opt_flax.processors import log_softmax

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


def early_logits(model: "FlaxOPTForCausalLM", hidden_states: Sequence[Array], layers: Sequence[int]) -> Array:
    """What the head predicts of the last token in some layers' inputs, (B, C, V), at least float32."""
    decoder = model.model.decoder
    early = []
    for layer in layers:
        hidden_BD = hidden_states[layer][:, -1]
        early.append(model.logits(decoder.project_out(hidden_BD) if model.config.has_projection else hidden_BD))
    early_BCV = jnp.stack(early, axis=1)
    return early_BCV.astype(jnp.promote_types(early_BCV.dtype, jnp.float32))


def contrasted(final_BV: Array, early_BCV: Array) -> Array:
    """Scores of tokens, before the processors; see `opt_common.dola.contrasted`."""
    B, C, V = early_BCV.shape
    final_BV = log_softmax(final_BV)
    early_BCV = log_softmax(early_BCV.reshape(B * C, V)).reshape(B, C, V)
    mean_BCV = (jnp.exp(final_BV)[:, None] + jnp.exp(early_BCV)) / 2
    logs_BCV = jnp.log(jnp.where(mean_BCV > 0, mean_BCV, 1))
    divergence_BC = (mean_BCV * (2 * logs_BCV - final_BV[:, None] - early_BCV)).sum(-1)
    furthest_B = divergence_BC.argmax(1)
    scores_BV = final_BV - early_BCV[jnp.arange(B), furthest_B]
    unlikely_BV = final_BV < final_BV.max(1, keepdims=True) + RELATIVE_TOP
    return jnp.where(unlikely_BV, -jnp.inf, scores_BV)
