"""What a prompt makes likelier than another one, in TensorFlow: `opt_common.guidance`, on the device of the logits."""

# TensorFlow's annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalOperand=false

import tensorflow as tf

from opt_tf.processors import log_softmax


def guided(logits_BV: tf.Tensor, unconditional_BV: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Scores of tokens, before the processors; see `opt_common.guidance.guided`."""
    unconditional_BV = log_softmax(unconditional_BV)
    weight = tf.cast(scale, unconditional_BV.dtype)
    return weight * (log_softmax(logits_BV) - unconditional_BV) + unconditional_BV
