"""Heads on the decoder for sequences and for spans, in TensorFlow, as Keras 3 models.

    TFOPTForSequenceClassification ── score, at one position a row ── logits BC
    TFOPTForQuestionAnswering ── qa_outputs ── start_logits BT, end_logits BT
      TFOPTModel

Names and numbers are Hugging Face's; the definition is `opt_common.reference`. Axis letters: B batch, T query length,
E word_embed_proj_dim, C labels.
"""

# TensorFlow's and Keras' annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

from typing import Any

import keras
import tensorflow as tf

from opt_common.config import OPTConfig, problem_type_of
from opt_common.outputs import OPTQuestionAnsweringOutput, OPTSequenceClassifierOutput
from opt_common.reference import IGNORED_LABEL
from opt_tf.cache import KVCache
from opt_tf.checkpoint import Pretrained
from opt_tf.layers import Builder
from opt_tf.lora import Adaptable
from opt_tf.modeling import TFOPTModel, check_call
from opt_tf.quantized import Int8Embedding
from opt_tf.training import Trainable, register_record

register_record(OPTSequenceClassifierOutput)
register_record(OPTQuestionAnsweringOutput)


@keras.saving.register_keras_serializable(package="opt_tf")
class TFOPTForSequenceClassification(Adaptable, Trainable, Pretrained, keras.Model):
    """The sequence classifier: token ids in, logits of the labels out."""

    head = "sequence_classification"

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        dtype: Any = None,
        new_weights: bool = True,
        name: str | None = None,
    ) -> None:
        """A model with new weights and `config.num_labels` outputs. Arguments: see `TFOPTModel`."""
        # Without autocast: Keras would round the labels to the dtype of the arithmetic.
        super().__init__(dtype=dtype, autocast=False, name=name)
        C, E = config.num_labels, config.word_embed_proj_dim
        self.config = config
        self.model = TFOPTModel(
            config,
            attn_implementation=attn_implementation,
            dtype=self.dtype_policy,
            new_weights=new_weights,
            name="model",
        )
        build = Builder(config.replace(quantization=None), self.dtype_policy, new_weights)
        self.score = build.linear(E, C, use_bias=False, name="score")
        self.build()

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        if not self.score.built:
            self.score.build()

    def __call__(self, *arguments: Any, **options: Any) -> OPTSequenceClassifierOutput:
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
        training: bool | None = None,
    ) -> OPTSequenceClassifierOutput:
        """Compute logits and, given labels, the loss.

        Logits are those at the rightmost position that is attended to and does not hold the pad id, on whichever side
        the padding is; `opt_common.reference.pooled_positions` is the rule in full.

        Args:
            labels: by `config.problem_type`, (B,) integers from 0 to C - 1, of which -100 does not count; (B, C) of 0
                and 1; or (B, C) of any numbers, (B,) with one label. `opt_common.config.problem_type_of` infers it.

        The other arguments and the errors are those of `TFOPTModel`. Several rows of ids need an attention mask or a
        `pad_token_id`.
        """
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
            training=training,
        )
        hidden_BTE = outputs.last_hidden_state
        positions_B = pooled_positions(self.config, hidden_BTE, input_ids, attention_mask, offset)
        pooled_BE = tf.gather(hidden_BTE, positions_B, axis=1, batch_dims=1)
        logits_BC = self.score(pooled_BE)
        return OPTSequenceClassifierOutput(
            loss=None
            if labels is None
            else sequence_classification_loss(self.config, logits_BC, tf.convert_to_tensor(labels)),
            logits=logits_BC,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

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
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "TFOPTForSequenceClassification":
        """The model that `get_config` described, with new weights."""
        values = {**config, "dtype": keras.saving.deserialize_keras_object(config["dtype"])}
        return cls(OPTConfig.from_dict(values.pop("config")), **values)


@keras.saving.register_keras_serializable(package="opt_tf")
class TFOPTForQuestionAnswering(Adaptable, Trainable, Pretrained, keras.Model):
    """Extractive question answering: token ids in, logits of where the answer starts and ends out."""

    head = "question_answering"

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
        E = config.word_embed_proj_dim
        self.config = config
        self.model = TFOPTModel(
            config,
            attn_implementation=attn_implementation,
            dtype=self.dtype_policy,
            new_weights=new_weights,
            name="model",
        )
        build = Builder(config.replace(quantization=None), self.dtype_policy, new_weights)
        self.qa_outputs = build.linear(E, 2, use_bias=True, name="qa_outputs")
        self.build()

    def build(self, input_shape: Any = None) -> None:
        """Make the weights; no shape is needed."""
        if not self.qa_outputs.built:
            self.qa_outputs.build()

    def __call__(self, *arguments: Any, **options: Any) -> OPTQuestionAnsweringOutput:
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
        start_positions: Any | None = None,
        end_positions: Any | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool | None = None,
    ) -> OPTQuestionAnsweringOutput:
        """Compute logits and, given where the answers are, the loss.

        Args:
            start_positions: (B,) integers, the first token of each answer. One behind the last token does not count,
                as of an answer that was cut off; one before the first is taken for the first.
            end_positions: (B,) integers, the last token of each answer.

        The other arguments and the errors are those of `TFOPTModel`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and start_positions is not None else use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )
        logits_BT2 = self.qa_outputs(outputs.last_hidden_state)
        start_BT, end_BT = logits_BT2[..., 0], logits_BT2[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = question_answering_loss(
                start_BT, end_BT, tf.convert_to_tensor(start_positions), tf.convert_to_tensor(end_positions)
            )
        return OPTQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_BT,
            end_logits=end_BT,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

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
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "TFOPTForQuestionAnswering":
        """The model that `get_config` described, with new weights."""
        values = {**config, "dtype": keras.saving.deserialize_keras_object(config["dtype"])}
        return cls(OPTConfig.from_dict(values.pop("config")), **values)


def pooled_positions(
    config: OPTConfig,
    hidden_BTE: tf.Tensor,
    input_ids: Any | None,
    attention_mask: Any | None,
    offset: int | tf.Tensor,
) -> tf.Tensor:
    """`opt_common.reference.pooled_positions`, (B,), without a look at a value on the host.

    Args:
        config: the model's configuration.
        hidden_BTE: what is pooled.
        input_ids: (B, T), or None.
        attention_mask: (B, offset + T), or None.
        offset: number of tokens in the cache, which the mask covers too.
    """
    B, T = keras.ops.shape(hidden_BTE)[:2]
    attended_BT = tf.ones((B, T), tf.bool)
    if attention_mask is not None:
        # Gathered, not sliced: XLA compiles a slice anew for every offset.
        attended_BT = tf.gather(tf.convert_to_tensor(attention_mask), offset + tf.range(T), axis=1) != 0
    counted_BT = attended_BT
    if input_ids is not None and config.pad_token_id is not None:
        counted_BT = attended_BT & (tf.convert_to_tensor(input_ids) != config.pad_token_id)
    # No two positions of a row have the same rank, so that the choice is no framework's: those that count come first,
    # from the right; then the others that are attended to, from the left.
    index_T = tf.range(T)
    rank_BT = tf.where(counted_BT, T + index_T, tf.where(attended_BT, T - index_T, -index_T))
    return tf.argmax(rank_BT, axis=1)


def sequence_classification_loss(config: OPTConfig, logits_BC: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """`opt_common.reference.sequence_classification_loss`, in float32 at least."""
    kind = problem_type_of(config, labels.dtype)
    logits_BC = tf.cast(logits_BC, tf.float64 if logits_BC.dtype == tf.float64 else tf.float32)
    if kind == "single_label_classification":
        return cross_entropy(logits_BC, tf.reshape(labels, (-1,)))
    labels_BC = tf.cast(tf.reshape(labels, keras.ops.shape(logits_BC)), logits_BC.dtype)
    if kind == "regression":
        return tf.reduce_mean((logits_BC - labels_BC) ** 2)
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels_BC, logits_BC))


def question_answering_loss(
    start_BT: tf.Tensor, end_BT: tf.Tensor, start_positions: tf.Tensor, end_positions: tf.Tensor
) -> tf.Tensor:
    """`opt_common.reference.question_answering_loss`, in float32 at least."""
    losses: list[tf.Tensor] = []
    for logits, positions in ((start_BT, start_positions), (end_BT, end_positions)):
        logits_BT = tf.cast(logits, tf.float64 if logits.dtype == tf.float64 else tf.float32)
        positions_B = tf.maximum(tf.reshape(tf.cast(positions, tf.int32), (-1,)), 0)
        labels_B = tf.where(positions_B < keras.ops.shape(logits_BT)[1], positions_B, IGNORED_LABEL)
        losses.append(cross_entropy(logits_BT, labels_B))
    return (losses[0] + losses[1]) / 2


def cross_entropy(logits_BC: tf.Tensor, labels_B: tf.Tensor) -> tf.Tensor:
    """Mean cross-entropy over the labels that are not -100; NaN if all are."""
    counted_B = labels_B != IGNORED_LABEL
    losses_B = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(counted_B, labels_B, 0), logits_BC)
    zero = tf.zeros((), logits_BC.dtype)
    return tf.reduce_sum(tf.where(counted_B, losses_B, zero)) / tf.reduce_sum(tf.cast(counted_B, logits_BC.dtype))
