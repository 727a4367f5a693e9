"""What the last layer has learnt over an earlier one, in TensorFlow: `opt_common.dola`, on the device of the logits."""

# TensorFlow's annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalOperand=false

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from opt_common.dola import RELATIVE_TOP
from opt_tf.processors import log_softmax

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def early_logits(model: "TFOPTForCausalLM", hidden_states: Sequence[tf.Tensor], layers: Sequence[int]) -> tf.Tensor:
    """What the head predicts of the last token in some layers' inputs, (B, C, V), at least float32."""
    decoder = model.model.decoder
    early = []
    for layer in layers:
        hidden_BD = hidden_states[layer][:, -1]
        early.append(model.logits(decoder.project_out(hidden_BD) if model.config.has_projection else hidden_BD))
    early_BCV = tf.stack(early, axis=1)
    return tf.cast(early_BCV, tf.float64 if early_BCV.dtype == tf.float64 else tf.float32)


def contrasted(final_BV: tf.Tensor, early_BCV: tf.Tensor) -> tf.Tensor:
    """Scores of tokens, before the processors; see `opt_common.dola.contrasted`."""
    B, C, V = early_BCV.shape
    final_BV = log_softmax(final_BV)
    early_BCV = tf.reshape(log_softmax(tf.reshape(early_BCV, (B * C, V))), (B, C, V))
    mean_BCV = (tf.exp(final_BV)[:, None] + tf.exp(early_BCV)) / 2
    logs_BCV = tf.math.log(tf.where(mean_BCV > 0, mean_BCV, tf.ones_like(mean_BCV)))
    divergence_BC = tf.reduce_sum(mean_BCV * (2 * logs_BCV - final_BV[:, None] - early_BCV), axis=-1)
    furthest_B = tf.argmax(divergence_BC, axis=1)
    scores_BV = final_BV - tf.gather(early_BCV, furthest_B, batch_dims=1)
    unlikely_BV = final_BV < tf.reduce_max(final_BV, axis=1, keepdims=True) + RELATIVE_TOP
    return tf.where(unlikely_BV, tf.constant(-np.inf, scores_BV.dtype), scores_BV)
