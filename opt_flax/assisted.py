"""Which guesses of a smaller model are kept, in JAX: `opt_common.assisted`, on the device of the scores."""

import jax.numpy as jnp
from jax import Array

from opt_flax.processors import choose, softmax


def checked(scores_BV: Array, shares_BV: Array, guessed_B: Array, uniforms_B: Array, chances_B: Array) -> Array:
    """The guess where it holds, another token where it does not; see `opt_common.assisted.checked`."""
    probabilities_BV = softmax(scores_BV)
    shares_BV = jnp.where(guessed_B[:, None] >= 0, shares_BV.astype(scores_BV.dtype), 0)
    places_B1 = guessed_B.clip(0)[:, None]
    guess_B, share_B = (
        jnp.take_along_axis(array_BV, places_B1, axis=1)[:, 0] for array_BV in (probabilities_BV, shares_BV)
    )
    holds_B = (guessed_B >= 0) & (chances_B.astype(share_B.dtype) * share_B < guess_B)
    left_BV = jnp.where(probabilities_BV > shares_BV, probabilities_BV - shares_BV, 0)
    left_BV = jnp.where(left_BV.sum(1, keepdims=True) > 0, left_BV, probabilities_BV)
    others_B = choose(jnp.log(left_BV), uniforms_B)
    tokens_B = jnp.where(holds_B, guessed_B.astype(others_B.dtype), others_B)
    return jnp.where(scores_BV.max(1) > -jnp.inf, tokens_B, -1)
