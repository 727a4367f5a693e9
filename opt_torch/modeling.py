"""The OPT model in PyTorch.

    OPTForCausalLM ── lm_head ─────────────────────────────── logits BTV
      OPTModel ── checks its inputs
        OPTDecoder
          embed_tokens BT → BTE, project_in BTE → BTD ─┐
          embed_positions BT → BTD ────────────────────┴ + → BTD
          layers: OPTDecoderLayer = OPTAttention + feed-forward, BTD → BTD
          final_layer_norm, project_out BTD → BTE

Names and numbers are Hugging Face's; the definition is `opt_common.reference`. Axis letters: B batch, T query length,
S key length, D hidden_size, N heads, H head_dim, F ffn_dim, E word_embed_proj_dim, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from opt_common.config import POSITION_OFFSET, OPTConfig, problem_type_of
from opt_common.errors import InputError
from opt_common.generation import GenerationConfig
from opt_common.inputs import check_inputs, reject_dropped
from opt_common.outputs import GenerateOutput, OPTCausalLMOutput, OPTModelOutput
from opt_common.params import Head
from opt_common.tokenizer import OPTTokenizer
from opt_torch import native
from opt_torch.attention import DEFAULT_IMPLEMENTATION, Masking, attend, attention_bias, check_implementation
from opt_torch.cache import KVCache
from opt_torch.checkpoint import Pretrained
from opt_torch.generation import generate, generate_text, stream
from opt_torch.layers import ACTIVATION_FUNCTIONS, Builder, Together
from opt_torch.lora import Adaptable
from opt_torch.quantized import Int8Embedding
from opt_torch.training import Trainable, causal_lm_loss, leave_out_tied_head, put_back_tied_head, run_again


def positions(attention_mask_BS: Tensor) -> Tensor:
    """The position rule: attended tokens count 0, 1, 2, …; a masked slot is -1."""
    return torch.cumsum(attention_mask_BS, dim=1) * attention_mask_BS - 1


class OPTAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: OPTConfig, attn_implementation: str, build: Builder) -> None:
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.attn_implementation = attn_implementation
        self.k_proj = build.linear(D, D, use_bias=config.enable_bias)
        self.v_proj = build.linear(D, D, use_bias=config.enable_bias)
        self.q_proj = build.linear(D, D, use_bias=config.enable_bias)
        self.out_proj = build.linear(D, D, use_bias=config.enable_bias)
        self.dropout = build.dropout(config.attention_dropout)
        self.together = Together()
        self.lays_together = False

    def lay_together(self) -> None:
        """Put the matrices of the three projections where inference multiplies by them at once."""
        self.together = Together(self.q_proj, self.k_proj, self.v_proj)
        self.lays_together = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What moves or casts a model gives each matrix a place of its own.
        together = self.together.holds(self.q_proj, self.k_proj, self.v_proj)
        super()._apply(fn, recurse)
        if together:
            self.lay_together()
        return self

    def forward(
        self,
        hidden_BTD: Tensor,
        masking: Masking,
        past: tuple[Tensor, Tensor] | None = None,
        offset: int | Tensor = 0,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
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
        if self.lays_together and T == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Where one token is decoded, more will be: until then a loaded model is used from where its file lies.
            self.lay_together()
        q_BTD, k_BTD, v_BTD = self.together(hidden_BTD, self.q_proj, self.k_proj, self.v_proj)
        # Scaled before the product with the keys, bias included: in half precision the order shows.
        q_BTNH = (q_BTD * H**-0.5).view(B, T, N, H)
        k_BTNH, v_BTNH = k_BTD.view(B, T, N, H), v_BTD.view(B, T, N, H)
        context_BTNH, present, probs_BNTS = attend(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            masking,
            past,
            offset,
            implementation=self.attn_implementation,
            dropout=self.dropout.p if self.training else 0.0,
            need_probs=output_attentions,
        )
        return self.out_proj(context_BTNH.reshape(B, T, D)), present, probs_BNTS


class OPTDecoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input; normed before (pre-norm) or after (post-norm, 350m)."""

    def __init__(self, config: OPTConfig, attn_implementation: str, build: Builder) -> None:
        super().__init__()
        D, F = config.hidden_size, config.ffn_dim
        affine = config.layer_norm_elementwise_affine
        self.config = config
        self.self_attn = OPTAttention(config, attn_implementation, build)
        self.self_attn_layer_norm = build.layer_norm(D, affine=affine)
        self.fc1 = build.linear(D, F, use_bias=config.enable_bias)
        self.fc2 = build.linear(F, D, use_bias=config.enable_bias)
        self.final_layer_norm = build.layer_norm(D, affine=affine)
        self.dropout = build.dropout(config.dropout)

    def forward(
        self,
        hidden_BTD: Tensor,
        masking: Masking,
        past: tuple[Tensor, Tensor] | None = None,
        offset: int | Tensor = 0,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Arguments and results are those of `OPTAttention`."""
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


class OPTDecoder(nn.Module):
    """Embeddings, layers, final norm. Takes its inputs as they are; `OPTModel` checks them."""

    def __init__(self, config: OPTConfig, attn_implementation: str, build: Builder) -> None:
        super().__init__()
        V, E, D = config.vocab_size, config.word_embed_proj_dim, config.hidden_size
        self.config = config
        self.embed_tokens = build.vocabulary(V, E, pad=config.pad_token_id)
        self.embed_positions = build.embedding(config.max_position_embeddings + POSITION_OFFSET, D)
        if config.has_projection:
            self.project_out = build.linear(D, E, use_bias=False)
            self.project_in = build.linear(E, D, use_bias=False)
        if config.has_final_layer_norm:
            self.final_layer_norm = build.layer_norm(D, affine=config.layer_norm_elementwise_affine)
        self.layers = nn.ModuleList(
            OPTDecoderLayer(config, attn_implementation, build) for _ in range(config.num_hidden_layers)
        )
        self.layer_dropout = build.dropout(config.layerdrop)
        self.checkpoint_every = 0
        self.checkpoint_options: Mapping[str, Any] = {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> OPTModelOutput:
        """Arguments and result are those of `OPTModel`."""
        if not torch.compiler.is_compiling():
            native.keep_freed_memory()
        tokens_BTE = self.embed(input_ids, inputs_embeds)
        T = tokens_BTE.shape[1]
        cache = None if past_key_values is None else past_key_values.with_room(T)
        offset: int | Tensor = 0 if cache is None else cache.length

        hidden_BTD = self.project_in(tokens_BTE) if self.config.has_projection else tokens_BTE
        positions_BT = self.place(attention_mask, position_ids, T, offset, hidden_BTD)
        hidden_BTD = hidden_BTD + self.embed_positions(positions_BT + POSITION_OFFSET)
        masking = self.masking(attention_mask, cache, T, offset, hidden_BTD)

        recompute = self.checkpoint_every > 0 and self.training and cache is None and not use_cache
        hidden_states: list[Tensor] = []
        attentions: list[Tensor | None] = []
        presents: list[tuple[Tensor, Tensor]] = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(hidden_BTD)
            past = None if cache is None else (cache.keys[index], cache.values[index])
            if recompute and index % self.checkpoint_every == 0:
                new_BTD, probs_BNTS = run_again(layer, hidden_BTD, masking, output_attentions, self.checkpoint_options)
            else:
                new_BTD, present, probs_BNTS = layer(hidden_BTD, masking, past, offset, output_attentions)
                if use_cache:
                    presents.append(present)
            hidden_BTD = self.drop_layer(hidden_BTD, new_BTD)
            attentions.append(probs_BNTS)

        if self.config.has_final_layer_norm:
            hidden_BTD = self.final_layer_norm(hidden_BTD)
        hidden_BTE = self.project_out(hidden_BTD) if self.config.has_projection else hidden_BTD
        hidden_states.append(hidden_BTE)

        if use_cache:
            keys, values = zip(*presents, strict=True)
            cache = KVCache(keys, values, T, [T]) if cache is None else cache.extended(keys, values, T)
        return OPTModelOutput(
            last_hidden_state=hidden_BTE,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Rows of the token table, or what stands in their place, (B, T, E). The pad row gets no gradient from here."""
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        return self.embed_tokens(input_ids)

    def place(
        self,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        T: int,
        offset: int | Tensor,
        hidden_BTD: Tensor,
    ) -> Tensor:
        """Positions of the new tokens, (B or 1, T)."""
        if position_ids is not None:
            return position_ids
        if attention_mask is None:
            return offset + torch.arange(T, device=hidden_BTD.device)[None]
        return positions(attention_mask.long()).index_select(1, offset + torch.arange(T, device=hidden_BTD.device))

    def masking(
        self, attention_mask: Tensor | None, cache: KVCache | None, T: int, offset: int | Tensor, hidden_BTD: Tensor
    ) -> Masking:
        """What the new tokens may attend to, the same for every layer."""
        S = offset + T
        if isinstance(S, Tensor):
            assert cache is not None
            S = cache.capacity
        elif attention_mask is None and (offset == 0 or T == 1):
            return Masking()
        maybe_empty = False
        if attention_mask is not None:
            attention_mask = attention_mask[:, :S]
            # Some query attends to nothing only where the first key is padding.
            maybe_empty = torch.is_grad_enabled() and (
                torch.compiler.is_compiling() or not bool(attention_mask[:, 0].all())
            )
        return Masking(attention_mask, attention_bias(attention_mask, T, S, offset, hidden_BTD), maybe_empty)

    def drop_layer(self, hidden_BTD: Tensor, new_BTD: Tensor) -> Tensor:
        """LayerDrop: in training, with probability `layerdrop`, a layer passes its input through."""
        if not self.training or self.config.layerdrop == 0:
            return new_BTD
        keep = self.layer_dropout(hidden_BTD.new_ones(())) > 0
        return torch.where(keep, new_BTD, hidden_BTD)


class OPTModel(Adaptable, Trainable, Pretrained, nn.Module):
    """The bare decoder: token ids in, hidden states out."""

    head = None

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """A model with new weights, in training mode.

        Args:
            config: shape and options.
            attn_implementation: one of `opt_torch.attention.IMPLEMENTATIONS`; None means "sdpa".
            dtype: dtype of the parameters and of the arithmetic; None means PyTorch's default.
            device: where the parameters go; None means PyTorch's default.
        """
        super().__init__()
        self.config = config
        implementation = check_implementation(attn_implementation or DEFAULT_IMPLEMENTATION)
        build = Builder(config, dtype, device)
        self.decoder = OPTDecoder(config, implementation, build)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
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
        if attention_mask is not None and not torch.compiler.is_compiling() and bool(attention_mask.all()):
            # Nothing is padding: without a mask the kernels take their fast causal path.
            attention_mask = None
        return self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=(self.config.use_cache and not self.training) if use_cache is None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    def get_input_embeddings(self) -> nn.Embedding | Int8Embedding:
        """The token table."""
        return self.decoder.embed_tokens


class OPTForCausalLM(Adaptable, Trainable, Pretrained, nn.Module):
    """The language model: token ids in, logits of the next token out."""

    head = "lm"

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """A model with new weights, in training mode. Arguments are those of `OPTModel`."""
        super().__init__()
        V, E = config.vocab_size, config.word_embed_proj_dim
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)
        self.model = OPTModel(config, attn_implementation=attn_implementation, dtype=dtype, device=device)
        build = Builder(config, dtype, device)
        self.lm_head = build.head(E, V)
        self.tie_weights()
        self.register_state_dict_post_hook(leave_out_tied_head)
        self.register_load_state_dict_pre_hook(put_back_tied_head)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **dropped: Any,
    ) -> OPTCausalLMOutput:
        """Compute logits and, given labels, the loss.

        Args:
            labels: (B, T) ids; position t is scored on label t + 1, and -100 does not count.
            output_logits: whether to return logits. None means yes, but no in training with labels: there the loss is
                what is wanted, and logits would take most of the memory.
            num_items_in_batch: what the sum over labels is divided by; None means the number of labels that count.
                Batches of one step of gradient accumulation are told the number of all of them together.

        The other arguments and the errors are those of `OPTModel`.
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
            loss = causal_lm_loss(self.lm_head, hidden_BTE, labels, self.config.vocab_size, num_items_in_batch)
        return OPTCausalLMOutput(
            loss=loss,
            logits=self.logits(hidden_BTE) if output_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def logits(self, hidden_BTE: Tensor) -> Tensor:
        """The head: hidden states (…, E) to logits (…, V)."""
        return self.lm_head(hidden_BTE)

    def generate(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor | GenerateOutput:
        """Continue each prompt; see `opt_torch.generation.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    def stream(self, text: str, tokenizer: OPTTokenizer, **options: Any) -> Iterator[str]:
        """Continue one text, piece by piece; see `opt_torch.generation.stream`."""
        return stream(self, text, tokenizer, **options)

    def generate_text(self, text: str | Sequence[str], tokenizer: OPTTokenizer, **options: Any) -> str | list[str]:
        """Continue texts; see `opt_torch.generation.generate_text`."""
        return generate_text(self, text, tokenizer, **options)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **arguments: Any) -> dict[str, Any]:
        """The arguments of a call on these ids. PEFT wants to see this method; our own `generate` doesn't use it."""
        return {"input_ids": input_ids, **arguments}

    def get_input_embeddings(self) -> nn.Embedding | Int8Embedding:
        """The token table."""
        return self.model.get_input_embeddings()

    def tie_weights(self) -> None:
        """Make the head the token table, if the configuration says so."""
        if not self.config.tie_word_embeddings:
            return
        table = self.get_input_embeddings()
        if isinstance(table, Int8Embedding):
            self.lm_head: Any = table.head()
        else:
            self.lm_head.weight = table.weight


def check(
    config: OPTConfig,
    past_key_values: KVCache | None,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    start_positions: Tensor | None = None,
    end_positions: Tensor | None = None,
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
    for name, array in arrays.items():
        if not isinstance(array, Tensor):
            raise InputError(f"{name} is of type {type(array).__name__}, expected a tensor. Use torch.tensor.")
    traced = torch.compiler.is_compiling()
    check_inputs(
        config,
        shapes={name: tuple(array.shape) for name, array in arrays.items()},
        values={
            name: array.detach().cpu().numpy()
            for name, array in arrays.items()
            if not traced and name != "inputs_embeds"
        },
        past_length=0 if past_key_values is None else past_key_values.length,
        past_shape=None if past_key_values is None else tuple(past_key_values.keys[0].shape),
        head=head,
        problem_type=problem_type_of(config, arrays["labels"].dtype) if "labels" in arrays else None,
    )
