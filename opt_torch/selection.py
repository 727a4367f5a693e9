"""What comes to the host from a step's scores, in PyTorch: small arrays, whatever the size of the vocabulary."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from opt_common.decoding import Selection
from opt_common.processors import Program
from opt_torch.assisted import checked
from opt_torch.dola import contrasted
from opt_torch.guidance import guided
from opt_torch.processors import History, choose, log_softmax, process, sample, softmax


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

    logits_BV: Tensor
    history: History
    program: Program
    arguments: Sequence[tuple[Tensor, ...]]
    gates_P: Tensor
    early_BCV: Tensor | None = None
    unconditional_BV: Tensor | None = None
    guidance_scale: Tensor | None = None

    def of(self, rows_B: np.ndarray, chosen_BV: Tensor) -> "Step":
        """The step of some rows, for which other groups of beams have chosen some tokens already."""
        arguments = [
            (*values, chosen_BV) if name == "diversity" else values
            for (name, *_), values in zip(self.program, self.arguments, strict=True)
        ]
        unconditional_BV = self.unconditional_BV
        if unconditional_BV is not None:
            unconditional_BV = unconditional_BV[rows_B]
        return dataclasses.replace(
            self,
            logits_BV=self.logits_BV[rows_B],
            history=self.history.of(rows_B),
            arguments=arguments,
            unconditional_BV=unconditional_BV,
        )

    def processed(self) -> Tensor:
        """Scores after every processor."""
        scores_BV = self.logits_BV if self.early_BCV is None else contrasted(self.logits_BV, self.early_BCV)
        if self.unconditional_BV is not None and self.guidance_scale is not None:
            scores_BV = guided(scores_BV, self.unconditional_BV, self.guidance_scale)
        return process(scores_BV, self.history, self.program, self.arguments, self.gates_P)


def select(step: Step, selection: Selection, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """What a selection brings to the host."""
    return SELECTIONS[selection.name](step, selection, arguments)


def token(step: Step, selection: Selection, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """The next token of each row: "tokens", (B,); -1 where every token is ruled out."""
    scores_BV = step.processed()
    return described(step, selection, scores_BV, choose(scores_BV, arguments[0] if arguments else None))


def draft(step: Step, selection: Selection, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """A token drawn for each row, and the "shares" of all tokens, (B, V), which it was drawn by."""
    del selection
    scores_BV = step.processed()
    return {"tokens": choose(scores_BV, arguments[0]), "shares": softmax(scores_BV)}


def check_drafts(step: Step, selection: Selection, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """As `token`, but guesses that were drawn by some shares are kept or replaced; see `opt_common.assisted`."""
    guessed_B, uniforms_B, chances_B, *shares = arguments
    scores_BV = step.processed()
    shares_BV = torch.cat(shares)
    tokens_B = checked(scores_BV, shares_BV, guessed_B, uniforms_B, chances_B)
    return described(step, selection, scores_BV, tokens_B)


def described(step: Step, selection: Selection, scores_BV: Tensor, tokens_B: Tensor) -> dict[str, Tensor]:
    """Some tokens and what is asked for beside them."""
    found = {"tokens": tokens_B, **whole(step, selection, scores_BV)}
    if "logprobs" in selection.details:
        places_B1 = tokens_B.clamp(min=0)[:, None]
        found["logprobs"] = log_softmax(scores_BV).gather(1, places_B1)[:, 0]
    return found


def beams(step: Step, selection: Selection, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """The best continuations of each prompt's beams.

    Given "totals" of the beams (B, 1, K): "totals" of the continuations (B, size), best first, with the "beams" and the
    "tokens" that they are made of.
    """
    scores_BV = step.processed()
    totals_BM = added(arguments[0], scores_BV)
    places_BC = best(totals_BM, selection.size)
    found = continuations(totals_BM.gather(1, places_BC), places_BC, scores_BV.shape[1])
    return {**found, **whole(step, selection, scores_BV)}


def drawn_beams(step: Step, selection: Selection, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """As `beams`, but drawn by numbers (B, size) without replacement, in the order of draws."""
    scores_BV = step.processed()
    totals_BC, places_BC = drawn(added(arguments[0], scores_BV), arguments[1])
    found = continuations(totals_BC, places_BC, scores_BV.shape[1])
    return {**found, **whole(step, selection, scores_BV)}


def asked_beams(step: Step, selection: Selection, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """As `beams`, and "asked": the totals of some more tokens, (rows, A) ids."""
    scores_BV = step.processed()
    totals_BM = added(arguments[0], scores_BV)
    places_BC = best(totals_BM, selection.size)
    found = continuations(totals_BM.gather(1, places_BC), places_BC, scores_BV.shape[1])
    totals_BV = totals_BM.reshape(scores_BV.shape)
    return {**found, "asked": totals_BV.gather(1, arguments[1].long()), **whole(step, selection, scores_BV)}


def beam_groups(step: Step, selection: Selection, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """As `beams`, for totals (B, G, K) and results (B, G, size): one group of beams after the other.

    Each knows the tokens that those before it go on with. For that it takes the ids that end a text, which groups go
    on (B, G), and with how many beams.
    """
    totals_BGK, ends_E, open_BG, width = arguments
    (B, G, K), V = totals_BGK.shape, step.logits_BV.shape[1]
    chosen_BV = step.logits_BV.new_zeros((B, V))
    found, scores = [], []
    for group in range(G):
        own = step.of(group_rows(len(step.logits_BV), B, G, group), chosen_BV.repeat_interleave(K, dim=0))
        scores.append(own.processed())
        totals_BM = added(totals_BGK[:, group : group + 1], scores[-1])
        places_BC = best(totals_BM, selection.size)
        found.append(continuations(totals_BM.gather(1, places_BC), places_BC, V))
        tokens_BC, ends_BC = found[-1]["tokens"], (found[-1]["tokens"][..., None] == ends_E).any(-1)
        onward_BC = ~ends_BC & (found[-1]["totals"] > -torch.inf) & open_BG[:, group, None]
        taken_BC = onward_BC & (onward_BC.cumsum(1) <= width)
        chosen_BV = chosen_BV.scatter_add(1, tokens_BC, taken_BC.to(chosen_BV.dtype))
    stacked = {name: torch.stack([group[name] for group in found], dim=1) for name in found[0]}
    scores_BV = torch.stack([array.reshape(B, K, V) for array in scores], dim=1).reshape(-1, V)
    return {**stacked, **whole(step, selection, scores_BV)}


def candidates(step: Step, selection: Selection, arguments: Sequence[Tensor]) -> dict[str, Tensor]:
    """The likeliest "tokens" of each row, (B, size), likeliest first, and their "logprobs"."""
    del arguments
    scores_BV = step.processed()
    places_BK = best(torch.where(scores_BV.isnan(), -torch.inf, scores_BV), selection.size)
    logprobs_BK = log_softmax(scores_BV).gather(1, places_BK)
    return {"tokens": places_BK, "logprobs": logprobs_BK, **whole(step, selection, scores_BV)}


def whole(step: Step, selection: Selection, scores_BV: Tensor) -> dict[str, Tensor]:
    """The arrays as large as the vocabulary, as far as they are asked for."""
    arrays = {"scores": scores_BV, "logits": step.logits_BV}
    return {name: array for name, array in arrays.items() if name in selection.details}


SELECTIONS: dict[str, Callable[[Step, Selection, Sequence[Tensor]], dict[str, Tensor]]] = {
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


def added(totals_BGK: Tensor, scores_RV: Tensor) -> Tensor:
    """The totals of all continuations of one group, (B, K * V): -inf for what is not a number."""
    (B, _, K), V = totals_BGK.shape, scores_RV.shape[1]
    totals_BM = (totals_BGK.reshape(B * K, 1).to(scores_RV.dtype) + scores_RV).reshape(B, K * V)
    return torch.where(totals_BM.isnan(), -torch.inf, totals_BM)


def best(totals_BM: Tensor, size: int) -> Tensor:
    """The places of the greatest totals, (B, size), greatest first; of equals the lower place."""
    size = min(size, totals_BM.shape[1])
    last_B1 = totals_BM.topk(size, dim=1).values[:, -1:]
    # topk takes any of the equal totals at its end.
    above_BM, equal_BM = totals_BM > last_B1, totals_BM == last_B1
    room_B1 = size - above_BM.sum(1, keepdim=True)
    places_BC = (above_BM | (equal_BM & (equal_BM.cumsum(1) <= room_B1))).nonzero()[:, 1].reshape(-1, size)
    order_BC = totals_BM.gather(1, places_BC).argsort(dim=1, descending=True, stable=True)
    return places_BC.gather(1, order_BC)


def drawn(totals_BM: Tensor, uniforms_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Totals and places, (B, C), drawn one after the other, each from what is left; -inf where nothing is."""
    found, places = [], []
    for uniforms_B in uniforms_BC.unbind(1):
        places.append(sample(totals_BM, uniforms_B)[:, None])
        found.append(totals_BM.gather(1, places[-1]))
        totals_BM = totals_BM.scatter(1, places[-1], -torch.inf)
    return torch.cat(found, dim=1), torch.cat(places, dim=1)


def continuations(totals_BC: Tensor, places_BC: Tensor, V: int) -> dict[str, Tensor]:
    """What some places among all continuations are made of."""
    return {"totals": totals_BC, "beams": places_BC // V, "tokens": places_BC % V}


def group_rows(count: int, B: int, G: int, group: int) -> np.ndarray:
    """The rows of one group among `count`; before the first step, the one row of each prompt is every group's."""
    return np.arange(B) if count == B else np.arange(count).reshape(B, G, -1)[:, group].ravel()
