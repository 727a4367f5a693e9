"""Heads on the decoder for sequences and for spans, in JAX.

    FlaxOPTForSequenceClassification ── score, at one position a row ── logits BC
    FlaxOPTForQuestionAnswering ── qa_outputs ── start_logits BT, end_logits BT
      FlaxOPTModel

Names and numbers are Hugging Face's; the definition is `opt_common.reference`. Axis letters: B batch, T query length,
E word_embed_proj_dim, C labels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from opt_common.config import OPTConfig, problem_type_of
from opt_common.inputs import reject_dropped
from opt_common.outputs import OPTQuestionAnsweringOutput, OPTSequenceClassifierOutput
from opt_common.reference import IGNORED_LABEL
from opt_flax.cache import KVCache
from opt_flax.checkpoint import Pretrained
from opt_flax.layers import Builder
from opt_flax.lora import Adaptable
from opt_flax.modeling import FlaxOPTModel, check
from opt_flax.quantized import Int8Embedding
from opt_flax.training import Trainable

# Results pass through jax.jit.
jax.tree_util.register_dataclass(OPTSequenceClassifierOutput)
jax.tree_util.register_dataclass(OPTQuestionAnsweringOutput)


class FlaxOPTForSequenceClassification(Adaptable, Trainable, Pretrained, nnx.Module):
    """The sequence classifier: token ids in, logits of the labels out."""

    head = "sequence_classification"

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """A model with new weights and `config.num_labels` outputs, in training mode. Arguments: see `FlaxOPTModel`."""
        C, E = config.num_labels, config.word_embed_proj_dim
        self.config = config
        self.model = FlaxOPTModel(
            config, attn_implementation=attn_implementation, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.dtype = self.model.dtype
        build = Builder(config.replace(quantization=None), dtype, dtype if param_dtype is None else param_dtype, rngs)
        self.score = build.linear(E, C, use_bias=False)

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
        **dropped: Any,
    ) -> OPTSequenceClassifierOutput:
        """Compute logits and, given labels, the loss.

        Logits are those at the rightmost position that is attended to and does not hold the pad id, on whichever side
        the padding is; `opt_common.reference.pooled_positions` is the rule in full.

        Args:
            labels: by `config.problem_type`, (B,) integers from 0 to C - 1, of which -100 does not count; (B, C) of 0
                and 1; or (B, C) of any numbers, (B,) with one label. `opt_common.config.problem_type_of` infers it.

        The other arguments and the errors are those of `FlaxOPTModel`. Several rows of ids need an attention mask or a
        `pad_token_id`.
        """
        reject_dropped(dropped)
        check(
            self.config,
            past_key_values,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            labels,
            head=self.head,
        )
        offset = 0 if past_key_values is None else past_key_values.length
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden_BTE = outputs.last_hidden_state
        positions_B = pooled_positions(self.config, hidden_BTE, input_ids, attention_mask, offset)
        pooled_BE = hidden_BTE[jnp.arange(hidden_BTE.shape[0]), positions_B]
        logits_BC = self.score(pooled_BE)
        return OPTSequenceClassifierOutput(
            loss=None if labels is None else sequence_classification_loss(self.config, logits_BC, jnp.asarray(labels)),
            logits=logits_BC,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def training(self) -> bool:
        """Whether dropout is on: `train()` and `eval()` switch it."""
        return self.model.training

    def get_input_embeddings(self) -> nnx.Embed | Int8Embedding:
        """The token table."""
        return self.model.get_input_embeddings()


class FlaxOPTForQuestionAnswering(Adaptable, Trainable, Pretrained, nnx.Module):
    """Extractive question answering: token ids in, logits of where the answer starts and ends out."""

    head = "question_answering"

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
        E = config.word_embed_proj_dim
        self.config = config
        self.model = FlaxOPTModel(
            config, attn_implementation=attn_implementation, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.dtype = self.model.dtype
        build = Builder(config.replace(quantization=None), dtype, dtype if param_dtype is None else param_dtype, rngs)
        self.qa_outputs = build.linear(E, 2, use_bias=True)

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        past_key_values: KVCache | None = None,
        start_positions: ArrayLike | None = None,
        end_positions: ArrayLike | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **dropped: Any,
    ) -> OPTQuestionAnsweringOutput:
        """Compute logits and, given where the answers are, the loss.

        Args:
            start_positions: (B,) integers, the first token of each answer. One behind the last token does not count,
                as of an answer that was cut off; one before the first is taken for the first.
            end_positions: (B,) integers, the last token of each answer.

        The other arguments and the errors are those of `FlaxOPTModel`.
        """
        reject_dropped(dropped)
        check(
            self.config,
            past_key_values,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            start_positions=start_positions,
            end_positions=end_positions,
            head=self.head,
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and start_positions is not None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits_BT2 = self.qa_outputs(outputs.last_hidden_state)
        start_BT, end_BT = logits_BT2[..., 0], logits_BT2[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = question_answering_loss(start_BT, end_BT, jnp.asarray(start_positions), jnp.asarray(end_positions))
        return OPTQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_BT,
            end_logits=end_BT,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def training(self) -> bool:
        """Whether dropout is on: `train()` and `eval()` switch it."""
        return self.model.training

    def get_input_embeddings(self) -> nnx.Embed | Int8Embedding:
        """The token table."""
        return self.model.get_input_embeddings()


def pooled_positions(
    config: OPTConfig,
    hidden_BTE: Array,
    input_ids: ArrayLike | None,
    attention_mask: ArrayLike | None,
    offset: int | Array,
) -> Array:
    """`opt_common.reference.pooled_positions`, (B,), without a look at a value on the host.

    Args:
        config: the model's configuration.
        hidden_BTE: what is pooled.
        input_ids: (B, T), or None.
        attention_mask: (B, offset + T), or None.
        offset: number of tokens in the cache, which the mask covers too.
    """
    B, T = hidden_BTE.shape[:2]
    attended_BT = jnp.ones((B, T), dtype=bool)
    if attention_mask is not None:
        attended_BT = lax.dynamic_slice_in_dim(jnp.asarray(attention_mask), offset, T, axis=1) != 0
    counted_BT = attended_BT
    if input_ids is not None and config.pad_token_id is not None:
        counted_BT = attended_BT & (jnp.asarray(input_ids) != config.pad_token_id)
    # No two positions of a row have the same rank, so that the choice is no framework's: those that count come first,
    # from the right; then the others that are attended to, from the left.
    index_T = jnp.arange(T)
    rank_BT = jnp.where(counted_BT, T + index_T, jnp.where(attended_BT, T - index_T, -index_T))
    return rank_BT.argmax(axis=1)


def sequence_classification_loss(config: OPTConfig, logits_BC: Array, labels: Array) -> Array:
    """`opt_common.reference.sequence_classification_loss`, in float32 at least."""
    kind = problem_type_of(config, labels.dtype)
    logits_BC = logits_BC.astype(jnp.promote_types(logits_BC.dtype, jnp.float32))
    if kind == "single_label_classification":
        return cross_entropy(logits_BC, labels.reshape(-1))
    labels_BC = labels.reshape(logits_BC.shape).astype(logits_BC.dtype)
    if kind == "regression":
        return ((logits_BC - labels_BC) ** 2).mean()
    # -log(sigmoid(x)) = softplus(-x), and -log(1 - sigmoid(x)) is x more.
    return (jax.nn.softplus(-logits_BC) + (1 - labels_BC) * logits_BC).mean()


def question_answering_loss(start_BT: Array, end_BT: Array, start_positions: Array, end_positions: Array) -> Array:
    """`opt_common.reference.question_answering_loss`, in float32 at least."""
    losses: list[Array] = []
    for logits, positions in ((start_BT, start_positions), (end_BT, end_positions)):
        logits_BT = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        positions_B = jnp.maximum(positions.reshape(-1), 0)
        labels_B = jnp.where(positions_B < logits_BT.shape[1], positions_B, IGNORED_LABEL)
        losses.append(cross_entropy(logits_BT, labels_B))
    return (losses[0] + losses[1]) / 2


def cross_entropy(logits_BC: Array, labels_B: Array) -> Array:
    """Mean cross-entropy over the labels that are not -100; NaN if all are."""
    counted_B = labels_B != IGNORED_LABEL
    log_probs_BC = jax.nn.log_softmax(logits_BC, axis=-1)
    picked_B = jnp.take_along_axis(log_probs_BC, jnp.where(counted_B, labels_B, 0)[:, None], axis=-1)[:, 0]
    return -jnp.where(counted_B, picked_B, 0).sum() / counted_B.sum()
