"""The continuations that beams are chosen from, in NumPy: what each backend's `selection.py` computes on its device."""

from typing import Any

import numpy as np
import numpy.typing as npt

from opt_common.processors import sample


def best(totals_BM: npt.NDArray[Any], size: int) -> npt.NDArray[np.intp]:
    """The places of the greatest totals, (B, size), greatest first; of equals the lower place."""
    return np.argsort(-totals_BM, axis=1, kind="stable")[:, :size]


def drawn(totals_BM: npt.NDArray[Any], uniforms_BC: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Places drawn by their totals, as log-probabilities, without replacement: (B, C), in the order of draws.

    Each draw is that of `opt_common.processors.sample`, over what the draws before have left.
    """
    places: list[npt.NDArray[Any]] = []
    for uniforms_B in uniforms_BC.T:
        places.append(sample(totals_BM, uniforms_B))
        totals_BM = totals_BM.copy()
        np.put_along_axis(totals_BM, places[-1][:, None], -np.inf, axis=1)
    return np.stack(places, axis=1)
