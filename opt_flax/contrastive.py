"""Which candidate contrastive search takes, in JAX: `opt_common.contrastive`, on the device of the states."""

import jax.numpy as jnp
from jax import Array


def preferred(states_RSE: Array, context_RS: Array, new_RE: Array, logprobs_BK: Array, alpha: Array) -> Array:
    """The candidate to take for each text, (B,); see `opt_common.contrastive.preferred`."""
    similarity_RS = jnp.einsum("RSE,RE->RS", directions(states_RSE), directions(new_RE))
    penalty_R = jnp.where(context_RS, similarity_RS, -jnp.inf).max(1)
    weight, logprobs_BK = alpha.astype(penalty_R.dtype), logprobs_BK.astype(penalty_R.dtype)
    value_BK = (1 - weight) * jnp.exp(logprobs_BK) - weight * penalty_R.reshape(logprobs_BK.shape)
    possible_BK = (logprobs_BK > -jnp.inf) & ~jnp.isnan(value_BK)
    return jnp.where(possible_BK, value_BK, -jnp.inf).argmax(1)


def rows_of(places_B: Array, size: int) -> Array:
    """The rows of the candidates that are taken, (B,), of `size` candidates for each text."""
    return jnp.arange(len(places_B)) * size + places_B


def directions(vectors: Array) -> Array:
    """Vectors (…, E) of length 1, at least float32; those of length 0 stay as they are."""
    vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    lengths = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(lengths > 0, lengths, 1)
