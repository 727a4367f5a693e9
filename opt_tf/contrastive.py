"""Which candidate contrastive search takes, in TensorFlow: `opt_common.contrastive`, on the device of the states."""

# TensorFlow's annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalOperand=false

import numpy as np
import tensorflow as tf


def preferred(
    states_RSE: tf.Tensor, context_RS: tf.Tensor, new_RE: tf.Tensor, logprobs_BK: tf.Tensor, alpha: tf.Tensor
) -> tf.Tensor:
    """The candidate to take for each text, (B,); see `opt_common.contrastive.preferred`."""
    similarity_RS = tf.linalg.matvec(directions(states_RSE), directions(new_RE))
    penalty_R = tf.reduce_max(tf.where(context_RS, similarity_RS, tf.constant(-np.inf, similarity_RS.dtype)), axis=1)
    weight, logprobs_BK = tf.cast(alpha, penalty_R.dtype), tf.cast(logprobs_BK, penalty_R.dtype)
    value_BK = (1 - weight) * tf.exp(logprobs_BK) - weight * tf.reshape(penalty_R, logprobs_BK.shape)
    possible_BK = (logprobs_BK > -np.inf) & ~tf.math.is_nan(value_BK)
    return tf.argmax(
        tf.where(possible_BK, value_BK, tf.constant(-np.inf, value_BK.dtype)), axis=1, output_type=tf.int32
    )


def rows_of(places_B: tf.Tensor, size: int) -> tf.Tensor:
    """The rows of the candidates that are taken, (B,), of `size` candidates for each text."""
    return tf.range(places_B.shape[0]) * size + places_B


def directions(vectors: tf.Tensor) -> tf.Tensor:
    """Vectors (…, E) of length 1, at least float32; those of length 0 stay as they are."""
    vectors = tf.cast(vectors, tf.float64 if vectors.dtype == tf.float64 else tf.float32)
    lengths = tf.norm(vectors, axis=-1, keepdims=True)
    return vectors / tf.where(lengths > 0, lengths, tf.ones_like(lengths))
