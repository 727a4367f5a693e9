"""What comes to the host from a step's scores, in TensorFlow: small arrays, whatever the size of the vocabulary."""

import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from opt_common.decoding import Selection
from opt_common.processors import Program
from opt_tf.processors import History, choose, log_softmax, process


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What a selection may ask of one step.

    Attributes:
        logits_BV: what the model gave after the last token of each row, at least float32.
        history: the text so far, that token included.
        program: the run's processors.
        arguments: of each processor.
        gates_P: of each processor, in this step.
    """

    logits_BV: tf.Tensor
    history: History
    program: Program
    arguments: Sequence[tuple[tf.Tensor, ...]]
    gates_P: tf.Tensor

    def processed(self) -> tf.Tensor:
        """Scores after every processor."""
        return process(self.logits_BV, self.history, self.program, self.arguments, self.gates_P)


def select(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """What a selection brings to the host."""
    return SELECTIONS[selection.name](step, selection, arguments)


def token(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """The next token of each row: "tokens", (B,); -1 where every token is ruled out."""
    scores_BV = step.processed()
    tokens_B = choose(scores_BV, arguments[0] if arguments else None)
    found = {"tokens": tokens_B, **whole(step, selection, scores_BV)}
    if "logprobs" in selection.details:
        places_B1 = tf.maximum(tokens_B, 0)[:, None]
        found["logprobs"] = tf.gather(log_softmax(scores_BV), places_B1, axis=1, batch_dims=1)[:, 0]
    return found


def whole(step: Step, selection: Selection, scores_BV: tf.Tensor) -> dict[str, tf.Tensor]:
    """The arrays as large as the vocabulary, as far as they are asked for."""
    arrays = {"scores": scores_BV, "logits": step.logits_BV}
    return {name: array for name, array in arrays.items() if name in selection.details}


SELECTIONS: dict[str, Callable[[Step, Selection, Sequence[tf.Tensor]], dict[str, tf.Tensor]]] = {"token": token}
