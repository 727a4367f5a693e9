"""The OPT model in TensorFlow, as Keras 3 models.

    TFOPTForCausalLM ── lm_head ─────────────────────────── logits BTV
      TFOPTModel ── checks its inputs
        TFOPTDecoder
          embed_tokens BT → BTE, project_in BTE → BTD ─┐
          embed_positions BT → BTD ────────────────────┴ + → BTD
          layers: TFOPTDecoderLayer = TFOPTAttention + feed-forward, BTD → BTD
          final_layer_norm, project_out BTD → BTE

Names and numbers are Hugging Face's; the definition is `opt_common.reference`. Axis letters: B batch, T query length,
S key length, D hidden_size, N heads, H head_dim, F ffn_dim, E word_embed_proj_dim, V vocabulary.
"""

# TensorFlow's and Keras' annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opt_common.config import POSITION_OFFSET, OPTConfig, problem_type_of
from opt_common.errors import MissingFrameworkError
from opt_common.generation import GenerationConfig
from opt_common.inputs import check_inputs, reject_dropped
from opt_common.outputs import GenerateOutput, OPTCausalLMOutput, OPTModelOutput
from opt_common.params import Head
from opt_common.tokenizer import OPTTokenizer
from opt_tf.attention import DEFAULT_IMPLEMENTATION, Masking, attend, attention_bias, check_implementation
from opt_tf.cache import KVCache, is_traced
from opt_tf.checkpoint import Pretrained
from opt_tf.generation import generate, generate_text, stream
from opt_tf.layers import ACTIVATION_FUNCTIONS, Builder, Embedding, Linear, multiply
from opt_tf.lora import Adaptable
from opt_tf.quantized import Int8Embedding
from opt_tf.training import Trainable, causal_lm_loss, register_record, run_again

if keras.version().startswith("2."):
    raise MissingFrameworkError(f"opt_tf needs Keras 3, got Keras {keras.version()}: pip install 'keras>=3.5'.")
if keras.backend.backend() != "tensorflow":
    raise MissingFrameworkError(
        f"opt_tf needs Keras on TensorFlow, but Keras runs on {keras.backend.backend()}. "
        "Set the environment variable KERAS_BACKEND=tensorflow before Python starts, or use opt_flax or opt_torch."
    )


register_record(OPTModelOutput)
register_record(OPTCausalLMOutput)


def positions(attention_mask_BS: tf.Tensor) -> tf.Tensor:
    """The position rule: attended tokens count 0, 1, 2, …; a masked slot is -1."""
    return tf.cumsum(attention_mask_BS, axis=1) * attention_mask_BS - 1


class TFOPTAttention(keras.layers.Layer):
    """Multi-head self-attention."""

    def __init__(self, config: OPTConfig, build: Builder) -> None:
        super().__init__(dtype=build.dtype, name="self_attn")
        D = config.hidden_size
        self.config = config
        self.k_proj = build.linear(D, D, use_bias=config.enable_bias, name="k_proj")
        self.v_proj = build.linear(D, D, use_bias=config.enable_bias, name="v_proj")
        self.q_proj = build.linear(D, D, use_bias=config.enable_bias, name="q_proj")
        self.out_proj = build.linear(D, D, use_bias=config.enable_bias, name="out_proj")
        self.dropout = build.dropout(config.attention_dropout)

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        for layer in (self.k_proj, self.v_proj, self.q_proj, self.out_proj):
            layer.build()

    def call(
        self,
        hidden_BTD: tf.Tensor,
        masking: Masking,
        past: tuple[tf.Tensor, tf.Tensor] | None = None,
        offset: int | tf.Tensor = 0,
        output_attentions: bool = False,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor], tf.Tensor | None]:
        """Attend, to the past too.

        Args:
            hidden_BTD: input.
            masking: what each query may attend to.
            past: this layer's buffers of the cache, (B, S, N, H) each.
            offset: number of tokens in the cache.
            output_attentions: whether the probabilities are wanted.

        Returns:
            The output (B, T, D), the buffers with the new tokens appended, the probabilities (B, N, T, S) or None.
        """
        B, T, D = keras.ops.shape(hidden_BTD)
        N, H = self.config.num_attention_heads, self.config.head_dim
        # Scaled before the product with the keys, bias included: in half precision the order shows.
        q_BTNH = tf.reshape(self.q_proj(hidden_BTD) * H**-0.5, (B, T, N, H))
        k_BTNH = tf.reshape(self.k_proj(hidden_BTD), (B, T, N, H))
        v_BTNH = tf.reshape(self.v_proj(hidden_BTD), (B, T, N, H))
        context_BTNH, present, probs_BNTS = attend(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            masking,
            past,
            offset,
            dropout=self.dropout,
            need_probs=output_attentions,
        )
        return self.out_proj(tf.reshape(context_BTNH, (B, T, D))), present, probs_BNTS


class TFOPTDecoderLayer(keras.layers.Layer):
    """Attention and feed-forward, each added to its input; normed before (pre-norm) or after (post-norm, 350m)."""

    def __init__(self, config: OPTConfig, build: Builder, *, name: str) -> None:
        super().__init__(dtype=build.dtype, name=name)
        D, F = config.hidden_size, config.ffn_dim
        affine = config.layer_norm_elementwise_affine
        self.config = config
        self.self_attn = TFOPTAttention(config, build)
        self.self_attn_layer_norm = build.layer_norm(D, affine=affine, name="self_attn_layer_norm")
        self.fc1 = build.linear(D, F, use_bias=config.enable_bias, name="fc1")
        self.fc2 = build.linear(F, D, use_bias=config.enable_bias, name="fc2")
        self.final_layer_norm = build.layer_norm(D, affine=affine, name="final_layer_norm")
        self.dropout = build.dropout(config.dropout)

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        for layer in (self.self_attn, self.self_attn_layer_norm, self.fc1, self.fc2, self.final_layer_norm):
            layer.build()

    def call(
        self,
        hidden_BTD: tf.Tensor,
        masking: Masking,
        past: tuple[tf.Tensor, tf.Tensor] | None = None,
        offset: int | tf.Tensor = 0,
        output_attentions: bool = False,
        training: bool | None = None,
    ) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor], tf.Tensor | None]:
        """Arguments and results are those of `TFOPTAttention`."""
        pre_norm = self.config.do_layer_norm_before
        activation = ACTIVATION_FUNCTIONS[self.config.activation_function]

        residual_BTD = hidden_BTD
        if pre_norm:
            hidden_BTD = self.self_attn_layer_norm(hidden_BTD)
        hidden_BTD, present, probs_BNTS = self.self_attn(
            hidden_BTD, masking=masking, past=past, offset=offset, output_attentions=output_attentions
        )
        hidden_BTD = residual_BTD + self.dropout(hidden_BTD)
        if not pre_norm:
            hidden_BTD = self.self_attn_layer_norm(hidden_BTD)

        residual_BTD = hidden_BTD
        if pre_norm:
            hidden_BTD = self.final_layer_norm(hidden_BTD)
        hidden_BTF = activation(self.fc1(hidden_BTD))
        hidden_BTD = residual_BTD + self.dropout(self.fc2(hidden_BTF))
        if not pre_norm:
            hidden_BTD = self.final_layer_norm(hidden_BTD)
        return hidden_BTD, present, probs_BNTS


class TFOPTDecoder(keras.layers.Layer):
    """Embeddings, layers, final norm. Takes its inputs as they are; `TFOPTModel` checks them."""

    def __init__(self, config: OPTConfig, build: Builder) -> None:
        super().__init__(dtype=build.dtype, name="decoder")
        V, E, D = config.vocab_size, config.word_embed_proj_dim, config.hidden_size
        self.config = config
        self.embed_tokens = build.vocabulary(V, E, pad=config.pad_token_id, name="embed_tokens")
        P = config.max_position_embeddings + POSITION_OFFSET
        self.embed_positions = build.embedding(P, D, name="embed_positions")
        if config.has_projection:
            self.project_out = build.linear(D, E, use_bias=False, name="project_out")
            self.project_in = build.linear(E, D, use_bias=False, name="project_in")
        if config.has_final_layer_norm:
            affine = config.layer_norm_elementwise_affine
            self.final_layer_norm = build.layer_norm(D, affine=affine, name="final_layer_norm")
        self.layers = [TFOPTDecoderLayer(config, build, name=f"layers.{i}") for i in range(config.num_hidden_layers)]
        self.layer_dropout = build.dropout(config.layerdrop)
        self.checkpoint_every = 0

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        for name in ("embed_tokens", "embed_positions", "project_out", "project_in", "final_layer_norm"):
            if hasattr(self, name):
                getattr(self, name).build()
        for layer in self.layers:
            layer.build()

    def call(
        self,
        input_ids: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool | None = None,
        call_layer: Callable[..., Any] | None = None,
    ) -> OPTModelOutput:
        """Arguments and result are those of `TFOPTModel`; `call_layer` calls a layer in its place."""
        tokens_BTE = self.embed(input_ids, inputs_embeds)
        T = keras.ops.shape(tokens_BTE)[1]
        cache = None if past_key_values is None else past_key_values.with_room(T)
        offset = 0 if cache is None else cache.length
        if attention_mask is not None and cache is not None:
            # Slots that hold nothing yet come after every query: what the mask says of them does not matter.
            unused = cache.capacity - attention_mask.shape[1]
            attention_mask = tf.pad(attention_mask, ((0, 0), (0, unused)), constant_values=1)

        hidden_BTD = self.project_in(tokens_BTE) if self.config.has_projection else tokens_BTE
        positions_BT = self.place(attention_mask, position_ids, T, offset)
        hidden_BTD = hidden_BTD + self.embed_positions(positions_BT + POSITION_OFFSET)
        masking = self.masking(attention_mask, cache, T, offset, hidden_BTD)

        recompute = self.checkpoint_every > 0 and training and cache is None and not use_cache
        hidden_states: list[tf.Tensor] = []
        attentions: list[tf.Tensor | None] = []
        presents: list[tuple[tf.Tensor, tf.Tensor]] = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(hidden_BTD)
            past = None if cache is None else (cache.keys[index], cache.values[index])
            if recompute and index % self.checkpoint_every == 0:
                new_BTD, probs_BNTS = run_again(layer, hidden_BTD, masking, output_attentions)
            else:
                call = layer if call_layer is None else functools.partial(call_layer, layer)
                new_BTD, present, probs_BNTS = call(
                    hidden_BTD, masking=masking, past=past, offset=offset, output_attentions=output_attentions
                )
                if use_cache:
                    presents.append(present)
            hidden_BTD = self.drop_layer(hidden_BTD, new_BTD)
            attentions.append(probs_BNTS)
        if output_attentions and not is_traced(offset):
            # No token, no probability: the cache's unused slots are cut off where their number is known.
            attentions = [probs_BNTS[..., : offset + T] for probs_BNTS in attentions]

        if self.config.has_final_layer_norm:
            hidden_BTD = self.final_layer_norm(hidden_BTD)
        hidden_BTE = self.project_out(hidden_BTD) if self.config.has_projection else hidden_BTD
        hidden_states.append(hidden_BTE)

        if use_cache:
            keys, values = zip(*presents, strict=True)
            cache = KVCache(keys, values, T) if cache is None else cache.extended(keys, values, T)
        return OPTModelOutput(
            last_hidden_state=hidden_BTE,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def embed(self, input_ids: tf.Tensor | None, inputs_embeds: tf.Tensor | None) -> tf.Tensor:
        """Rows of the token table, or what stands in their place, (B, T, E). The pad row gets no gradient from here."""
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        tokens_BTE = self.embed_tokens(input_ids)
        if self.config.pad_token_id is None:
            return tokens_BTE
        is_pad_BT1 = (input_ids == self.config.pad_token_id)[..., None]
        return tf.where(is_pad_BT1, tf.stop_gradient(tokens_BTE), tokens_BTE)

    def place(
        self, attention_mask: tf.Tensor | None, position_ids: tf.Tensor | None, T: int, offset: int | tf.Tensor
    ) -> tf.Tensor:
        """Positions of the new tokens, (B or 1, T)."""
        if position_ids is not None:
            return position_ids
        if attention_mask is None:
            return offset + tf.range(T)[None]
        # Gathered, not sliced: XLA compiles a slice anew for every offset.
        return tf.gather(positions(tf.cast(attention_mask, tf.int32)), offset + tf.range(T), axis=1)

    def masking(
        self,
        attention_mask: tf.Tensor | None,
        cache: KVCache | None,
        T: int,
        offset: int | tf.Tensor,
        hidden_BTD: tf.Tensor,
    ) -> Masking:
        """What the new tokens may attend to, the same for every layer."""
        S = T if cache is None else cache.capacity
        if attention_mask is None and cache is None:
            return Masking()
        return Masking(attention_bias(attention_mask, T, S, offset, hidden_BTD))

    def drop_layer(self, hidden_BTD: tf.Tensor, new_BTD: tf.Tensor) -> tf.Tensor:
        """LayerDrop: in training, with probability `layerdrop`, a layer passes its input through."""
        if self.config.layerdrop == 0:
            return new_BTD
        keep = self.layer_dropout(tf.ones((), new_BTD.dtype)) > 0
        return tf.where(keep, new_BTD, hidden_BTD)


@keras.saving.register_keras_serializable(package="opt_tf")
class TFOPTModel(Adaptable, Trainable, Pretrained, keras.Model):
    """The bare decoder: token ids in, hidden states out."""

    head = None

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: Any = None,
        new_weights: bool = True,
        name: str | None = None,
    ) -> None:
        """A model with new weights.

        Args:
            config: shape and options.
            attn_implementation: one of `opt_tf.attention.IMPLEMENTATIONS`; None means "eager".
            dtype: a dtype or a Keras dtype policy; None means Keras' global policy.
            new_weights: False leaves every weight zero, for a loader to fill.
            name: the model's name.
        """
        super().__init__(dtype=dtype, name=name)
        self.config = config
        self.attn_implementation = check_implementation(attn_implementation or DEFAULT_IMPLEMENTATION)
        build = Builder(config, self.dtype_policy, new_weights)
        self.decoder = TFOPTDecoder(config, build)
        self.build()

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        if not self.decoder.built:
            self.decoder.build()

    def __call__(self, *arguments: Any, **options: Any) -> OPTModelOutput:
        """`call`, after its arguments are checked. A dictionary of them will do as the first argument."""
        options = check_call(self, arguments, options)
        return super().__call__(**options)

    def call(
        self,
        input_ids: Any | None = None,
        attention_mask: Any | None = None,
        position_ids: Any | None = None,
        inputs_embeds: Any | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool | None = None,
    ) -> OPTModelOutput:
        """Compute hidden states.

        Args:
            input_ids: (B, T) integers from 0 to V - 1; or give `inputs_embeds`.
            attention_mask: (B, past + T), 1 for a token and 0 for padding on either side or in between; None means no
                padding, which is faster. Outputs at masked positions are finite and mean nothing.
            position_ids: (B, T) from 0 to max_position_embeddings - 1, -1 for padding; None counts attended tokens.
            inputs_embeds: (B, T, E), in place of the rows of the token table.
            past_key_values: the cache of an earlier call; may be allocated in advance with `KVCache.allocate`.
            use_cache: whether to return a cache; None means `config.use_cache`, and none in training or with labels.
            output_hidden_states: whether to return every layer's input.
            output_attentions: whether to return attention probabilities.
            training: whether dropout is on; Keras knows inside `fit`.

        Raises:
            InputError: for ids or positions out of range, an empty or over-long input, shapes that do not match, or
                an argument of Hugging Face's that was dropped.
        """
        return self.decoder(
            input_ids=None if input_ids is None else tf.convert_to_tensor(input_ids),
            attention_mask=None if attention_mask is None else tf.convert_to_tensor(attention_mask),
            position_ids=None if position_ids is None else tf.convert_to_tensor(position_ids),
            inputs_embeds=None if inputs_embeds is None else tf.cast(inputs_embeds, self.compute_dtype),
            past_key_values=past_key_values,
            use_cache=(self.config.use_cache and not training) if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    def get_input_embeddings(self) -> keras.layers.Embedding | Int8Embedding:
        """The token table."""
        return self.decoder.embed_tokens

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes an equal model from, without its weights."""
        return {
            "config": self.config.to_dict(),
            "attn_implementation": self.attn_implementation,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "TFOPTModel":
        """The model that `get_config` described, with new weights."""
        values = {**config, "dtype": keras.saving.deserialize_keras_object(config["dtype"])}
        return cls(OPTConfig.from_dict(values.pop("config")), **values)


@keras.saving.register_keras_serializable(package="opt_tf")
class TFOPTForCausalLM(Adaptable, Trainable, Pretrained, keras.Model):
    """The language model: token ids in, logits of the next token out."""

    head = "lm"

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: Any = None,
        new_weights: bool = True,
        name: str | None = None,
    ) -> None:
        """A model with new weights. Arguments are those of `TFOPTModel`."""
        super().__init__(dtype=dtype, name=name)
        V, E = config.vocab_size, config.word_embed_proj_dim
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)
        self.model = TFOPTModel(
            config,
            attn_implementation=attn_implementation,
            dtype=self.dtype_policy,
            new_weights=new_weights,
            name="model",
        )
        if not config.tie_word_embeddings:
            build = Builder(config, self.dtype_policy, new_weights)
            self.lm_head = build.head(E, V, name="lm_head")
        self.build()

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        if not self.config.tie_word_embeddings:
            self.lm_head.build()

    def __call__(self, *arguments: Any, **options: Any) -> OPTCausalLMOutput:
        """`call`, after its arguments are checked. A dictionary of them will do as the first argument."""
        options = check_call(self, arguments, options)
        return super().__call__(**options)

    def call(
        self,
        input_ids: Any | None = None,
        attention_mask: Any | None = None,
        position_ids: Any | None = None,
        inputs_embeds: Any | None = None,
        past_key_values: KVCache | None = None,
        labels: Any | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool | None = None,
        num_items_in_batch: int | tf.Tensor | None = None,
        training: bool | None = None,
    ) -> OPTCausalLMOutput:
        """Compute logits and, given labels, the loss.

        Args:
            labels: (B, T) ids; position t is scored on label t + 1, and -100 does not count.
            output_logits: whether to return logits. None means yes, but no in training with labels: there the loss is
                what is wanted, and logits would take most of the memory.
            num_items_in_batch: what the sum over labels is divided by; None means the number of labels that count.
                Batches of one step of gradient accumulation are told the number of all of them together.

        The other arguments and the errors are those of `TFOPTModel`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )
        hidden_BTE = outputs.last_hidden_state
        if output_logits is None:
            output_logits = labels is None or not training
        loss = None
        if labels is not None:
            head = self.logits  # of a layer of another kind, such as one with an adapter or of 8 bits
            if self.config.tie_word_embeddings and type(self.get_input_embeddings()) is Embedding:
                head = (self.get_input_embeddings().embeddings, True)
            elif not self.config.tie_word_embeddings and type(self.lm_head) is Linear:
                head = (self.lm_head.kernel, False)
            labels = tf.convert_to_tensor(labels)
            loss = causal_lm_loss(head, hidden_BTE, labels, self.config.vocab_size, num_items_in_batch, training)
        return OPTCausalLMOutput(
            loss=loss,
            logits=self.logits(hidden_BTE) if output_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def logits(self, hidden_BTE: tf.Tensor) -> tf.Tensor:
        """The head: hidden states (…, E) to logits (…, V)."""
        table = self.get_input_embeddings()
        if self.config.tie_word_embeddings and isinstance(table, Int8Embedding):
            return table.attend(hidden_BTE)
        if self.config.tie_word_embeddings:
            table_VE = tf.cast(table.embeddings, hidden_BTE.dtype)
            return multiply(hidden_BTE, table_VE, transposed=True)
        return self.lm_head(hidden_BTE)

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> tf.Tensor | GenerateOutput:
        """Continue each prompt; see `opt_tf.generation.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    def stream(self, text: str, tokenizer: OPTTokenizer, **options: Any) -> Iterator[str]:
        """Continue one text, piece by piece; see `opt_tf.generation.stream`."""
        return stream(self, text, tokenizer, **options)

    def generate_text(self, text: str | Sequence[str], tokenizer: OPTTokenizer, **options: Any) -> str | list[str]:
        """Continue texts; see `opt_tf.generation.generate_text`."""
        return generate_text(self, text, tokenizer, **options)

    def get_input_embeddings(self) -> keras.layers.Embedding | Int8Embedding:
        """The token table."""
        return self.model.get_input_embeddings()

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes an equal model from, without its weights."""
        return {
            "config": self.config.to_dict(),
            "attn_implementation": self.model.attn_implementation,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "TFOPTForCausalLM":
        """The model that `get_config` described, with new weights."""
        values = {**config, "dtype": keras.saving.deserialize_keras_object(config["dtype"])}
        return cls(OPTConfig.from_dict(values.pop("config")), **values)


def check_call(model: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model call by name, checked. Outside `call`, where Keras would bury an error's sentence."""
    if arguments and isinstance(arguments[0], Mapping):
        options = {**arguments[0], **options}
        arguments = arguments[1:]
    signature = inspect.signature(model.call)
    reject_dropped({name: options.pop(name) for name in options.keys() - signature.parameters.keys()})
    options = signature.bind(*arguments, **options).arguments
    if any(map(keras.backend.is_keras_tensor, options.values())):
        options.setdefault("use_cache", False)  # a functional model has tensors for outputs, and a cache is none
    names = ("past_key_values", "input_ids", "inputs_embeds", "attention_mask", "position_ids")
    targets = ("labels", "start_positions", "end_positions")
    check(model.config, **{name: options.get(name) for name in names + targets}, head=model.head)
    return options


def check(
    config: OPTConfig,
    past_key_values: KVCache | None,
    input_ids: Any | None,
    inputs_embeds: Any | None,
    attention_mask: Any | None = None,
    position_ids: Any | None = None,
    labels: Any | None = None,
    start_positions: Any | None = None,
    end_positions: Any | None = None,
    *,
    head: Head | None = "lm",
) -> None:
    """Hold the arguments against `opt_common.inputs.check_inputs`; under a compiler, their shapes only."""
    arrays = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "labels": labels,
        "start_positions": start_positions,
        "end_positions": end_positions,
    }
    arrays = {
        name: array if hasattr(array, "shape") else np.asarray(array)
        for name, array in arrays.items()
        if array is not None
    }
    length = 0 if past_key_values is None else past_key_values.length
    if any(None in array.shape for array in arrays.values()):
        return  # Keras does not know the lengths yet, and calls again when it does
    check_inputs(
        config,
        shapes={name: tuple(array.shape) for name, array in arrays.items()},
        values={
            name: np.asarray(array)
            for name, array in arrays.items()
            if not is_traced(array) and name != "inputs_embeds"
        },
        past_length=None if is_traced(length) else int(length),
        past_shape=None if past_key_values is None else tuple(past_key_values.keys[0].shape),
        head=head,
        problem_type=problem_type_of(config, arrays["labels"].dtype) if "labels" in arrays else None,
    )
