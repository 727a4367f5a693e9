"""Text generation in TensorFlow: the decoder that `opt_common.generation` drives."""

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from opt_common.assisted import check_assistant
from opt_common.decoding import ON_DEVICE, Arrays, Choice, Generated, Ids, Prompt, Selection
from opt_common.generation import bucket, check_streamer, given_slots, read_prompt, returns_cache, run, token_steps
from opt_common.generation_config import GenerationConfig
from opt_common.native import DTYPES, MAX_ROWS, decoding
from opt_common.outputs import GenerateOutput
from opt_common.processors import Program, program
from opt_common.stopping import Criterion, read_stopping
from opt_common.streaming import Streamer, new_text, new_texts, text_pieces
from opt_common.tokenizer import OPTTokenizer
from opt_tf import native
from opt_tf.cache import KVCache, append
from opt_tf.contrastive import preferred, rows_of
from opt_tf.dola import early_logits
from opt_tf.processors import History
from opt_tf.selection import Step, select
from opt_tf.shared_layer import SharedLayer

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def generate(
    model: "TFOPTForCausalLM",
    input_ids: Any = None,
    attention_mask: Any = None,
    logits_processor: Sequence[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = (),
    stopping_criteria: Criterion | Iterable[Criterion] | None = None,
    *,
    inputs_embeds: Any = None,
    past_key_values: KVCache | None = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    streamer: Streamer | None = None,
    tokenizer: OPTTokenizer | None = None,
    **settings: Any,
) -> tf.Tensor | GenerateOutput:
    """Continue each prompt, by default with its likeliest tokens.

    Args:
        model: the language model.
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
    decoder = Decoder(model, prompt)
    generated = run(decoder, prompt, options, streamer)
    return results(decoder, input_ids, generated, options)


def stream(model: "TFOPTForCausalLM", text: str, tokenizer: OPTTokenizer, **options: Any) -> Iterator[str]:
    """Continue one text, and yield what is new as it is produced, in whole characters.

    Args:
        model: the language model.
        text: the prompt.
        tokenizer: the model's.
        options: as for `generate`. With `stop_strings`, the text ends right before the first of them.

    Raises:
        InputError: as `generate`.
        GenerationError: as `generate`, and for a strategy whose text is certain only at its end.
    """
    inputs = tokenizer([text], return_tensors="tf")
    settings, prompt = prepare(model, **inputs, tokenizer=tokenizer, **options)
    check_streamer(tokenizer, settings)
    steps = token_steps(Decoder(model, prompt), prompt, settings)
    return text_pieces(steps, contextlib.nullcontext, new_text(tokenizer, prompt.input_ids[0], settings))


def generate_text(
    model: "TFOPTForCausalLM", text: str | Sequence[str], tokenizer: OPTTokenizer, **options: Any
) -> str | list[str]:
    """Continue one text or several, and return what is new: what `stream` yields, joined.

    Args:
        model: the language model.
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
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="tf")
    settings, prompt = prepare(model, **inputs, tokenizer=tokenizer, **options)
    generated = run(Decoder(model, prompt), prompt, settings)
    found = new_texts(tokenizer, prompt.input_ids, generated.new_ids, settings)
    return found[0] if isinstance(text, str) and len(found) == 1 else found


def prepare(
    model: "TFOPTForCausalLM",
    input_ids: Any = None,
    attention_mask: Any = None,
    logits_processor: Sequence[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = (),
    stopping_criteria: Criterion | Iterable[Criterion] | None = None,
    *,
    inputs_embeds: Any = None,
    past_key_values: KVCache | None = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
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
        stopping=read_stopping(options, tokenizer, stopping_criteria, tf.convert_to_tensor),
    )
    return options, prompt


def to_host(array: Any) -> np.ndarray | None:
    """An array in NumPy."""
    return None if array is None else np.asarray(array)


def results(
    decoder: "Decoder", input_ids: Any, generated: Generated, options: GenerationConfig
) -> tf.Tensor | GenerateOutput:
    """What `generate` returns, in the framework's arrays."""
    sequences = tf.convert_to_tensor(generated.after(to_host(input_ids)))
    past_key_values = decoder.past() if returns_cache(options) else None
    return (
        generated.output(sequences, tf.convert_to_tensor, past_key_values)
        if options.return_dict_in_generate
        else sequences
    )


class Decoder:
    """One run over a batch of prompts; holds the cache of that run.

    Shapes come in buckets, so that prompts of any length share a few compiled programs: a prompt is padded on the left
    to its bucket, and the cache has room for a bucket of tokens.
    """

    def __init__(self, model: "TFOPTForCausalLM", prompt: Prompt) -> None:
        self.model = model
        self.prompt = prompt
        self.program = program(prompt.processors)
        self.steps: dict[Hashable, Callable[..., Any]] = {}
        self.arguments = tuple(tuple(map(tf.constant, processor.arguments)) for processor in prompt.processors)
        self.guidance_scale = None if prompt.guidance is None else tf.constant(prompt.guidance.scale, tf.float64)

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Arrays:
        """Read the prompts, padded on the left, and select what follows the last token of each."""
        B, T = input_ids_BT.shape
        past = self.prompt.past
        start = self.prompt.past_length
        self.padding = bucket(T - start) - (T - start)
        first = start + self.padding
        capacity = bucket(start + bucket(T - start) + self.prompt.most_tokens)
        if past is None:
            self.cache = KVCache.allocate(self.model.config, B, capacity, dtype=self.model.compute_dtype)
        else:
            self.cache = (
                past.cache.reordered(tf.constant(past.rows_B, tf.int32)).cropped(start).with_room(capacity - start)
            )
        mask_BS = np.ones((B, self.cache.capacity), dtype=np.int32)
        mask_BS[:, :start] = attention_mask_BT[:, :start]
        mask_BS[:, start:first] = 0
        mask_BS[:, first : self.padding + T] = attention_mask_BT[:, start:]
        tokens_BS = np.zeros_like(mask_BS)
        tokens_BS[:, :start] = input_ids_BT[:, :start]
        self.mask_BS, self.tokens_BS = tf.convert_to_tensor(mask_BS), tf.convert_to_tensor(tokens_BS)
        self.states_BS1E = self.room_for_states() if choice.selection.compares_states else None
        self.text_start = 0 if self.prompt.has_ids else self.padding + T
        embeds_BTE = None if self.prompt.inputs_embeds is None else self.prompt.inputs_embeds[:, start:]
        if embeds_BTE is not None:
            embeds_BTE = np.pad(embeds_BTE, ((0, 0), (self.padding, 0), (0, 0)))
        return self.step(np.pad(input_ids_BT[:, start:], ((0, 0), (self.padding, 0))), choice, embeds_BTE)

    def past(self) -> KVCache:
        """The cache of what was read, in the order in which the prompts were given."""
        assert self.prompt.order is not None
        cache, margin = self.cache.in_tensors(), self.padding + self.prompt.margin
        slots_BS = given_slots(self.prompt.order, self.prompt.past_length, margin, cache.capacity)
        length = int(cache.length) - margin
        if self.guidance_scale is not None:
            cache = cache.reordered(tf.range(len(self.prompt.order)))
        return cache if slots_BS is None else cache.gathered(tf.convert_to_tensor(slots_BS), length)

    def room_for_states(self) -> tf.Tensor:
        """Where the last hidden states of all that is read are kept, beside the cache."""
        shape_BS1E = (*self.mask_BS.shape, 1, self.model.config.word_embed_proj_dim)
        return tf.zeros(shape_BS1E, self.model.compute_dtype)

    def decode(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Continue the rows that the choice names by one or several tokens each, and select what follows the last."""
        # Rows that others continue need buffers beside theirs.
        self.cache = self.cache.in_variables() if choice.rows_B is None else self.cache.in_tensors()
        return self.step(ids_BT, choice)

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens of every row, as if they had not been read."""
        self.cache = self.cache.cropped(self.cache.length - count)

    def other(self, model: "TFOPTForCausalLM", prompt: Prompt) -> "Decoder":
        """A decoder for another model."""
        return Decoder(model, prompt)

    def step(self, ids_BT: Ids, choice: Choice, embeds_BTE: np.ndarray | None = None) -> Arrays:
        """Read tokens, or embeddings in their place, and select what follows the last."""
        cache = self.cache
        rows_B = None if choice.rows_B is None else tf.constant(choice.rows_B, tf.int32)
        choice_arguments = tuple(map(tf.convert_to_tensor, choice.arguments))
        ids = tf.convert_to_tensor(ids_BT, tf.int32)
        arguments = (
            self.program,
            choice.selection,
            cache.keys,
            cache.values,
            tf.constant(cache.length, tf.int32),
            self.tokens_BS,
            self.mask_BS,
            self.states_BS1E,
            ids,
            None if embeds_BTE is None else tf.convert_to_tensor(embeds_BTE, self.model.compute_dtype),
            rows_B,
            tf.constant(self.text_start, tf.int32),
            self.arguments,
            self.guidance_scale,
            tf.constant(choice.gates_P),
            choice_arguments,
        )
        # TensorFlow would find the compiled step by the types of all arguments, which takes it milliseconds.
        varying = [(each.shape, each.dtype) for each in (self.mask_BS, ids, *choice_arguments)]
        key = (choice.selection, rows_B is None, cache.is_in_variables, *varying)
        if key not in self.steps:
            step = _compiled_step(self.model, suits_xla(self.model, ids_BT.size))
            eager = tf.config.functions_run_eagerly()
            self.steps[key] = step if eager else step.get_concrete_function(*arguments)
        found, keys, values, self.tokens_BS, self.mask_BS, self.states_BS1E = self.steps[key](*arguments)
        if cache.is_in_variables:
            keys, values = cache.keys, cache.values
        self.cache = KVCache(keys, values, cache.length + ids_BT.shape[1])
        return {name: array if name in ON_DEVICE else array.numpy() for name, array in found.items()}


# Compiled steps of each model, by XLA and not, kept as long as the model is.
_STEPS: weakref.WeakKeyDictionary["TFOPTForCausalLM", dict[bool, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def suits_xla(model: "TFOPTForCausalLM", tokens: int) -> bool:
    """Whether a step over so many tokens is to be XLA's.

    Only XLA's programs can call the library. On a CPU without it, or for more rows, TensorFlow's own kernels (oneDNN)
    multiply 16-bit numbers several times faster than XLA's, and 32-bit ones faster but for a single token. Integers are
    XLA's alone.
    """
    if model.config.quantization is not None or tf.config.list_physical_devices("GPU"):
        return True
    if native.is_registered() and model.compute_dtype in DTYPES and tokens <= MAX_ROWS:
        return True
    return model.compute_dtype != "bfloat16" and (model.compute_dtype != "float32" or tokens == 1)


def forget_compiled(model: Any) -> None:
    """Compile anew what a model's changed layers were compiled into: generation's step, and Keras' own functions."""
    _STEPS.pop(model, None)
    model.train_function = model.test_function = model.predict_function = None


def _compiled_step(model: "TFOPTForCausalLM", xla: bool) -> Callable[..., Any]:
    steps = _STEPS.setdefault(model, {})
    if xla in steps:
        return steps[xla]
    reference = weakref.ref(model)

    @tf.function(jit_compile=xla, autograph=False)
    @decoding(by_xla=xla)
    def step(
        program: Program,
        selection: Selection,
        keys: tuple[tf.Tensor, ...],
        values: tuple[tf.Tensor, ...],
        length: tf.Tensor,
        tokens_BS: tf.Tensor,
        mask_BS: tf.Tensor,
        states_BS1E: tf.Tensor | None,
        ids_BT: tf.Tensor,
        embeds_BTE: tf.Tensor | None,
        rows_B: tf.Tensor | None,
        text_start: tf.Tensor,
        arguments: tuple[tuple[tf.Tensor, ...], ...],
        guidance_scale: tf.Tensor | None,
        gates_P: tf.Tensor,
        choice_arguments: tuple[tf.Tensor, ...],
    ) -> tuple[Any, ...]:
        model = reference()
        assert model is not None
        given = KVCache(keys, values, length)
        cache = given.in_tensors()
        if rows_B is not None:
            cache = cache.reordered(rows_B)
            tokens_BS, mask_BS = tf.gather(tokens_BS, rows_B), tf.gather(mask_BS, rows_B)
            states_BS1E = None if states_BS1E is None else tf.gather(states_BS1E, rows_B)
        outputs = model.model.decoder(
            ids_BT,
            attention_mask=mask_BS,
            inputs_embeds=embeds_BTE,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=bool(selection.layers),
            call_layer=SharedLayer(by_xla=xla),
        )
        present = outputs.past_key_values
        if states_BS1E is not None:
            states_BS1E = append(states_BS1E, outputs.last_hidden_state[:, :, None], length)
        slots_S = tf.range(mask_BS.shape[1])
        # Gathered: XLA would compile a slice anew for each offset.
        given_BS = tf.gather(ids_BT, tf.clip_by_value(slots_S - length, 0, tf.shape(ids_BT)[1] - 1), axis=1)
        new_S = (slots_S >= length) & (slots_S < present.length)
        tokens_BS = tf.where(new_S, given_BS, tokens_BS)
        attended_BS = (mask_BS > 0) & (slots_S >= text_start) & (slots_S < present.length)
        history = History(tokens_BS=tokens_BS, attended_BS=attended_BS, length=present.length)
        reach = selection.reach
        hidden_BE = tf.reshape(outputs.last_hidden_state[:, -reach:], (-1, outputs.last_hidden_state.shape[2]))
        if reach > 1:
            history = history.each(reach)
        found = {}
        if selection.name == "contrast":
            assert states_BS1E is not None
            before_BS = (mask_BS > 0) & (slots_S < present.length - 1)
            found["places"] = preferred(states_BS1E[:, :, 0], before_BS, hidden_BE, *choice_arguments)
            kept_B = rows_of(found["places"], selection.size)
            hidden_BE, history = tf.gather(hidden_BE, kept_B), history.of(kept_B)
        logits_BV = model.logits(hidden_BE)
        logits_BV = tf.cast(logits_BV, tf.float64 if logits_BV.dtype == tf.float64 else tf.float32)
        unconditional_BV = None
        if guidance_scale is not None:
            logits_BV, unconditional_BV = tf.split(logits_BV, 2)
            history = history.of(tf.range(tf.shape(logits_BV)[0]))
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
        if given.is_in_variables:
            given.assign(present)
            return found, None, None, tokens_BS, mask_BS, states_BS1E
        return found, present.keys, present.values, tokens_BS, mask_BS, states_BS1E

    steps[xla] = step
    return step
