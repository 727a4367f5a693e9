"""Which guesses of a smaller model are kept, in TensorFlow: `opt_common.assisted`, on the device of the scores."""

# TensorFlow's annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalOperand=false

import numpy as np
import tensorflow as tf

from opt_tf.processors import choose, softmax


def checked(
    scores_BV: tf.Tensor, shares_BV: tf.Tensor, guessed_B: tf.Tensor, uniforms_B: tf.Tensor, chances_B: tf.Tensor
) -> tf.Tensor:
    """The guess where it holds, another token where it does not; see `opt_common.assisted.checked`."""
    probabilities_BV = softmax(scores_BV)
    shares_BV = tf.where(guessed_B[:, None] >= 0, tf.cast(shares_BV, scores_BV.dtype), tf.zeros_like(scores_BV))
    places_B1 = tf.maximum(guessed_B, 0)[:, None]
    guess_B, share_B = (
        tf.gather(array_BV, places_B1, axis=1, batch_dims=1)[:, 0] for array_BV in (probabilities_BV, shares_BV)
    )
    holds_B = (guessed_B >= 0) & (tf.cast(chances_B, share_B.dtype) * share_B < guess_B)
    left_BV = tf.where(probabilities_BV > shares_BV, probabilities_BV - shares_BV, tf.zeros_like(shares_BV))
    left_BV = tf.where(tf.reduce_sum(left_BV, axis=1, keepdims=True) > 0, left_BV, probabilities_BV)
    others_B = choose(tf.math.log(left_BV), uniforms_B)
    tokens_B = tf.where(holds_B, tf.cast(guessed_B, others_B.dtype), others_B)
    return tf.where(tf.reduce_max(scores_BV, axis=1) > -np.inf, tokens_B, -1)
