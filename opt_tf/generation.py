"""Text generation in TensorFlow: the decoder that `opt_common.generation` drives."""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from opt_common.decoding import Arrays, Choice, Generated, Ids, Prompt, Selection
from opt_common.generation import bucket, read_prompt, run
from opt_common.generation_config import GenerationConfig
from opt_common.outputs import GenerateOutput
from opt_common.processors import Program, program
from opt_tf.cache import KVCache
from opt_tf.processors import History
from opt_tf.selection import Step, select

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def generate(
    model: "TFOPTForCausalLM",
    input_ids: Any,
    attention_mask: Any = None,
    logits_processor: Sequence[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = (),
    **settings: Any,
) -> tf.Tensor | GenerateOutput:
    """Continue each prompt, by default with its likeliest tokens.

    Args:
        model: the language model.
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
    generated = run(Decoder(model, prompt), prompt, options)
    return results(input_ids, generated, options)


def results(input_ids: Any, generated: Generated, options: GenerationConfig) -> tf.Tensor | GenerateOutput:
    """What `generate` returns, in the framework's arrays."""
    input_ids = tf.repeat(input_ids, options.num_return_sequences, axis=0)
    sequences = tf.concat((input_ids, tf.cast(generated.new_ids, input_ids.dtype)), axis=1)
    return generated.output(sequences, tf.constant) if options.return_dict_in_generate else sequences


class Decoder:
    """One run over a batch of prompts; holds the cache of that run.

    Shapes come in buckets, so that prompts of any length share a few compiled programs: a prompt is padded on the left
    to its bucket, and the cache has room for a bucket of tokens.
    """

    def __init__(self, model: "TFOPTForCausalLM", prompt: Prompt) -> None:
        self.model = model
        self.new_tokens = prompt.new_tokens
        self.program = program(prompt.processors)
        self.arguments = tuple(tuple(map(tf.constant, processor.arguments)) for processor in prompt.processors)

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Arrays:
        """Read the prompts, padded on the left, and select what follows the last token of each."""
        B, T = input_ids_BT.shape
        padding = bucket(T) - T
        capacity = bucket(bucket(T) + self.new_tokens)
        self.cache = KVCache.allocate(self.model.config, B, capacity, dtype=self.model.compute_dtype)
        mask_BS = np.ones((B, capacity), dtype=np.int32)
        mask_BS[:, :padding] = 0
        mask_BS[:, padding : padding + T] = attention_mask_BT
        self.mask_BS = tf.convert_to_tensor(mask_BS)
        self.tokens_BS = tf.zeros_like(self.mask_BS)
        return self.step(np.pad(input_ids_BT, ((0, 0), (padding, 0))), choice)

    def decode(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Continue the rows that the choice names by one or several tokens each, and select what follows the last."""
        return self.step(ids_BT, choice)

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens of every row, as if they had not been read."""
        self.cache = self.cache.cropped(self.cache.length - count)

    def step(self, ids_BT: Ids, choice: Choice) -> Arrays:
        """Read tokens and select what follows the last."""
        cache = self.cache
        rows_B = None if choice.rows_B is None else tf.constant(choice.rows_B, tf.int32)
        found, keys, values, self.tokens_BS, self.mask_BS = _compiled_step(self.model)(
            self.program,
            choice.selection,
            cache.keys,
            cache.values,
            tf.constant(cache.length, tf.int32),
            self.tokens_BS,
            self.mask_BS,
            tf.convert_to_tensor(ids_BT, tf.int32),
            rows_B,
            self.arguments,
            tf.constant(choice.gates_P),
            tuple(map(tf.constant, choice.arguments)),
        )
        self.cache = KVCache(keys, values, cache.length + ids_BT.shape[1])
        return {name: array.numpy() for name, array in found.items()}


# One compiled step a model, kept as long as the model is.
_STEPS: weakref.WeakKeyDictionary["TFOPTForCausalLM", Callable[..., Any]] = weakref.WeakKeyDictionary()


def forget_compiled(model: Any) -> None:
    """Compile anew what a model's changed layers were compiled into: generation's step, and Keras' own functions."""
    _STEPS.pop(model, None)
    model.train_function = model.test_function = model.predict_function = None


def _compiled_step(model: "TFOPTForCausalLM") -> Callable[..., Any]:
    if model in _STEPS:
        return _STEPS[model]
    reference = weakref.ref(model)

    @tf.function(jit_compile=True, autograph=False)
    def step(
        program: Program,
        selection: Selection,
        keys: tuple[tf.Tensor, ...],
        values: tuple[tf.Tensor, ...],
        length: tf.Tensor,
        tokens_BS: tf.Tensor,
        mask_BS: tf.Tensor,
        ids_BT: tf.Tensor,
        rows_B: tf.Tensor | None,
        arguments: tuple[tuple[tf.Tensor, ...], ...],
        gates_P: tf.Tensor,
        choice_arguments: tuple[tf.Tensor, ...],
    ) -> tuple[dict[str, tf.Tensor], tuple[tf.Tensor, ...], tuple[tf.Tensor, ...], tf.Tensor, tf.Tensor]:
        model = reference()
        assert model is not None
        cache = KVCache(keys, values, length)
        if rows_B is not None:
            cache = cache.reordered(rows_B)
            tokens_BS, mask_BS = tf.gather(tokens_BS, rows_B), tf.gather(mask_BS, rows_B)
        outputs = model.model.decoder(ids_BT, attention_mask=mask_BS, past_key_values=cache, use_cache=True)
        present = outputs.past_key_values
        slots_S = tf.range(mask_BS.shape[1])
        # Gathered: XLA would compile a slice anew for each offset.
        given_BS = tf.gather(ids_BT, tf.clip_by_value(slots_S - length, 0, tf.shape(ids_BT)[1] - 1), axis=1)
        new_S = (slots_S >= length) & (slots_S < present.length)
        tokens_BS = tf.where(new_S, given_BS, tokens_BS)
        attended_BS = (mask_BS > 0) & (slots_S < present.length)
        history = History(tokens_BS=tokens_BS, attended_BS=attended_BS, length=present.length)
        logits_BV = model.logits(outputs.last_hidden_state[:, -1])
        step = Step(
            logits_BV=tf.cast(logits_BV, tf.float64 if logits_BV.dtype == tf.float64 else tf.float32),
            history=history,
            program=program,
            arguments=arguments,
            gates_P=gates_P,
        )
        return select(step, selection, choice_arguments), present.keys, present.values, tokens_BS, mask_BS

    _STEPS[model] = step
    return step
