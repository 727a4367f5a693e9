"""Text generation in JAX: the decoder that `opt_common.generation` drives."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from opt_common.generation import Ids, bucket, decode, read_prompt
from opt_flax.cache import KVCache

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


def generate(
    model: "FlaxOPTForCausalLM", input_ids: ArrayLike, attention_mask: ArrayLike | None = None, **settings: Any
) -> Array:
    """Continue each prompt with its likeliest tokens.

    Args:
        model: the language model; dropout is off whatever mode it is in.
        input_ids: (B, T) integers.
        attention_mask: (B, T), 1 for a token and 0 for padding, on either side or in between; None means no padding.
        settings: fields of `opt_common.generation.GenerationConfig`, such as `max_new_tokens` or `eos_token_id`, in
            place of those of `model.generation_config`.

    Returns:
        (B, T + new) ids: the prompts as they were given, then the new tokens, finished rows filled with the pad token.

    Raises:
        InputError: for ids out of range, an empty prompt or a mask that does not fit.
        GenerationError: for a setting that cannot be, or a continuation with no room.
    """
    options = model.generation_config.updated(**settings)
    host_mask = None if attention_mask is None else np.asarray(attention_mask)
    prompt = read_prompt(model.config, options, np.asarray(input_ids), host_mask)
    training = model.training
    model.eval()
    try:
        decoder = Decoder(model, prompt.new_tokens)
        new_ids = list(decode(decoder, prompt, options))
    finally:
        if training:
            model.train()
    return jnp.concatenate(
        (jnp.asarray(input_ids), jnp.stack(new_ids, axis=1, dtype=jnp.asarray(input_ids).dtype)), axis=1
    )


class Decoder:
    """One run over a batch of prompts; holds the cache of that run.

    Shapes come in buckets, so that prompts of any length share a few compiled programs: a prompt is padded on the left
    to its bucket, and the cache has room for a bucket of tokens.
    """

    def __init__(self, model: "FlaxOPTForCausalLM", new_tokens: int) -> None:
        self.model = model
        self.new_tokens = new_tokens
        self.graphdef, self.state = nnx.split(model)

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids) -> Ids:
        """Read the prompts, padded on the left, and return the next token of each row, (B,)."""
        B, T = input_ids_BT.shape
        padding = bucket(T) - T
        capacity = bucket(bucket(T) + self.new_tokens)
        self.cache = KVCache.allocate(self.model.config, B, capacity, dtype=self.model.dtype)
        mask_BS = np.ones((B, capacity), dtype=np.int32)
        mask_BS[:, :padding] = 0
        mask_BS[:, padding : padding + T] = attention_mask_BT
        self.mask_BS = jnp.asarray(mask_BS)
        return self.step(np.pad(input_ids_BT, ((0, 0), (padding, 0))))

    def decode_one_token(self, tokens_B: Ids) -> Ids:
        """Read one more token of each row and return the next, (B,)."""
        return self.step(tokens_B[:, None])

    def step(self, ids_BT: Ids) -> Ids:
        """Read tokens and choose the likeliest next one, the lower id where two are equal."""
        tokens_B, self.cache = _step(
            self.graphdef, self.state, self.cache, jnp.asarray(ids_BT, jnp.int32), self.mask_BS
        )
        return np.asarray(tokens_B)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _step(
    graphdef: nnx.GraphDef["FlaxOPTForCausalLM"], state: nnx.State, cache: KVCache, ids_BT: Array, mask_BS: Array
) -> tuple[Array, KVCache]:
    model = nnx.merge(graphdef, state)
    outputs = model.model.decoder(ids_BT, attention_mask=mask_BS, past_key_values=cache, use_cache=True)
    logits_BV = model.logits(outputs.last_hidden_state[:, -1])
    return logits_BV.argmax(axis=-1), outputs.past_key_values
