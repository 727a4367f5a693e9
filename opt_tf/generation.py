"""Text generation in TensorFlow: the decoder that `opt_common.generation` drives."""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from opt_common.generation import Choice, Ids, Prompt, bucket, decode, read_prompt
from opt_common.processors import Program, program
from opt_tf.cache import KVCache
from opt_tf.processors import History, choose, process

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def generate(
    model: "TFOPTForCausalLM",
    input_ids: Any,
    attention_mask: Any = None,
    logits_processor: Sequence[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = (),
    **settings: Any,
) -> tf.Tensor:
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
        filled with the pad token.

    Raises:
        InputError: for ids out of range, an empty prompt or a mask that does not fit.
        GenerationError: for a setting that cannot be or changes nothing, a continuation with no room, or a row for
            which the settings rule out every token.
    """
    options = model.generation_config.updated(**settings)
    host_mask = None if attention_mask is None else np.asarray(attention_mask)
    prompt = read_prompt(model.config, options, np.asarray(input_ids), host_mask, functions=logits_processor)
    decoder = Decoder(model, prompt)
    new_ids = list(decode(decoder, prompt, options))
    input_ids = tf.repeat(input_ids, options.num_return_sequences, axis=0)
    return tf.concat((input_ids, tf.cast(tf.stack(new_ids, axis=1), input_ids.dtype)), axis=1)


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

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids, choice: Choice) -> Ids:
        """Read the prompts, padded on the left, and return the next token of each row, (B,)."""
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

    def decode_one_token(self, tokens_B: Ids, choice: Choice) -> Ids:
        """Read one more token of each row and return the next, (B,); -1 where every token is ruled out."""
        return self.step(tokens_B[:, None], choice)

    def step(self, ids_BT: Ids, choice: Choice) -> Ids:
        """Read tokens and choose the next one."""
        cache = self.cache
        tokens_B, keys, values, self.tokens_BS = _compiled_step(self.model)(
            self.program,
            cache.keys,
            cache.values,
            tf.constant(cache.length, tf.int32),
            self.tokens_BS,
            self.mask_BS,
            tf.convert_to_tensor(ids_BT, tf.int32),
            self.arguments,
            tf.constant(choice.gates_P),
            None if choice.uniforms_B is None else tf.constant(choice.uniforms_B),
        )
        self.cache = KVCache(keys, values, cache.length + ids_BT.shape[1])
        return tokens_B.numpy()


# One compiled step a model, kept as long as the model is.
_STEPS: weakref.WeakKeyDictionary["TFOPTForCausalLM", Callable[..., Any]] = weakref.WeakKeyDictionary()


def _compiled_step(model: "TFOPTForCausalLM") -> Callable[..., Any]:
    if model in _STEPS:
        return _STEPS[model]
    reference = weakref.ref(model)

    @tf.function(jit_compile=True, autograph=False)
    def step(
        program: Program,
        keys: tuple[tf.Tensor, ...],
        values: tuple[tf.Tensor, ...],
        length: tf.Tensor,
        tokens_BS: tf.Tensor,
        mask_BS: tf.Tensor,
        ids_BT: tf.Tensor,
        arguments: tuple[tuple[tf.Tensor, ...], ...],
        gates_P: tf.Tensor,
        uniforms_B: tf.Tensor | None,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...], tuple[tf.Tensor, ...], tf.Tensor]:
        model = reference()
        assert model is not None
        cache = KVCache(keys, values, length)
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
        scores_BV = tf.cast(logits_BV, tf.float64 if logits_BV.dtype == tf.float64 else tf.float32)
        scores_BV = process(scores_BV, history, program, arguments, gates_P)
        return choose(scores_BV, uniforms_B), present.keys, present.values, tokens_BS

    _STEPS[model] = step
    return step
