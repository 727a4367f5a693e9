"""Text generation in TensorFlow: the decoder that `opt_common.generation` drives."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from opt_common.generation import Ids, bucket, decode, read_prompt
from opt_tf.cache import KVCache

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def generate(model: "TFOPTForCausalLM", input_ids: Any, attention_mask: Any = None, **settings: Any) -> tf.Tensor:
    """Continue each prompt with its likeliest tokens.

    Args:
        model: the language model.
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
    decoder = Decoder(model, prompt.new_tokens)
    new_ids = list(decode(decoder, prompt, options))
    input_ids = tf.convert_to_tensor(input_ids)
    return tf.concat((input_ids, tf.cast(tf.stack(new_ids, axis=1), input_ids.dtype)), axis=1)


class Decoder:
    """One run over a batch of prompts; holds the cache of that run.

    Shapes come in buckets, so that prompts of any length share a few compiled programs: a prompt is padded on the left
    to its bucket, and the cache has room for a bucket of tokens.
    """

    def __init__(self, model: "TFOPTForCausalLM", new_tokens: int) -> None:
        self.model = model
        self.new_tokens = new_tokens

    def prefill(self, input_ids_BT: Ids, attention_mask_BT: Ids) -> Ids:
        """Read the prompts, padded on the left, and return the next token of each row, (B,)."""
        B, T = input_ids_BT.shape
        padding = bucket(T) - T
        capacity = bucket(bucket(T) + self.new_tokens)
        self.cache = KVCache.allocate(self.model.config, B, capacity, dtype=self.model.compute_dtype)
        mask_BS = np.ones((B, capacity), dtype=np.int32)
        mask_BS[:, :padding] = 0
        mask_BS[:, padding : padding + T] = attention_mask_BT
        self.mask_BS = tf.convert_to_tensor(mask_BS)
        return self.step(np.pad(input_ids_BT, ((0, 0), (padding, 0))))

    def decode_one_token(self, tokens_B: Ids) -> Ids:
        """Read one more token of each row and return the next, (B,)."""
        return self.step(tokens_B[:, None])

    def step(self, ids_BT: Ids) -> Ids:
        """Read tokens and choose the likeliest next one, the lower id where two are equal."""
        cache = self.cache
        tokens_B, keys, values = _compiled_step(self.model)(
            cache.keys,
            cache.values,
            tf.constant(cache.length, tf.int32),
            tf.convert_to_tensor(ids_BT, tf.int32),
            self.mask_BS,
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
        keys: tuple[tf.Tensor, ...],
        values: tuple[tf.Tensor, ...],
        length: tf.Tensor,
        ids_BT: tf.Tensor,
        mask_BS: tf.Tensor,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
        model = reference()
        assert model is not None
        cache = KVCache(keys, values, length)
        outputs = model.model.decoder(ids_BT, attention_mask=mask_BS, past_key_values=cache, use_cache=True)
        logits_BV = model.logits(outputs.last_hidden_state[:, -1])
        present = outputs.past_key_values
        return tf.argmax(logits_BV, axis=-1), present.keys, present.values

    _STEPS[model] = step
    return step
