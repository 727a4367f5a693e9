"""The OPT model in JAX, as Flax NNX modules.

    FlaxOPTForCausalLM ── lm_head ─────────────────────────── logits BTV
      FlaxOPTModel ── checks its inputs
        FlaxOPTDecoder
          embed_tokens BT → BTE, project_in BTE → BTD ─┐
          embed_positions BT → BTD ────────────────────┴ + → BTD
          layers: FlaxOPTDecoderLayer = FlaxOPTAttention + feed-forward, BTD → BTD
          final_layer_norm, project_out BTD → BTE

Names and numbers are Hugging Face's; the definition is `opt_common.reference`. Axis letters: B batch, T query length,
S key length, D hidden_size, N heads, H head_dim, F ffn_dim, E word_embed_proj_dim, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from opt_common.config import POSITION_OFFSET, OPTConfig, problem_type_of
from opt_common.generation import GenerationConfig
from opt_common.inputs import check_inputs, reject_dropped
from opt_common.outputs import GenerateOutput, OPTCausalLMOutput, OPTModelOutput
from opt_common.params import Head
from opt_common.tokenizer import OPTTokenizer
from opt_flax.attention import DEFAULT_IMPLEMENTATION, Masking, attend, attention_bias, check_implementation
from opt_flax.cache import KVCache
from opt_flax.checkpoint import Pretrained
from opt_flax.generation import generate, generate_text, stream
from opt_flax.layers import ACTIVATION_FUNCTIONS, Builder
from opt_flax.lora import Adaptable
from opt_flax.quantized import Int8Embedding
from opt_flax.training import Trainable, causal_lm_loss, run_again

# Results pass through jax.jit.
jax.tree_util.register_dataclass(OPTModelOutput)
jax.tree_util.register_dataclass(OPTCausalLMOutput)


def positions(attention_mask_BS: Array) -> Array:
    """The position rule: attended tokens count 0, 1, 2, …; a masked slot is -1."""
    return jnp.cumsum(attention_mask_BS, axis=1) * attention_mask_BS - 1


class FlaxOPTAttention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: OPTConfig, attn_implementation: str, build: Builder) -> None:
        D = config.hidden_size
        self.config = config
        self.attn_implementation = attn_implementation
        self.k_proj = build.linear(D, D, use_bias=config.enable_bias)
        self.v_proj = build.linear(D, D, use_bias=config.enable_bias)
        self.q_proj = build.linear(D, D, use_bias=config.enable_bias)
        self.out_proj = build.linear(D, D, use_bias=config.enable_bias)
        self.dropout = build.dropout(config.attention_dropout)

    def __call__(
        self,
        hidden_BTD: Array,
        masking: Masking,
        past: tuple[Array, Array] | None = None,
        offset: int | Array = 0,
        output_attentions: bool = False,
    ) -> tuple[Array, tuple[Array, Array], Array | None]:
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
        B, T, D = hidden_BTD.shape
        N, H = self.config.num_attention_heads, self.config.head_dim
        # Scaled before the product with the keys, bias included: in half precision the order shows.
        q_BTNH = (self.q_proj(hidden_BTD) * H**-0.5).reshape(B, T, N, H)
        k_BTNH = self.k_proj(hidden_BTD).reshape(B, T, N, H)
        v_BTNH = self.v_proj(hidden_BTD).reshape(B, T, N, H)
        dropping = self.config.attention_dropout > 0 and not self.dropout.deterministic
        context_BTNH, present, probs_BNTS = attend(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            masking,
            past,
            offset,
            implementation=self.attn_implementation,
            dropout=self.dropout if dropping else None,
            need_probs=output_attentions,
        )
        return self.out_proj(context_BTNH.reshape(B, T, D)), present, probs_BNTS


class FlaxOPTDecoderLayer(nnx.Module):
    """Attention and feed-forward, each added to its input; normed before (pre-norm) or after (post-norm, 350m)."""

    def __init__(self, config: OPTConfig, attn_implementation: str, build: Builder) -> None:
        D, F = config.hidden_size, config.ffn_dim
        affine = config.layer_norm_elementwise_affine
        self.config = config
        self.self_attn = FlaxOPTAttention(config, attn_implementation, build)
        self.self_attn_layer_norm = build.layer_norm(D, affine=affine)
        self.fc1 = build.linear(D, F, use_bias=config.enable_bias)
        self.fc2 = build.linear(F, D, use_bias=config.enable_bias)
        self.final_layer_norm = build.layer_norm(D, affine=affine)
        self.dropout = build.dropout(config.dropout)

    def __call__(
        self,
        hidden_BTD: Array,
        masking: Masking,
        past: tuple[Array, Array] | None = None,
        offset: int | Array = 0,
        output_attentions: bool = False,
    ) -> tuple[Array, tuple[Array, Array], Array | None]:
        """Arguments and results are those of `FlaxOPTAttention`."""
        pre_norm = self.config.do_layer_norm_before
        activation = ACTIVATION_FUNCTIONS[self.config.activation_function]

        residual_BTD = hidden_BTD
        if pre_norm:
            hidden_BTD = self.self_attn_layer_norm(hidden_BTD)
        hidden_BTD, present, probs_BNTS = self.self_attn(hidden_BTD, masking, past, offset, output_attentions)
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


class FlaxOPTDecoder(nnx.Module):
    """Embeddings, layers, final norm. Takes its inputs as they are; `FlaxOPTModel` checks them."""

    def __init__(self, config: OPTConfig, attn_implementation: str, build: Builder) -> None:
        V, E, D = config.vocab_size, config.word_embed_proj_dim, config.hidden_size
        self.config = config
        self.embed_tokens = build.vocabulary(V, E, pad=config.pad_token_id)
        self.embed_positions = build.embedding(config.max_position_embeddings + POSITION_OFFSET, D)
        if config.has_projection:
            self.project_out = build.linear(D, E, use_bias=False)
            self.project_in = build.linear(E, D, use_bias=False)
        if config.has_final_layer_norm:
            self.final_layer_norm = build.layer_norm(D, affine=config.layer_norm_elementwise_affine)
        self.layers = nnx.List(
            FlaxOPTDecoderLayer(config, attn_implementation, build) for _ in range(config.num_hidden_layers)
        )
        self.layer_dropout = build.dropout(config.layerdrop)
        self.checkpoint_every = 0

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        call_layer: Callable[..., Any] | None = None,
    ) -> OPTModelOutput:
        """Arguments and result are those of `FlaxOPTModel`; `call_layer` calls a layer in its place."""
        tokens_BTE = self.embed(input_ids, inputs_embeds)
        T = tokens_BTE.shape[1]
        cache = None if past_key_values is None else past_key_values.with_room(T)
        offset = 0 if cache is None else cache.length
        if attention_mask is not None and cache is not None:
            # Slots that hold nothing yet come after every query: what the mask says of them does not matter.
            unused = cache.capacity - attention_mask.shape[1]
            attention_mask = jnp.pad(attention_mask, ((0, 0), (0, unused)), constant_values=1)

        hidden_BTD = self.project_in(tokens_BTE) if self.config.has_projection else tokens_BTE
        positions_BT = self.place(attention_mask, position_ids, T, offset)
        hidden_BTD = hidden_BTD + self.embed_positions(positions_BT + POSITION_OFFSET)
        masking = self.masking(attention_mask, cache, T, offset, hidden_BTD)

        recompute = (
            self.checkpoint_every > 0 and not self.layer_dropout.deterministic and cache is None and not use_cache
        )
        hidden_states: list[Array] = []
        attentions: list[Any] = []
        presents: list[tuple[Array, Array]] = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(hidden_BTD)
            past = None if cache is None else (cache.keys[index], cache.values[index])
            if recompute and index % self.checkpoint_every == 0:
                new_BTD, probs_BNTS = run_again(layer, hidden_BTD, masking, output_attentions)
            else:
                call = layer if call_layer is None else functools.partial(call_layer, layer)
                new_BTD, present, probs_BNTS = call(hidden_BTD, masking, past, offset, output_attentions)
                if use_cache:
                    presents.append(present)
            hidden_BTD = self.drop_layer(hidden_BTD, new_BTD)
            attentions.append(probs_BNTS)
        if output_attentions and not isinstance(offset, Tracer):
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

    def embed(self, input_ids: Array | None, inputs_embeds: Array | None) -> Array:
        """Rows of the token table, or what stands in their place, (B, T, E). The pad row gets no gradient from here."""
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        tokens_BTE = self.embed_tokens(input_ids)
        if self.config.pad_token_id is None:
            return tokens_BTE
        is_pad_BT1 = (input_ids == self.config.pad_token_id)[..., None]
        return jnp.where(is_pad_BT1, lax.stop_gradient(tokens_BTE), tokens_BTE)

    def place(self, attention_mask: Array | None, position_ids: Array | None, T: int, offset: int | Array) -> Array:
        """Positions of the new tokens, (B or 1, T)."""
        if position_ids is not None:
            return position_ids
        if attention_mask is None:
            return offset + jnp.arange(T)[None]
        return lax.dynamic_slice_in_dim(positions(attention_mask.astype(jnp.int32)), offset, T, axis=1)

    def masking(
        self, attention_mask: Array | None, cache: KVCache | None, T: int, offset: int | Array, hidden_BTD: Array
    ) -> Masking:
        """What the new tokens may attend to, the same for every layer."""
        S = T if cache is None else cache.capacity
        if attention_mask is None and cache is None:
            return Masking()
        return Masking(attention_bias(attention_mask, T, S, offset, hidden_BTD))

    def drop_layer(self, hidden_BTD: Array, new_BTD: Array) -> Array:
        """LayerDrop: in training, with probability `layerdrop`, a layer passes its input through."""
        if self.layer_dropout.deterministic or self.config.layerdrop == 0:
            return new_BTD
        keep = self.layer_dropout(jnp.ones(())) > 0
        return jnp.where(keep, new_BTD, hidden_BTD)


class FlaxOPTModel(Adaptable, Trainable, Pretrained, nnx.Module):
    """The bare decoder: token ids in, hidden states out."""

    head = None

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """A model with new weights, in training mode.

        Args:
            config: shape and options.
            attn_implementation: one of `opt_flax.attention.IMPLEMENTATIONS`; None means "xla".
            dtype: dtype of the arithmetic.
            param_dtype: dtype of the parameters; None means `dtype`.
            rngs: source of the weights' and of dropout's random numbers.
        """
        self.config = config
        implementation = check_implementation(attn_implementation or DEFAULT_IMPLEMENTATION)
        build = Builder(config, dtype, dtype if param_dtype is None else param_dtype, rngs)
        self.dtype = build.dtype
        self.decoder = FlaxOPTDecoder(config, implementation, build)

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **dropped: Any,
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

        Raises:
            InputError: for ids or positions out of range, an empty or over-long input, shapes that do not match, or
                an argument of Hugging Face's that was dropped.
        """
        reject_dropped(dropped)
        check(self.config, past_key_values, input_ids, inputs_embeds, attention_mask, position_ids)
        return self.decoder(
            input_ids=None if input_ids is None else jnp.asarray(input_ids),
            attention_mask=None if attention_mask is None else jnp.asarray(attention_mask),
            position_ids=None if position_ids is None else jnp.asarray(position_ids),
            inputs_embeds=None if inputs_embeds is None else jnp.asarray(inputs_embeds, dtype=self.dtype),
            past_key_values=past_key_values,
            use_cache=(self.config.use_cache and not self.training) if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    @property
    def training(self) -> bool:
        """Whether dropout is on: `train()` and `eval()` switch it."""
        return not self.decoder.layer_dropout.deterministic

    def get_input_embeddings(self) -> nnx.Embed | Int8Embedding:
        """The token table."""
        return self.decoder.embed_tokens


class FlaxOPTForCausalLM(Adaptable, Trainable, Pretrained, nnx.Module):
    """The language model: token ids in, logits of the next token out."""

    head = "lm"

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """A model with new weights, in training mode. Arguments are those of `FlaxOPTModel`."""
        V, E = config.vocab_size, config.word_embed_proj_dim
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)
        self.model = FlaxOPTModel(
            config, attn_implementation=attn_implementation, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.dtype = self.model.dtype
        if not config.tie_word_embeddings:
            build = Builder(config, dtype, dtype if param_dtype is None else param_dtype, rngs)
            self.lm_head = build.head(E, V)

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool | None = None,
        num_items_in_batch: int | Array | None = None,
        **dropped: Any,
    ) -> OPTCausalLMOutput:
        """Compute logits and, given labels, the loss.

        Args:
            labels: (B, T) ids; position t is scored on label t + 1, and -100 does not count.
            output_logits: whether to return logits. None means yes, but no in training with labels: there the loss is
                what is wanted, and logits would take most of the memory.
            num_items_in_batch: what the sum over labels is divided by; None means the number of labels that count.
                Batches of one step of gradient accumulation are told the number of all of them together.

        The other arguments and the errors are those of `FlaxOPTModel`.
        """
        if labels is not None:
            check(self.config, past_key_values, input_ids, inputs_embeds, labels=labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **dropped,
        )
        hidden_BTE = outputs.last_hidden_state
        if output_logits is None:
            output_logits = labels is None or not self.training
        loss = None
        if labels is not None:
            loss = causal_lm_loss(
                self.logits, hidden_BTE, jnp.asarray(labels), self.config.vocab_size, num_items_in_batch
            )
        return OPTCausalLMOutput(
            loss=loss,
            logits=self.logits(hidden_BTE) if output_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def logits(self, hidden_BTE: Array) -> Array:
        """The head: hidden states (…, E) to logits (…, V)."""
        if self.config.tie_word_embeddings:
            return self.get_input_embeddings().attend(hidden_BTE)
        return self.lm_head(hidden_BTE)

    def generate(
        self, input_ids: ArrayLike | None = None, attention_mask: ArrayLike | None = None, **options: Any
    ) -> Array | GenerateOutput:
        """Continue each prompt; see `opt_flax.generation.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    def stream(self, text: str, tokenizer: OPTTokenizer, **options: Any) -> Iterator[str]:
        """Continue one text, piece by piece; see `opt_flax.generation.stream`."""
        return stream(self, text, tokenizer, **options)

    def generate_text(self, text: str | Sequence[str], tokenizer: OPTTokenizer, **options: Any) -> str | list[str]:
        """Continue texts; see `opt_flax.generation.generate_text`."""
        return generate_text(self, text, tokenizer, **options)

    @property
    def training(self) -> bool:
        """Whether dropout is on: `train()` and `eval()` switch it."""
        return self.model.training

    def get_input_embeddings(self) -> nnx.Embed | Int8Embedding:
        """The token table."""
        return self.model.get_input_embeddings()


def check(
    config: OPTConfig,
    past_key_values: KVCache | None,
    input_ids: ArrayLike | None,
    inputs_embeds: ArrayLike | None,
    attention_mask: ArrayLike | None = None,
    position_ids: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    start_positions: ArrayLike | None = None,
    end_positions: ArrayLike | None = None,
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
    arrays = {name: array for name, array in arrays.items() if array is not None}
    length = 0 if past_key_values is None else past_key_values.length
    check_inputs(
        config,
        shapes={name: np.shape(array) for name, array in arrays.items()},
        values={
            name: np.asarray(array)
            for name, array in arrays.items()
            if not isinstance(array, Tracer) and name != "inputs_embeds"
        },
        past_length=None if isinstance(length, Tracer) else int(length),
        past_shape=None if past_key_values is None else tuple(past_key_values.keys[0].shape),
        head=head,
        problem_type=problem_type_of(config, jnp.asarray(arrays["labels"]).dtype) if "labels" in arrays else None,
    )
