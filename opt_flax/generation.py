"""Text generation in JAX: the decoder that `opt_common.generation` drives."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from opt_common.decoding import Arrays, Choice, Generated, Ids, Prompt, Selection
from opt_common.generation import bucket, read_prompt, run
from opt_common.generation_config import GenerationConfig
from opt_common.outputs import GenerateOutput
from opt_common.processors import Program, program
from opt_flax.cache import KVCache
from opt_flax.processors import History
from opt_flax.selection import Step, select

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


def generate(
    model: "FlaxOPTForCausalLM",
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    logits_processor: Sequence[Callable[[Array, Array], Array]] = (),
    **settings: Any,
) -> Array | GenerateOutput:
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
        filled with the pad token. With `return_dict_in_generate`, a `GenerateOutput`.

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
        generated = run(Decoder(model, prompt), prompt, options)
    finally:
        if training:
            model.train()
    return results(input_ids, generated, options)


def results(input_ids: ArrayLike, generated: Generated, options: GenerationConfig) -> Array | GenerateOutput:
    """What `generate` returns, in the framework's arrays."""
    input_ids = jnp.repeat(jnp.asarray(input_ids), options.num_return_sequences, axis=0)
    sequences = jnp.concatenate((input_ids, jnp.asarray(generated.new_ids, input_ids.dtype)), axis=1)
    return generated.output(sequences, jnp.asarray) if options.return_dict_in_generate else sequences


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

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Arrays:
        """Read the prompts, padded on the left, and select what follows the last token of each."""
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

    def decode(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Continue the rows that the choice names by one or several tokens each, and select what follows the last."""
        return self.step(ids_BT, choice)

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens of every row, as if they had not been read."""
        self.cache = self.cache.cropped(self.cache.length - count)

    def step(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Read tokens and select what follows the last."""
        # Buffers of another size cannot be used again for the result.
        step = _step if choice.rows_B is None or len(choice.rows_B) == len(self.mask_BS) else _resizing_step
        rows_B = None if choice.rows_B is None else jnp.asarray(choice.rows_B, jnp.int32)
        found, self.cache, self.tokens_BS, self.mask_BS = step(
            self.graphdef,
            self.program,
            choice.selection,
            self.state,
            self.cache,
            self.tokens_BS,
            self.mask_BS,
            jnp.asarray(ids_BT, jnp.int32),
            rows_B,
            self.arguments,
            choice.gates_P,
            choice.arguments,
        )
        return {name: np.asarray(array) for name, array in found.items()}


def _one_step(
    graphdef: nnx.GraphDef["FlaxOPTForCausalLM"],
    program: Program,
    selection: Selection,
    state: nnx.State,
    cache: KVCache,
    tokens_BS: Array,
    mask_BS: Array,
    ids_BT: Array,
    rows_B: Array | None,
    arguments: list[tuple[Array, ...]],
    gates_P: Array,
    choice_arguments: tuple[Array, ...],
) -> tuple[dict[str, Array], KVCache, Array, Array]:
    model = nnx.merge(graphdef, state)
    if rows_B is not None:
        cache = cache.reordered(rows_B)
        tokens_BS, mask_BS = tokens_BS[rows_B], mask_BS[rows_B]
    outputs = model.model.decoder(ids_BT, attention_mask=mask_BS, past_key_values=cache, use_cache=True)
    tokens_BS = jax.lax.dynamic_update_slice_in_dim(tokens_BS, ids_BT, cache.length, axis=1)
    length = outputs.past_key_values.length
    attended_BS = (mask_BS > 0) & (jnp.arange(mask_BS.shape[1]) < length)
    history = History(tokens_BS=tokens_BS, attended_BS=attended_BS, length=length)
    logits_BV = model.logits(outputs.last_hidden_state[:, -1])
    step = Step(
        logits_BV=logits_BV.astype(jnp.promote_types(logits_BV.dtype, jnp.float32)),
        history=history,
        program=program,
        arguments=arguments,
        gates_P=gates_P,
    )
    return select(step, selection, choice_arguments), outputs.past_key_values, tokens_BS, mask_BS


_STATIC = ("graphdef", "program", "selection")
_step = jax.jit(_one_step, static_argnames=_STATIC, donate_argnames=("cache", "tokens_BS", "mask_BS"))
_resizing_step = jax.jit(_one_step, static_argnames=_STATIC)
