"""How good is a model: perplexity, what weights in few bits change in each layer, and outliers to try them with.

Perplexity is exp of the mean cross-entropy (nats) of every token after the first of its window, in which only the
window's own tokens are read.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opt_common.config import OPTConfig
from opt_common.errors import ConfigError
from opt_common.params import parameter_table
from opt_common.reference import IGNORED_LABEL

_OUTLIER_SHARE = 100
# One channel in so many gets outliers: in OPT-6.7B and larger a handful of thousands have them.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows of text, of one length.

    Attributes:
        input_ids: (B, T), padded on the right.
        attention_mask: (B, T): 1 for a token, 0 for padding.
        labels: (B, T): the ids, -100 where there is padding.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    @property
    def scored(self) -> int:
        """How many tokens have a probability: all but the first of each window."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())


def windows(texts: Iterable[Sequence[int]], length: int) -> list[list[int]]:
    """Cut texts into windows.

    Args:
        texts: ids of each.
        length: tokens in a window at most.

    Returns:
        The windows with at least two tokens.
    """
    cut = [list(ids[start : start + length]) for ids in texts for start in range(0, len(ids), length)]
    return [window for window in cut if len(window) > 1]


def batches(windows: Sequence[Sequence[int]], size: int, pad_token_id: int) -> Iterator[Batch]:
    """The windows, a batch at a time, all batches of one shape so that nothing is compiled twice.

    Args:
        windows: ids of each.
        size: B.
        pad_token_id: what fills the rest.
    """
    length = max(map(len, windows))
    for start in range(0, len(windows), size):
        rows = windows[start : start + size]
        ids_BT = np.full((size, length), pad_token_id, dtype=np.int64)
        mask_BT = np.zeros_like(ids_BT)
        # Rows too many repeat the last one, unscored: one that attends to nothing would have no numbers.
        for row, window in enumerate([*rows, *[rows[-1]] * (size - len(rows))]):
            ids_BT[row, : len(window)] = window
            mask_BT[row, : len(window)] = 1
        labels_BT = np.where(mask_BT == 1, ids_BT, IGNORED_LABEL)
        labels_BT[len(rows) :] = IGNORED_LABEL
        yield Batch(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT)


def perplexity(losses: Sequence[float], scored: Sequence[int]) -> float:
    """Perplexity of all tokens.

    Args:
        losses: mean cross-entropy of each batch.
        scored: tokens that it is the mean of.
    """
    return math.exp(sum(loss * count for loss, count in zip(losses, scored, strict=True)) / sum(scored))


def layer_errors(
    found: Sequence[npt.NDArray[Any]], expected: Sequence[npt.NDArray[Any]], mask_BT: npt.NDArray[np.int64]
) -> list[float]:
    """How far hidden states have moved: the norm of the difference over the norm, layer by layer.

    Args:
        found: (B, T, D) after the embeddings and after each layer.
        expected: the same of the model in full precision.
        mask_BT: 1 for the positions that count.
    """
    attended = mask_BT == 1

    def norm(states_BTD: npt.NDArray[Any]) -> float:
        return float(np.linalg.norm(states_BTD[attended].astype(np.float64)))

    return [norm(a - b) / max(norm(b), np.finfo(np.float64).tiny) for a, b in zip(found, expected, strict=True)]


def outlier_channels(width: int) -> npt.NDArray[np.int64]:
    """Which channels get outliers: one in a hundred, at least one, drawn once and for all."""
    return np.sort(np.random.default_rng(0).choice(width, size=max(1, width // _OUTLIER_SHARE), replace=False))


def outlier_scales(config: OPTConfig, factor: float) -> Mapping[str, npt.NDArray[np.float32]]:
    """Factors that put outliers into a model without changing what it computes.

    In the channels chosen, what each layer norm gives is multiplied and the columns of the matrices that read it are
    divided. With a factor above 1 the norms' results have outliers, as those of large OPT models have (Dettmers et al.
    2022); with one below 1 the matrices have them.

    Args:
        config: the model's configuration.
        factor: what the norms' channels are multiplied by, a power of two if no bit is to change.

    Returns:
        For the names of some parameters, what they are multiplied by.

    Raises:
        ConfigError: if the norms do not stand before the matrices or have no weights.
    """
    if not config.do_layer_norm_before or not config.layer_norm_elementwise_affine:
        raise ConfigError(
            "Outliers need layer norms with weights in front of the matrices, and this model has none "
            "(do_layer_norm_before or layer_norm_elementwise_affine is False). Evaluate it without outliers."
        )
    scale_D = np.ones(config.hidden_size, dtype=np.float32)
    scale_D[outlier_channels(config.hidden_size)] = factor
    found: dict[str, npt.NDArray[np.float32]] = {}
    for parameter in parameter_table(config):
        module = parameter.name.split(".")[-2]
        if module in ("self_attn_layer_norm", "final_layer_norm") and ".layers." in parameter.name:
            found[parameter.name] = scale_D
        elif parameter.kind == "linear.weight" and module in ("q_proj", "k_proj", "v_proj", "fc1"):
            found[parameter.name] = np.reciprocal(scale_D)
    return found
