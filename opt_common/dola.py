"""DoLa: what the last layer has learnt over an earlier one decides.

The rule is that of Chuang et al. 2024, "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language
Models", as Hugging Face has it (transformers 4.55, the last version with it). The head, applied to an earlier hidden
state as it is (without the decoder's final norm), predicts a token too. Of some candidate layers, the one whose
prediction is furthest from the last layer's is contrasted with it: tokens score the difference of their
log-probabilities. Tokens with less than a tenth of the likeliest one's probability in the last layer are ruled out.
Then come the processors, and the likeliest token or a drawn one.

Two things are not Hugging Face's. Each row has its own layer; there, one is chosen for a whole batch, so that a row
depends on its neighbours. And where hidden states are wider than the head (350m), an early prediction goes through
`project_out` as the last one does; there, it is an error.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from opt_common.config import OPTConfig
from opt_common.errors import GenerationError
from opt_common.processors import log_softmax

Array = npt.NDArray[Any]

RELATIVE_TOP = math.log(0.1)
"""How far below the likeliest token's log-probability a token may be."""


def candidate_layers(config: OPTConfig, dola_layers: str | tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers whose inputs may be contrasted with the last layer's output: 0 is the embeddings' sum.

    Args:
        config: the model's configuration.
        dola_layers: "low" and "high" stand for every second layer of the lower and of the upper half, of models with
            more than 40 layers for those among the first and the last 20; or their numbers; None for no layer.

    Raises:
        GenerationError: for layers that the model does not have.
    """
    layers = config.num_hidden_layers
    if dola_layers is None:
        return ()
    if not isinstance(dola_layers, str):
        if unknown := [layer for layer in dola_layers if layer >= layers]:
            raise GenerationError(
                f"dola_layers has {unknown[0]}, expected numbers from 0 to {layers - 1}: this model has {layers} "
                "layers, and the last one's output is what others are contrasted with."
            )
        return dola_layers
    half = layers // 2
    if dola_layers == "high":
        return tuple(range(half if layers <= 40 else layers - 20, layers, 2))
    # With a tied head, the embeddings predict the very token that was read.
    first = min(2, half) if config.tie_word_embeddings else 0
    return tuple(range(first, half if layers <= 40 else 20, 2)) or (first,)


def early_logits(config: OPTConfig, params: Mapping[str, Array], hidden_BD: Array) -> Array:
    """What the head predicts of a layer's input, (B, V): the reference for the backends' `dola.py`."""
    if config.has_projection:
        hidden_BD = hidden_BD @ params["model.decoder.project_out.weight"].T
    tied = "model.decoder.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return hidden_BD @ params[tied].T


def contrasted(final_BV: Array, early_BCV: Array) -> Array:
    """Scores of tokens, before the processors: what the function of this name in each backend computes.

    Args:
        final_BV: logits of the last layer.
        early_BCV: logits of the candidate layers. The one that is furthest from the last layer is taken, of equals the
            first: by the divergence of both distributions to their mean, from the mean.
    """
    B, C, V = early_BCV.shape
    final_BV = log_softmax(final_BV)
    early_BCV = log_softmax(early_BCV.reshape(B * C, V)).reshape(B, C, V)
    mean_BCV = (np.exp(final_BV)[:, None] + np.exp(early_BCV)) / 2
    logs_BCV = np.log(np.where(mean_BCV > 0, mean_BCV, 1))
    furthest_B = (mean_BCV * (2 * logs_BCV - final_BV[:, None] - early_BCV)).sum(-1).argmax(1)
    scores_BV = final_BV - early_BCV[np.arange(B), furthest_B]
    return np.where(final_BV < final_BV.max(1, keepdims=True) + RELATIVE_TOP, -np.inf, scores_BV)
