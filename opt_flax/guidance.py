"""What a prompt makes likelier than another one, in JAX: `opt_common.guidance`, on the device of the logits."""

from jax import Array

from opt_flax.processors import log_softmax


def guided(logits_BV: Array, unconditional_BV: Array, scale: Array) -> Array:
    """Scores of tokens, before the processors; see `opt_common.guidance.guided`."""
    unconditional_BV = log_softmax(unconditional_BV)
    weight = scale.astype(unconditional_BV.dtype)
    return weight * (log_softmax(logits_BV) - unconditional_BV) + unconditional_BV
