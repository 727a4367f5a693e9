"""Text generation in JAX: the decoder that `opt_common.generation` drives."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from opt_common.assisted import check_assistant
from opt_common.decoding import ON_DEVICE, Arrays, Choice, Generated, Ids, Prompt, Selection
from opt_common.generation import bucket, check_streamer, given_slots, read_prompt, returns_cache, run, token_steps
from opt_common.generation_config import GenerationConfig
from opt_common.native import decoding
from opt_common.outputs import GenerateOutput
from opt_common.processors import Program, program
from opt_common.stopping import Criterion, read_stopping
from opt_common.streaming import Streamer, new_text, new_texts, text_pieces
from opt_common.tokenizer import OPTTokenizer
from opt_flax.cache import KVCache, append
from opt_flax.contrastive import preferred, rows_of
from opt_flax.dola import early_logits
from opt_flax.processors import History
from opt_flax.selection import Step, select
from opt_flax.shared_layer import call_layer

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


def generate(
    model: "FlaxOPTForCausalLM",
    input_ids: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    logits_processor: Sequence[Callable[[Array, Array], Array]] = (),
    stopping_criteria: Criterion | Iterable[Criterion] | None = None,
    *,
    inputs_embeds: ArrayLike | None = None,
    past_key_values: KVCache | None = None,
    negative_prompt_ids: ArrayLike | None = None,
    negative_prompt_attention_mask: ArrayLike | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Streamer | None = None,
    tokenizer: OPTTokenizer | None = None,
    **settings: Any,
) -> Array | GenerateOutput:
    """Continue each prompt, by default with its likeliest tokens.

    Args:
        model: the language model; dropout is off whatever mode it is in.
        input_ids: (B, T) integers; may be left out beside `inputs_embeds`.
        attention_mask: (B, T), 1 for a token and 0 for padding, on either side or in between; None means no padding.
        logits_processor: functions of (input_ids (B, S), scores (B, V)) that return new scores, as arrays of the
            framework; see `docs/generation.md`.
        stopping_criteria: functions of ids (B, T), padded on the left, that return True or False for all rows, or (B,).
        inputs_embeds: (B, T, E), read in place of the tokens' rows of the table.
        past_key_values: the cache of the first columns of the prompts, from an earlier call of the model or of
            `generate`: only the others are read. Of one row, it serves prompts that all begin with it.
        negative_prompt_ids: (B, N), or (1, N) for all prompts: what `guidance_scale` leads away from; None means each
            prompt's last token.
        negative_prompt_attention_mask: the same shape, padding anywhere; None means no padding.
        generation_config: settings in place of `model.generation_config`.
        streamer: is told of each token as it is chosen, such as `opt_common.TextStreamer`.
        tokenizer: the model's, which `stop_strings` needs.
        settings: fields of `opt_common.GenerationConfig`, such as `max_new_tokens` or `do_sample`, in place of those
            of the configuration.

    Returns:
        (B * num_return_sequences, T + new) ids: the prompts as they were given, then the new tokens, finished rows
        filled with the pad token; of embeddings without ids, the new tokens alone. With `return_dict_in_generate`, a
        `GenerateOutput`.

    Raises:
        InputError: for ids out of range, an empty prompt or a mask that does not fit.
        GenerationError: for a setting that cannot be or changes nothing, a continuation with no room, a cache of
            another text, or a row for which the settings rule out every token.
    """
    options, prompt = prepare(
        model,
        input_ids,
        attention_mask,
        logits_processor,
        stopping_criteria,
        inputs_embeds=inputs_embeds,
        past_key_values=past_key_values,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        generation_config=generation_config,
        tokenizer=tokenizer,
        **settings,
    )
    check_streamer(streamer, options)
    with evaluating(model, options):
        decoder = Decoder(model, prompt)
        generated = run(decoder, prompt, options, streamer)
    return results(decoder, input_ids, generated, options)


def stream(model: "FlaxOPTForCausalLM", text: str, tokenizer: OPTTokenizer, **options: Any) -> Iterator[str]:
    """Continue one text, and yield what is new as it is produced, in whole characters.

    Args:
        model: the language model; between two pieces it is in the mode it was in.
        text: the prompt.
        tokenizer: the model's.
        options: as for `generate`. With `stop_strings`, the text ends right before the first of them.

    Raises:
        InputError: as `generate`.
        GenerationError: as `generate`, and for a strategy whose text is certain only at its end.
    """
    inputs = tokenizer([text], return_tensors="jax")
    settings, prompt = prepare(model, **inputs, tokenizer=tokenizer, **options)
    check_streamer(tokenizer, settings)
    steps = token_steps(Decoder(model, prompt), prompt, settings)
    return text_pieces(steps, lambda: evaluating(model, settings), new_text(tokenizer, prompt.input_ids[0], settings))


def generate_text(
    model: "FlaxOPTForCausalLM", text: str | Sequence[str], tokenizer: OPTTokenizer, **options: Any
) -> str | list[str]:
    """Continue one text or several, and return what is new: what `stream` yields, joined.

    Args:
        model: the language model; dropout is off whatever mode it is in.
        text: the prompt, or a list of them.
        tokenizer: the model's.
        options: as for `generate`. With `stop_strings`, a text ends right before the first of them.

    Returns:
        The new text; a list of them, `num_return_sequences` of each prompt in turn, for a list of prompts or several
        texts of one.

    Raises:
        InputError: as `generate`.
        GenerationError: as `generate`.
    """
    texts = [text] if isinstance(text, str) else list(text)
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="jax")
    settings, prompt = prepare(model, **inputs, tokenizer=tokenizer, **options)
    with evaluating(model, settings):
        generated = run(Decoder(model, prompt), prompt, settings)
    found = new_texts(tokenizer, prompt.input_ids, generated.new_ids, settings)
    return found[0] if isinstance(text, str) and len(found) == 1 else found


def prepare(
    model: "FlaxOPTForCausalLM",
    input_ids: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    logits_processor: Sequence[Callable[[Array, Array], Array]] = (),
    stopping_criteria: Criterion | Iterable[Criterion] | None = None,
    *,
    inputs_embeds: ArrayLike | None = None,
    past_key_values: KVCache | None = None,
    negative_prompt_ids: ArrayLike | None = None,
    negative_prompt_attention_mask: ArrayLike | None = None,
    generation_config: GenerationConfig | None = None,
    tokenizer: OPTTokenizer | None = None,
    **settings: Any,
) -> tuple[GenerationConfig, Prompt]:
    """The settings in force and the prompts; arguments are those of `generate`."""
    options = (generation_config or model.generation_config).updated(**settings)
    check_assistant(model, options)
    prompt = read_prompt(
        model.config,
        options,
        to_host(input_ids),
        to_host(attention_mask),
        functions=logits_processor,
        inputs_embeds=to_host(inputs_embeds),
        past_key_values=past_key_values,
        negative_prompt_ids=to_host(negative_prompt_ids),
        negative_prompt_attention_mask=to_host(negative_prompt_attention_mask),
        stopping=read_stopping(options, tokenizer, stopping_criteria, jnp.asarray),
    )
    return options, prompt


@contextlib.contextmanager
def evaluating(model: "FlaxOPTForCausalLM", options: GenerationConfig) -> Iterator[None]:
    """Where nothing is dropped out; the mode of the model and its assistant is restored afterwards, come what may."""
    models = [each for each in (model, options.assistant_model) if each is not None]
    modes = [(each, each.training) for each in models]
    for each in models:
        each.eval()
    try:
        yield
    finally:
        for each, training in modes:
            if training:
                each.train()


def to_host(array: ArrayLike | None) -> np.ndarray | None:
    """An array in NumPy."""
    return None if array is None else np.asarray(array)


def results(
    decoder: "Decoder", input_ids: ArrayLike | None, generated: Generated, options: GenerationConfig
) -> Array | GenerateOutput:
    """What `generate` returns, in the framework's arrays."""
    sequences = jnp.asarray(generated.after(to_host(input_ids)))
    past_key_values = decoder.past() if returns_cache(options) else None
    if not options.return_dict_in_generate:
        return sequences
    return generated.output(sequences, jnp.asarray, past_key_values)


class Decoder:
    """One run over a batch of prompts; holds the cache of that run.

    Shapes come in buckets, so that prompts of any length share a few compiled programs: a prompt is padded on the left
    to its bucket, and the cache has room for a bucket of tokens.
    """

    def __init__(self, model: "FlaxOPTForCausalLM", prompt: Prompt) -> None:
        self.model = model
        self.prompt = prompt
        self.program = program(prompt.processors)
        self.arguments = [tuple(map(jnp.asarray, processor.arguments)) for processor in prompt.processors]
        self.guidance_scale = None if prompt.guidance is None else jnp.asarray(prompt.guidance.scale)
        graphdef, state = nnx.split(model)
        self.leaves, tree = jax.tree.flatten(state)
        structure = Structure(graphdef, tree)
        # The one that compiled programs know: comparing it with itself costs nothing.
        self.structure = _STRUCTURES.setdefault(structure, structure)

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Arrays:
        """Read the prompts, padded on the left, and select what follows the last token of each."""
        B, T = input_ids_BT.shape
        past = self.prompt.past
        start = self.prompt.past_length
        self.padding = bucket(T - start) - (T - start)
        first = start + self.padding
        capacity = bucket(start + bucket(T - start) + self.prompt.most_tokens)
        if past is None:
            self.cache = KVCache.allocate(self.model.config, B, capacity, dtype=self.model.dtype)
        else:
            rows_B = jnp.asarray(past.rows_B)
            self.cache = past.cache.reordered(rows_B).cropped(start).with_room(capacity - start)
        mask_BS = np.ones((B, self.cache.capacity), dtype=np.int32)
        mask_BS[:, :start] = attention_mask_BT[:, :start]
        mask_BS[:, start:first] = 0
        mask_BS[:, first : self.padding + T] = attention_mask_BT[:, start:]
        tokens_BS = np.zeros_like(mask_BS)
        tokens_BS[:, :start] = input_ids_BT[:, :start]
        self.mask_BS, self.tokens_BS = jnp.asarray(mask_BS), jnp.asarray(tokens_BS)
        self.states_BS1E = self.room_for_states() if choice.selection.compares_states else None
        self.text_start = 0 if self.prompt.has_ids else self.padding + T
        embeds_BTE = None if self.prompt.inputs_embeds is None else self.prompt.inputs_embeds[:, start:]
        if embeds_BTE is not None:
            embeds_BTE = np.pad(embeds_BTE, ((0, 0), (self.padding, 0), (0, 0)))
        return self.step(np.pad(input_ids_BT[:, start:], ((0, 0), (self.padding, 0))), choice, embeds_BTE)

    def past(self) -> KVCache:
        """The cache of what was read, in the order in which the prompts were given."""
        assert self.prompt.order is not None
        cache, margin = self.cache, self.padding + self.prompt.margin
        slots_BS = given_slots(self.prompt.order, self.prompt.past_length, margin, cache.capacity)
        length = int(cache.length) - margin
        if self.guidance_scale is not None:
            cache = cache.reordered(jnp.arange(len(self.prompt.order)))
        return cache if slots_BS is None else cache.gathered(jnp.asarray(slots_BS), length)

    def room_for_states(self) -> Array:
        """Where the last hidden states of all that is read are kept, beside the cache."""
        shape_BS1E = (*self.mask_BS.shape, 1, self.model.config.word_embed_proj_dim)
        return jnp.zeros(shape_BS1E, self.model.dtype)

    def decode(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Continue the rows that the choice names by one or several tokens each, and select what follows the last."""
        return self.step(ids_BT, choice)

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens of every row, as if they had not been read."""
        self.cache = self.cache.cropped(self.cache.length - count)

    def other(self, model: "FlaxOPTForCausalLM", prompt: Prompt) -> "Decoder":
        """A decoder for another model."""
        return Decoder(model, prompt)

    def step(self, ids_BT: Ids, choice: Choice, embeds_BTE: np.ndarray | None = None) -> Arrays:
        """Read tokens, or embeddings in their place, and select what follows the last."""
        # Buffers of another size cannot be used again for the result.
        step = _step if choice.rows_B is None or len(choice.rows_B) == len(self.mask_BS) else _resizing_step
        rows_B = None if choice.rows_B is None else np.asarray(choice.rows_B, np.int32)
        found, self.cache, self.tokens_BS, self.mask_BS, self.states_BS1E = step(
            self.structure,
            self.program,
            choice.selection,
            self.leaves,
            self.cache,
            self.tokens_BS,
            self.mask_BS,
            self.states_BS1E,
            np.asarray(ids_BT, np.int32),
            None if embeds_BTE is None else jnp.asarray(embeds_BTE, self.model.dtype),
            rows_B,
            self.text_start,
            self.arguments,
            self.guidance_scale,
            choice.gates_P,
            choice.arguments,
        )
        return {name: array if name in ON_DEVICE else np.asarray(array) for name, array in found.items()}


class Structure:
    """How arrays make a model.

    A compiled call hashes it at every token, so that it is hashed once and for all: a `GraphDef` takes over a
    millisecond.
    """

    def __init__(self, graphdef: nnx.GraphDef["FlaxOPTForCausalLM"], tree: Any) -> None:
        self.parts = (graphdef, tree)
        self.hash = hash(self.parts)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.parts == other.parts)

    def model(self, leaves: Sequence[Array]) -> "FlaxOPTForCausalLM":
        """The model that the arrays make."""
        graphdef, tree = self.parts
        return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


_STRUCTURES: dict[Structure, Structure] = {}


@decoding()
def _one_step(
    structure: Structure,
    program: Program,
    selection: Selection,
    leaves: list[Array],
    cache: KVCache,
    tokens_BS: Array,
    mask_BS: Array,
    states_BS1E: Array | None,
    ids_BT: Array,
    embeds_BTE: Array | None,
    rows_B: Array | None,
    text_start: Array,
    arguments: list[tuple[Array, ...]],
    guidance_scale: Array | None,
    gates_P: Array,
    choice_arguments: tuple[Array, ...],
) -> tuple[dict[str, Array], KVCache, Array, Array, Array | None]:
    model = structure.model(leaves)
    if rows_B is not None:
        cache = cache.reordered(rows_B)
        tokens_BS, mask_BS = tokens_BS[rows_B], mask_BS[rows_B]
        states_BS1E = None if states_BS1E is None else states_BS1E[rows_B]
    outputs = model.model.decoder(
        ids_BT,
        attention_mask=mask_BS,
        inputs_embeds=embeds_BTE,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=bool(selection.layers),
        call_layer=call_layer,
    )
    tokens_BS = jax.lax.dynamic_update_slice_in_dim(tokens_BS, ids_BT, cache.length, axis=1)
    if states_BS1E is not None:
        states_BS1E = append(states_BS1E, outputs.last_hidden_state[:, :, None], cache.length)
    length = outputs.past_key_values.length
    slots_S = jnp.arange(mask_BS.shape[1])
    attended_BS = (mask_BS > 0) & (slots_S >= text_start) & (slots_S < length)
    history = History(tokens_BS=tokens_BS, attended_BS=attended_BS, length=length)
    reach = selection.reach
    hidden_BE = jax.lax.collapse(outputs.last_hidden_state[:, -reach:], 0, 2)
    if reach > 1:
        history = history.each(reach)
    found = {}
    if selection.name == "contrast":
        assert states_BS1E is not None
        before_BS = (mask_BS > 0) & (slots_S < length - 1)
        found["places"] = preferred(states_BS1E[:, :, 0], before_BS, hidden_BE, *choice_arguments)
        kept_B = rows_of(found["places"], selection.size)
        hidden_BE, history = hidden_BE[kept_B], history.of(kept_B)
    logits_BV = model.logits(hidden_BE)
    logits_BV = logits_BV.astype(jnp.promote_types(logits_BV.dtype, jnp.float32))
    unconditional_BV = None
    if guidance_scale is not None:
        logits_BV, unconditional_BV = jnp.split(logits_BV, 2)
        history = history.of(np.arange(len(logits_BV)))
    early_BCV = early_logits(model, outputs.hidden_states or (), selection.layers) if selection.layers else None
    step = Step(
        logits_BV=logits_BV,
        history=history,
        program=program,
        arguments=arguments,
        gates_P=gates_P,
        early_BCV=early_BCV,
        unconditional_BV=unconditional_BV,
        guidance_scale=guidance_scale,
    )
    found |= select(step, selection, choice_arguments)
    return found, outputs.past_key_values, tokens_BS, mask_BS, states_BS1E


_STATIC = ("structure", "program", "selection")
_step = jax.jit(_one_step, static_argnames=_STATIC, donate_argnames=("cache", "tokens_BS", "mask_BS", "states_BS1E"))
_resizing_step = jax.jit(_one_step, static_argnames=_STATIC)
