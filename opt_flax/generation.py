"""Text generation in JAX: the decoder that `opt_common.generation` drives."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from opt_common.generation import Choice, Ids, Prompt, bucket, decode, read_prompt
from opt_common.processors import Program, program
from opt_flax.cache import KVCache
from opt_flax.processors import History, choose, process

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


def generate(
    model: "FlaxOPTForCausalLM",
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    logits_processor: Sequence[Callable[[Array, Array], Array]] = (),
    **settings: Any,
) -> Array:
    """Continue each prompt, by default with its likeliest tokens.

    Args:
        model: the language model; dropout is off whatever mode it is in.
        input_ids: (B, T) integers.
        attention_mask: (B, T), 1 for a token and 0 for padding, on either side or in between; None means no padding.
        logits_processor: functions of (input_ids (B, S), scores (B, V)) that return new scores, as arrays of the
            framework; see `docs/generation.md`.
        settings: fields of `opt_common.GenerationConfig`, such as `max_new_tokens` or `do_sample`, in place of those
            of `model.generation_config`.

    Returns:
        (B * num_return_sequences, T + new) ids: the prompts as they were given, then the new tokens, finished rows
        filled with the pad token.

    Raises:
        InputError: for ids out of range, an empty prompt or a mask that does not fit.
        GenerationError: for a setting that cannot be or changes nothing, a continuation with no room, or a row for
            which the settings rule out every token.
    """
    options = model.generation_config.updated(**settings)
    host_mask = None if attention_mask is None else np.asarray(attention_mask)
    prompt = read_prompt(model.config, options, np.asarray(input_ids), host_mask, functions=logits_processor)
    training = model.training
    model.eval()
    try:
        decoder = Decoder(model, prompt)
        new_ids = list(decode(decoder, prompt, options))
    finally:
        if training:
            model.train()
    input_ids = jnp.repeat(jnp.asarray(input_ids), options.num_return_sequences, axis=0)
    return jnp.concatenate((input_ids, jnp.stack(new_ids, axis=1, dtype=input_ids.dtype)), axis=1)


class Decoder:
    """One run over a batch of prompts; holds the cache of that run.

    Shapes come in buckets, so that prompts of any length share a few compiled programs: a prompt is padded on the left
    to its bucket, and the cache has room for a bucket of tokens.
    """

    def __init__(self, model: "FlaxOPTForCausalLM", prompt: Prompt) -> None:
        self.model = model
        self.new_tokens = prompt.new_tokens
        self.program = program(prompt.processors)
        self.arguments = [tuple(map(jnp.asarray, processor.arguments)) for processor in prompt.processors]
        self.graphdef, self.state = nnx.split(model)

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Ids:
        """Read the prompts, padded on the left, and return the next token of each row, (B,)."""
        B, T = input_ids_BT.shape
        padding = bucket(T) - T
        capacity = bucket(bucket(T) + self.new_tokens)
        self.cache = KVCache.allocate(self.model.config, B, capacity, dtype=self.model.dtype)
        mask_BS = np.ones((B, capacity), dtype=np.int32)
        mask_BS[:, :padding] = 0
        mask_BS[:, padding : padding + T] = attention_mask_BT
        self.mask_BS = jnp.asarray(mask_BS)
        self.tokens_BS = jnp.zeros_like(self.mask_BS)
        return self.step(np.pad(input_ids_BT, ((0, 0), (padding, 0))), choice)

    def decode_one_token(self, tokens_B: Ids, choice: Choice) -> Ids:
        """Read one more token of each row and return the next, (B,); -1 where every token is ruled out."""
        return self.step(tokens_B[:, None], choice)

    def step(self, ids_BT: Ids, choice: Choice) -> Ids:
        """Read tokens and choose the next one."""
        tokens_B, self.cache, self.tokens_BS = _step(
            self.graphdef,
            self.program,
            self.state,
            self.cache,
            self.tokens_BS,
            self.mask_BS,
            jnp.asarray(ids_BT, jnp.int32),
            self.arguments,
            choice.gates_P,
            choice.uniforms_B,
        )
        return np.asarray(tokens_B)


@functools.partial(jax.jit, static_argnames=("graphdef", "program"), donate_argnames=("cache", "tokens_BS"))
def _step(
    graphdef: nnx.GraphDef["FlaxOPTForCausalLM"],
    program: Program,
    state: nnx.State,
    cache: KVCache,
    tokens_BS: Array,
    mask_BS: Array,
    ids_BT: Array,
    arguments: list[tuple[Array, ...]],
    gates_P: Array,
    uniforms_B: Array | None,
) -> tuple[Array, KVCache, Array]:
    model = nnx.merge(graphdef, state)
    outputs = model.model.decoder(ids_BT, attention_mask=mask_BS, past_key_values=cache, use_cache=True)
    tokens_BS = jax.lax.dynamic_update_slice_in_dim(tokens_BS, ids_BT, cache.length, axis=1)
    length = outputs.past_key_values.length
    attended_BS = (mask_BS > 0) & (jnp.arange(mask_BS.shape[1]) < length)
    history = History(tokens_BS=tokens_BS, attended_BS=attended_BS, length=length)
    logits_BV = model.logits(outputs.last_hidden_state[:, -1])
    scores_BV = logits_BV.astype(jnp.promote_types(logits_BV.dtype, jnp.float32))
    scores_BV = process(scores_BV, history, program, arguments, gates_P)
    return choose(scores_BV, uniforms_B), outputs.past_key_values, tokens_BS
