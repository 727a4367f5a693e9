"""What training needs beside the model: the language model's loss, gradient checkpointing, and what `fit` calls.

Axis letters: B batch, T length, E word_embed_proj_dim, V vocabulary, X = B·(T - 1) scored positions,
C of them at a time in each of K chunks.
"""

# TensorFlow's and Keras' annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import keras
import optree
import tensorflow as tf

from opt_common.errors import InputError
from opt_common.outputs import ModelOutput
from opt_common.params import Head
from opt_common.reference import IGNORED_LABEL
from opt_tf.attention import Masking

CHUNK_LOGITS = 2**24
"""Logits that the loss holds at a time: 64 MiB in float32, where a batch of 8 × 512 tokens has 785 MiB of them."""


class Trainable:
    """What every model class can do for training."""

    head: ClassVar[Head | None]
    supports_gradient_checkpointing: ClassVar[bool] = True

    def gradient_checkpointing_enable(self, *, every_n_layers: int = 1) -> None:
        """Keep only each layer's input for the backward pass, and compute the rest again there.

        In training this trades about a third more time for most of the memory of activations; outputs, dropout and
        gradients stay the same. A call with a cache keeps everything. Call it before `compile`.

        Args:
            every_n_layers: 2 does so in every second layer, and so on.
        """
        decoder_of(self).checkpoint_every = every_n_layers

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything for the backward pass, as a new model does."""
        decoder_of(self).checkpoint_every = 0

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on."""
        return decoder_of(self).checkpoint_every > 0

    def train_step(self: Any, data: Any) -> Any:
        """A step of `fit`: see `with_targets` for what a batch may be."""
        return super().train_step(with_targets(self, data))  # pyright: ignore[reportAttributeAccessIssue]

    def test_step(self: Any, data: Any) -> Any:
        """A step of `evaluate`, likewise."""
        return super().test_step(with_targets(self, data))  # pyright: ignore[reportAttributeAccessIssue]

    def compute_loss(
        self: Any, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The loss that the model computes from its labels; given `compile(loss=…)`, that of the logits."""
        if y is not None:
            return super().compute_loss(x, y, y_pred["logits"], sample_weight, training)  # pyright: ignore[reportAttributeAccessIssue]
        return y_pred.loss

    def compute_metrics(self: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Metrics of the logits; those of a language model are of the next token."""
        if y is None and "labels" in x:
            y = x["labels"]
        logits = y_pred.logits if self.head != "question_answering" else None
        if self.head == "lm" and logits is not None and y is not None:
            y, logits = y[:, 1:], logits[:, :-1]
        return super().compute_metrics(x, y, logits, sample_weight)  # pyright: ignore[reportAttributeAccessIssue]

    def predict_step(self: Any, data: Any) -> Any:
        """A step of `predict`: the fields that a call without labels fills, but for the cache."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        options = dict(x) if isinstance(x, Mapping) else {"input_ids": x}
        targets = ("labels", "start_positions", "end_positions")
        options = {name: value for name, value in options.items() if name not in targets}
        found = self(**options, training=False, use_cache=False)
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        return {name: value for name, value in fields.items() if value is not None}


def with_targets(model: Any, data: Any) -> tuple[Any, Any, Any]:
    """A batch of `fit` or `evaluate` as the arguments of a call, its targets among them; and None, unless `compile`
    was given a loss: then the targets stay apart, for it.

    Args:
        model: the model.
        data: a dictionary of arguments, or of ids alone; or (that, targets), where targets are labels, or a dictionary
            with `labels` or with `start_positions` and `end_positions`.

    Raises:
        InputError: without targets, and for a `sample_weight`.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    options = dict(x) if isinstance(x, Mapping) else {"input_ids": x}
    if model._compile_loss is not None:
        return options, y, sample_weight
    if sample_weight is not None:
        raise InputError("sample_weight is not taken by the model's own loss. Set labels that shall not count to -100.")
    if y is not None:
        options |= y if isinstance(y, Mapping) else {"labels": y}
    if not {"labels", "start_positions"} & options.keys():
        raise InputError(
            "The batch has no targets. Put labels (or start_positions and end_positions) into it, or give them as y."
        )
    if model.head == "lm" and model._compile_metrics is not None:
        options["output_logits"] = True
    return options, None, None


def register_record(record: type[ModelOutput]) -> None:
    """Tell Keras what is in a record, so that it is the output of a call on `keras.Input` too."""

    def flatten(output: ModelOutput) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        names = tuple(field.name for field in dataclasses.fields(output) if getattr(output, field.name) is not None)
        return tuple(getattr(output, name) for name in names), names

    def unflatten(names: tuple[str, ...], values: tuple[Any, ...]) -> ModelOutput:
        return record(**dict(zip(names, values, strict=True)))

    optree.register_pytree_node(record, flatten, unflatten, namespace="keras")


def decoder_of(model: Any) -> Any:
    """The decoder inside a model of any class."""
    return model.decoder if model.head is None else model.model.decoder


def run_again(
    layer: Any, hidden_BTD: tf.Tensor, masking: Masking, output_attentions: bool
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """A layer's output and attention probabilities, of which only the input is kept for the backward pass."""
    generators = [dropout.seed_generator for dropout in (layer.self_attn.dropout, layer.dropout) if dropout.rate > 0]
    # Of the generator's states this layer takes the next two: `dropout` is called twice.
    seeds = [(generator.next(), generator.next())[0] for generator in generators]

    states = [(generator.state, seed) for generator, seed in zip(generators, seeds, strict=True)]
    gradients: list[tf.Tensor] = []

    def run(hidden_BTD: tf.Tensor) -> tuple[tf.Tensor, ...]:
        # A graph runs whatever it can: without an order, it would compute both times at once and spare no memory.
        with tf.control_dependencies(gradients):
            hidden_BTD = tf.identity(hidden_BTD)
        # Both computations start from the same states of the generators, so that they drop the same.
        with keras.StatelessScope(state_mapping=states):
            hidden_BTD, _, probs_BNTS = layer(
                hidden_BTD, masking=masking, output_attentions=output_attentions, training=True
            )
        return (hidden_BTD, probs_BNTS) if output_attentions else (hidden_BTD,)

    @tf.custom_gradient
    def watched(*outputs: tf.Tensor) -> Any:
        def gradient(*upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
            gradients[:] = upstream
            return upstream

        return outputs, gradient

    hidden_BTD, *probs = watched(*tf.recompute_grad(run)(hidden_BTD))
    return hidden_BTD, probs[0] if output_attentions else None


def causal_lm_loss(
    head: tuple[tf.Tensor, bool] | Callable[[tf.Tensor], tf.Tensor],
    hidden_BTE: tf.Tensor,
    labels_BT: tf.Tensor,
    vocab_size: int,
    num_items_in_batch: int | tf.Tensor | None = None,
    training: bool | None = None,
) -> tf.Tensor:
    """Cross-entropy of label t + 1 under the logits at t, in float32 at least; NaN if no label counts.

    The logits are computed `CHUNK_LOGITS` at a time: in training gradients along with the loss, from the same logits;
    otherwise the logits are computed again in the backward pass, if there is one.

    Args:
        head: weight of the head, and whether it is the table (V, E) or a kernel (E, V); or, for a head that is more
            than a weight, hidden states (X, E) to logits (X, V), of which then all are in memory.
        hidden_BTE: what the logits are computed from.
        labels_BT: ids; -100 does not count.
        vocab_size: V.
        num_items_in_batch: what the sum over labels is divided by; None means the number of labels that count.
        training: whether gradients will be wanted.
    """
    B, T, E = keras.ops.shape(hidden_BTE)
    hidden_XE = tf.reshape(hidden_BTE[:, :-1], (-1, E))
    labels_X = tf.cast(tf.reshape(labels_BT[:, 1:], (-1,)), tf.int32)
    X = B * (T - 1)
    rows = tf.maximum(tf.minimum(CHUNK_LOGITS // vocab_size, X), 1)
    K = -(-X // rows)
    missing = K * rows - X
    labels_KC = tf.reshape(tf.pad(labels_X, ((0, missing),), constant_values=IGNORED_LABEL), (K, rows))

    if callable(head):
        logits_XV = head(hidden_XE)
        logits_XV = tf.cast(logits_XV, tf.float64 if logits_XV.dtype == tf.float64 else tf.float32)
        losses_X = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels_X, 0), logits_XV)
        total = tf.reduce_sum(tf.where(labels_X == IGNORED_LABEL, tf.zeros((), logits_XV.dtype), losses_X))
    else:
        hidden_KCE = tf.reshape(tf.pad(hidden_XE, ((0, missing), (0, 0))), (K, rows, E))
        total = _summed_losses(hidden_KCE, tf.convert_to_tensor(head[0]), labels_KC, head[1], bool(training))
    count = tf.reduce_sum(tf.cast(labels_X != IGNORED_LABEL, total.dtype))
    return total / (count if num_items_in_batch is None else tf.cast(num_items_in_batch, total.dtype))


def _summed_losses(
    hidden_KCE: tf.Tensor, weight: tf.Tensor, labels_KC: tf.Tensor, is_table: bool, with_slopes: bool
) -> tf.Tensor:
    """The sum of the losses, chunk after chunk; with slopes at once, or from logits that are computed again."""
    K = tf.shape(hidden_KCE)[0]
    at_least_float32 = tf.float64 if hidden_KCE.dtype == tf.float64 else tf.float32
    counted_KC = labels_KC != IGNORED_LABEL
    labels_KC = tf.where(counted_KC, labels_KC, 0)

    def losses(hidden_CE: tf.Tensor, weight: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        logits_CV = tf.matmul(hidden_CE, tf.cast(weight, hidden_CE.dtype), transpose_b=is_table)
        logits_CV = tf.cast(logits_CV, at_least_float32)
        losses_C = tf.nn.sparse_softmax_cross_entropy_with_logits(labels_KC[k], logits_CV)
        return tf.reduce_sum(tf.where(counted_KC[k], losses_C, tf.zeros((), at_least_float32))), logits_CV

    def losses_and_slopes(hidden_KCE: tf.Tensor, weight: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        C = keras.ops.shape(labels_KC)[1]

        def add(k: tf.Tensor, total: tf.Tensor, hidden_slopes: tf.TensorArray, weight_slope: tf.Tensor) -> Any:
            more, logits_CV = losses(hidden_KCE[k], weight, k)
            picked_C2 = tf.stack((tf.range(C), labels_KC[k]), axis=1)
            # The slope of the loss is the probabilities, less one at the label.
            slope_CV = tf.tensor_scatter_nd_sub(tf.nn.softmax(logits_CV), picked_C2, tf.ones((C,), logits_CV.dtype))
            slope_CV = tf.where(counted_KC[k][:, None], slope_CV, tf.zeros((), slope_CV.dtype))
            slope_CV = tf.cast(slope_CV, hidden_KCE.dtype)
            hidden_slope_CE = tf.matmul(slope_CV, tf.cast(weight, slope_CV.dtype), transpose_b=not is_table)
            factors = (slope_CV, hidden_KCE[k]) if is_table else (hidden_KCE[k], slope_CV)
            weight_slope += tf.cast(tf.matmul(*factors, transpose_a=True), weight_slope.dtype)
            return k + 1, total + more, hidden_slopes.write(k, hidden_slope_CE), weight_slope

        hidden_slopes = tf.TensorArray(hidden_KCE.dtype, size=K, element_shape=hidden_KCE.shape[1:])
        zero, zeros = tf.zeros((), at_least_float32), tf.zeros(tf.shape(weight), at_least_float32)
        start = (tf.constant(0), zero, hidden_slopes, zeros)
        _, total, hidden_slopes, weight_slope = tf.while_loop(lambda k, *_: k < K, add, start, parallel_iterations=1)
        return total, tf.reshape(hidden_slopes.stack(), tf.shape(hidden_KCE)), weight_slope

    @tf.custom_gradient
    def summed(hidden_KCE: tf.Tensor, weight: tf.Tensor) -> Any:
        def add(k: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return k + 1, total + losses(hidden_KCE[k], weight, k)[0]

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            hidden_slopes, weight_slope = slopes or losses_and_slopes(hidden_KCE, weight)[1:]
            # In float32 at least: a scaled loss's factor may be too large for half precision.
            hidden_slopes = tf.cast(tf.cast(hidden_slopes, at_least_float32) * upstream, hidden_KCE.dtype)
            return hidden_slopes, tf.cast(weight_slope * upstream, weight.dtype)

        if with_slopes:
            total, *slopes = losses_and_slopes(hidden_KCE, weight)
            return total, gradient
        slopes = []
        zero = (tf.constant(0), tf.zeros((), at_least_float32))
        return tf.while_loop(lambda k, _: k < K, add, zero, parallel_iterations=1)[1], gradient

    return summed(hidden_KCE, weight)
