"""What comes to the host from a step's scores, in TensorFlow: small arrays, whatever the size of the vocabulary."""

# TensorFlow's annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportOptionalOperand=false

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from opt_common.decoding import Selection
from opt_common.processors import Program
from opt_tf.assisted import checked
from opt_tf.dola import contrasted
from opt_tf.guidance import guided
from opt_tf.processors import History, choose, log_softmax, process, sample, softmax, vocab_size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What a selection may ask of one step.

    Attributes:
        logits_BV: what the model gave after the last token of each row, at least float32.
        history: the text so far, that token included.
        program: the run's processors.
        arguments: of each processor.
        gates_P: of each processor, in this step.
        early_BCV: what the head predicts of some earlier layers, which the logits are contrasted with, or None.
        unconditional_BV: what the model gave after the texts that guide, or None.
        guidance_scale: how much the difference to those counts, or None.
    """

    logits_BV: tf.Tensor
    history: History
    program: Program
    arguments: Sequence[tuple[tf.Tensor, ...]]
    gates_P: tf.Tensor
    early_BCV: tf.Tensor | None = None
    unconditional_BV: tf.Tensor | None = None
    guidance_scale: tf.Tensor | None = None

    def of(self, rows_B: np.ndarray, chosen_BV: tf.Tensor) -> "Step":
        """The step of some rows, for which other groups of beams have chosen some tokens already."""
        arguments = [
            (*values, chosen_BV) if name == "diversity" else values
            for (name, *_), values in zip(self.program, self.arguments, strict=True)
        ]
        unconditional_BV = self.unconditional_BV
        if unconditional_BV is not None:
            unconditional_BV = tf.gather(unconditional_BV, rows_B)
        return dataclasses.replace(
            self,
            logits_BV=tf.gather(self.logits_BV, rows_B),
            history=self.history.of(rows_B),
            arguments=arguments,
            unconditional_BV=unconditional_BV,
        )

    def processed(self) -> tf.Tensor:
        """Scores after every processor."""
        scores_BV = self.logits_BV if self.early_BCV is None else contrasted(self.logits_BV, self.early_BCV)
        if self.unconditional_BV is not None and self.guidance_scale is not None:
            scores_BV = guided(scores_BV, self.unconditional_BV, self.guidance_scale)
        return process(scores_BV, self.history, self.program, self.arguments, self.gates_P)


def select(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """What a selection brings to the host."""
    return SELECTIONS[selection.name](step, selection, arguments)


def token(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """The next token of each row: "tokens", (B,); -1 where every token is ruled out."""
    scores_BV = step.processed()
    return described(step, selection, scores_BV, choose(scores_BV, arguments[0] if arguments else None))


def draft(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """A token drawn for each row, and the "shares" of all tokens, (B, V), which it was drawn by."""
    del selection
    scores_BV = step.processed()
    return {"tokens": choose(scores_BV, arguments[0]), "shares": softmax(scores_BV)}


def check_drafts(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """As `token`, but guesses that were drawn by some shares are kept or replaced; see `opt_common.assisted`."""
    guessed_B, uniforms_B, chances_B, *shares = arguments
    scores_BV = step.processed()
    shares_BV = tf.concat(shares, axis=0)
    tokens_B = checked(scores_BV, shares_BV, guessed_B, uniforms_B, chances_B)
    return described(step, selection, scores_BV, tokens_B)


def described(step: Step, selection: Selection, scores_BV: tf.Tensor, tokens_B: tf.Tensor) -> dict[str, tf.Tensor]:
    """Some tokens and what is asked for beside them."""
    found = {"tokens": tokens_B, **whole(step, selection, scores_BV)}
    if "logprobs" in selection.details:
        places_B1 = tf.maximum(tokens_B, 0)[:, None]
        found["logprobs"] = tf.gather(log_softmax(scores_BV), places_B1, axis=1, batch_dims=1)[:, 0]
    return found


def beams(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """The best continuations of each prompt's beams.

    Given "totals" of the beams (B, 1, K): "totals" of the continuations (B, size), best first, with the "beams" and the
    "tokens" that they are made of.
    """
    scores_BV = step.processed()
    totals_BM = added(arguments[0], scores_BV)
    places_BC = best(totals_BM, selection.size)
    found = continuations(tf.gather(totals_BM, places_BC, axis=1, batch_dims=1), places_BC, vocab_size(scores_BV))
    return {**found, **whole(step, selection, scores_BV)}


def drawn_beams(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """As `beams`, but drawn by numbers (B, size) without replacement, in the order of draws."""
    scores_BV = step.processed()
    totals_BC, places_BC = drawn(added(arguments[0], scores_BV), arguments[1])
    found = continuations(totals_BC, places_BC, vocab_size(scores_BV))
    return {**found, **whole(step, selection, scores_BV)}


def asked_beams(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """As `beams`, and "asked": the totals of some more tokens, (rows, A) ids."""
    scores_BV = step.processed()
    totals_BM = added(arguments[0], scores_BV)
    places_BC = best(totals_BM, selection.size)
    found = continuations(tf.gather(totals_BM, places_BC, axis=1, batch_dims=1), places_BC, vocab_size(scores_BV))
    totals_BV = tf.reshape(totals_BM, (-1, vocab_size(scores_BV)))
    return {
        **found,
        "asked": tf.gather(totals_BV, arguments[1], axis=1, batch_dims=1),
        **whole(step, selection, scores_BV),
    }


def beam_groups(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """As `beams`, for totals (B, G, K) and results (B, G, size): one group of beams after the other.

    Each knows the tokens that those before it go on with. For that it takes the ids that end a text, which groups go
    on (B, G), and with how many beams.
    """
    totals_BGK, ends_E, open_BG, width = arguments
    (B, G, K), V = totals_BGK.shape, vocab_size(step.logits_BV)
    chosen_BV = tf.zeros((B, V), step.logits_BV.dtype)
    found, scores = [], []
    for group in range(G):
        own = step.of(group_rows(step.logits_BV.shape[0], B, G, group), tf.repeat(chosen_BV, K, axis=0))
        scores.append(own.processed())
        totals_BM = added(totals_BGK[:, group : group + 1], scores[-1])
        places_BC = best(totals_BM, selection.size)
        found.append(continuations(tf.gather(totals_BM, places_BC, axis=1, batch_dims=1), places_BC, V))
        tokens_BC, ends_BC = found[-1]["tokens"], tf.reduce_any(found[-1]["tokens"][..., None] == ends_E, axis=-1)
        onward_BC = ~ends_BC & (found[-1]["totals"] > -np.inf) & open_BG[:, group, None]
        taken_BC = onward_BC & (tf.cumsum(tf.cast(onward_BC, tf.int32), axis=1) <= width)
        chosen_BV = counted(chosen_BV, tokens_BC, tf.cast(taken_BC, chosen_BV.dtype))
    stacked = {name: tf.stack([group[name] for group in found], axis=1) for name in found[0]}
    scores_BV = tf.reshape(tf.stack([tf.reshape(array, (B, K, V)) for array in scores], axis=1), (-1, V))
    return {**stacked, **whole(step, selection, scores_BV)}


def candidates(step: Step, selection: Selection, arguments: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """The likeliest "tokens" of each row, (B, size), likeliest first, and their "logprobs"."""
    del arguments
    scores_BV = step.processed()
    places_BK = best(
        tf.where(tf.math.is_nan(scores_BV), tf.constant(-np.inf, scores_BV.dtype), scores_BV), selection.size
    )
    logprobs_BK = tf.gather(log_softmax(scores_BV), places_BK, axis=1, batch_dims=1)
    return {"tokens": places_BK, "logprobs": logprobs_BK, **whole(step, selection, scores_BV)}


def whole(step: Step, selection: Selection, scores_BV: tf.Tensor) -> dict[str, tf.Tensor]:
    """The arrays as large as the vocabulary, as far as they are asked for."""
    arrays = {"scores": scores_BV, "logits": step.logits_BV}
    return {name: array for name, array in arrays.items() if name in selection.details}


SELECTIONS: dict[str, Callable[[Step, Selection, Sequence[tf.Tensor]], dict[str, tf.Tensor]]] = {
    "token": token,
    "tokens": token,
    "draft": draft,
    "checked": check_drafts,
    "beams": beams,
    "drawn_beams": drawn_beams,
    "asked_beams": asked_beams,
    "beam_groups": beam_groups,
    "candidates": candidates,
    "contrast": candidates,
}


def added(totals_BGK: tf.Tensor, scores_RV: tf.Tensor) -> tf.Tensor:
    """The totals of all continuations of one group, (B, K * V): -inf for what is not a number."""
    (B, _, K), V = totals_BGK.shape, vocab_size(scores_RV)
    totals_BM = tf.reshape(tf.cast(tf.reshape(totals_BGK, (B * K, 1)), scores_RV.dtype) + scores_RV, (B, K * V))
    return tf.where(tf.math.is_nan(totals_BM), tf.constant(-np.inf, totals_BM.dtype), totals_BM)


def best(totals_BM: tf.Tensor, size: int) -> tf.Tensor:
    """The places of the greatest totals, (B, size), greatest first; of equals the lower place."""
    return tf.math.top_k(totals_BM, min(size, vocab_size(totals_BM))).indices


def drawn(totals_BM: tf.Tensor, uniforms_BC: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Totals and places, (B, C), drawn one after the other, each from what is left; -inf where nothing is."""
    found, places = [], []
    for uniforms_B in tf.unstack(uniforms_BC, axis=1):
        places.append(tf.cast(sample(totals_BM, uniforms_B), tf.int32)[:, None])
        found.append(tf.gather(totals_BM, places[-1], axis=1, batch_dims=1))
        taken_BM = tf.range(vocab_size(totals_BM)) == places[-1]
        totals_BM = tf.where(taken_BM, tf.constant(-np.inf, totals_BM.dtype), totals_BM)
    return tf.concat(found, axis=1), tf.concat(places, axis=1)


def counted(chosen_BV: tf.Tensor, tokens_BC: tf.Tensor, taken_BC: tf.Tensor) -> tf.Tensor:
    """Add to how often each token was chosen."""
    B, C = tokens_BC.shape
    rows_BC = tf.broadcast_to(tf.range(B)[:, None], (B, C))
    return tf.tensor_scatter_nd_add(chosen_BV, tf.stack((rows_BC, tokens_BC), axis=-1), taken_BC)


def continuations(totals_BC: tf.Tensor, places_BC: tf.Tensor, V: int) -> dict[str, tf.Tensor]:
    """What some places among all continuations are made of."""
    return {"totals": totals_BC, "beams": places_BC // V, "tokens": places_BC % V}


def group_rows(count: int, B: int, G: int, group: int) -> np.ndarray:
    """The rows of one group among `count`; before the first step, the one row of each prompt is every group's."""
    return np.arange(B) if count == B else np.arange(count).reshape(B, G, -1)[:, group].ravel()
