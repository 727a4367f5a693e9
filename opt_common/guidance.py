"""Classifier-free guidance: what a prompt makes likelier than another one would is made likelier still.

The rule is that of Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance", as Hugging Face has it
(transformers 4.57). Each text has a second one beside it, which begins with a negative prompt, or with the prompt's
last token alone, and goes on with the same new tokens. A token's score is

    guidance_scale * (log p(token | text) - log p(token | second text)) + log p(token | second text)

before all processors. Beams, which add scores up, make them log-probabilities again first. In Hugging Face they don't,
and second texts do not follow the beams.

The second texts are more rows of the same batch and of its cache, so that a token costs one step with twice the rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opt_common.config import OPTConfig
from opt_common.errors import GenerationError, InputError, join_problems
from opt_common.generation_config import GenerationConfig
from opt_common.inputs import check_inputs
from opt_common.processors import log_softmax

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.integer[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Guidance:
    """What guides a run.

    Attributes:
        scale: how much the difference to the second texts counts.
        input_ids: (B, N) what these begin with, each row's tokens at the right end.
        attention_mask: (B, N): zeros, then ones.
    """

    scale: float
    input_ids: Ids
    attention_mask: Ids

    def below(self, ids_BT: Ids, mask_BT: Ids) -> tuple[Ids, Ids]:
        """Ids and mask of the texts, and below them of the second texts, (2 * B, T or N, whichever is more)."""
        width = max(ids_BT.shape[1], self.input_ids.shape[1])

        def stacked(*arrays: Ids) -> Ids:
            return np.concatenate([np.pad(array, ((0, 0), (width - array.shape[1], 0))) for array in arrays])

        return stacked(ids_BT, self.input_ids), stacked(mask_BT, self.attention_mask)


def read_negatives(
    config: OPTConfig,
    settings: GenerationConfig,
    rows: int,
    negative_prompt_ids: npt.NDArray[Any] | None,
    negative_prompt_attention_mask: npt.NDArray[Any] | None,
    given: Sequence[str] = (),
) -> tuple[Ids, Ids] | None:
    """Negative prompts and their mask, (rows, N), padded on the left; None where there is none.

    Args:
        config: the model's configuration.
        settings: how to continue.
        rows: how many prompts there are.
        negative_prompt_ids: (rows, N) or (1, N) integers.
        negative_prompt_attention_mask: the same shape, padding anywhere; None means no padding.
        given: names of the arguments without which there are no ids to read again.

    Raises:
        InputError: for ids out of range, or a mask that does not fit.
        GenerationError: for arguments that would change nothing or can't be had together, or an empty prompt.
    """
    named = {
        "negative_prompt_ids": negative_prompt_ids,
        "negative_prompt_attention_mask": negative_prompt_attention_mask,
    }
    names = [name for name, array in named.items() if array is not None]
    if not settings.guided:
        if names:
            raise GenerationError(
                f"{', '.join(names)} would change nothing. Pass a guidance_scale other than 1, or leave "
                f"{'it' if len(names) == 1 else 'them'} out."
            )
        return None
    problems = [f"guidance_scale reads ids, which {name} stands for: leave one of them out." for name in given]
    if negative_prompt_ids is None:
        if names:
            problems.append("negative_prompt_attention_mask is the mask of negative_prompt_ids, which are not given.")
        if problems:
            raise GenerationError(join_problems(problems))
        return None
    values = {"input_ids": np.asarray(negative_prompt_ids)}
    if negative_prompt_attention_mask is not None:
        values["attention_mask"] = np.asarray(negative_prompt_attention_mask)
    try:
        check_inputs(config, shapes={name: array.shape for name, array in values.items()}, values=values)
    except InputError as error:
        raise InputError(f"The negative prompt: {error}") from None
    ids_BN = values["input_ids"]
    mask_BN = values.get("attention_mask", np.ones_like(ids_BN)).astype(np.int64)
    if len(ids_BN) not in {1, rows}:
        problems.append(
            f"negative_prompt_ids has {len(ids_BN)} rows, expected {rows} as there are prompts, or one for all of them."
        )
    if empty := np.flatnonzero(mask_BN.sum(1) == 0).tolist():
        problems.append(f"Negative prompt {empty[0]} is empty: its mask is all zeros. Give it at least one token.")
    if problems:
        raise GenerationError(join_problems(problems))
    order_BN = np.argsort(mask_BN, axis=1, kind="stable")[:, -int(mask_BN.sum(1).max()) :]
    arrays = (np.take_along_axis(array_BN, order_BN, axis=1) for array_BN in (ids_BN, mask_BN))
    ids_BN, mask_BN = (np.repeat(array_BN, rows // len(array_BN), axis=0) for array_BN in arrays)
    return ids_BN, mask_BN


def guided(logits_BV: Array, unconditional_BV: Array, scale: Array) -> Array:
    """Scores of tokens, before the processors: what the function of this name in each backend computes.

    Args:
        logits_BV: what the model gave after each text.
        unconditional_BV: what it gave after each second text.
        scale: how much the difference counts.
    """
    unconditional_BV = log_softmax(unconditional_BV)
    return scale * (log_softmax(logits_BV) - unconditional_BV) + unconditional_BV
