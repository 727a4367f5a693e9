"""What comes to the host from a step's scores, in JAX: small arrays, whatever the size of the vocabulary."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from opt_common.decoding import Selection
from opt_common.processors import Program
from opt_flax.processors import History, choose, log_softmax, process


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

    logits_BV: Array
    history: History
    program: Program
    arguments: Sequence[tuple[Array, ...]]
    gates_P: Array

    def processed(self) -> Array:
        """Scores after every processor."""
        return process(self.logits_BV, self.history, self.program, self.arguments, self.gates_P)


def select(step: Step, selection: Selection, arguments: Sequence[Array]) -> dict[str, Array]:
    """What a selection brings to the host."""
    return SELECTIONS[selection.name](step, selection, arguments)


def token(step: Step, selection: Selection, arguments: Sequence[Array]) -> dict[str, Array]:
    """The next token of each row: "tokens", (B,); -1 where every token is ruled out."""
    scores_BV = step.processed()
    tokens_B = choose(scores_BV, arguments[0] if arguments else None)
    found = {"tokens": tokens_B, **whole(step, selection, scores_BV)}
    if "logprobs" in selection.details:
        places_B1 = tokens_B.clip(0)[:, None]
        found["logprobs"] = jnp.take_along_axis(log_softmax(scores_BV), places_B1, axis=1)[:, 0]
    return found


def whole(step: Step, selection: Selection, scores_BV: Array) -> dict[str, Array]:
    """The arrays as large as the vocabulary, as far as they are asked for."""
    arrays = {"scores": scores_BV, "logits": step.logits_BV}
    return {name: array for name, array in arrays.items() if name in selection.details}


SELECTIONS: dict[str, Callable[[Step, Selection, Sequence[Array]], dict[str, Array]]] = {"token": token}
