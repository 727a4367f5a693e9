"""Curves of losses. `python -m examples.common.plot loss.png RUN RUN RUN` draws several runs of a task into one."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

LABELS = {"torch": "PyTorch", "tf": "TensorFlow", "flax": "JAX"}
STYLES = {"torch": ("#c44e2b", "-"), "tf": ("#2b6cc4", "--"), "flax": ("#2f8f4e", ":")}
"""Colour and dashes of each framework. Curves that coincide can still be told apart."""


def plot(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the curves of one task as PNG: each step faint, the mean of the last steps strong.

    Args:
        path: the file.
        results: of runs, as in `result.json`.
    """
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        losses = np.array(result["losses"])
        steps = np.arange(1, len(losses) + 1)
        colour, dashes = STYLES[result["framework"]]
        if len(results) == 1:
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        label = f"{LABELS[result['framework']]}: {result['metric']} {result['score']:.3f}"
        axes.plot(steps, smooth(losses), color=colour, linestyle=dashes, linewidth=1.8, label=label)
    axes.axhline(results[0]["constant_loss"], color="#777777", linewidth=1, linestyle="-.")
    axes.annotate(
        f"constant predictor ({results[0]['constant_score']:.3f})",
        (1, results[0]["constant_loss"]),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="#777777",
        fontsize=9,
    )
    axes.set(title=results[0]["title"], xlabel="step", ylabel="training loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def smooth(losses: np.ndarray, window: int = 10) -> np.ndarray:
    """At each step the mean of the last `window` losses, or of all there are so far."""
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the PNG file")
    parser.add_argument("runs", type=Path, nargs="+", help="directories of finished runs of one task")
    arguments = parser.parse_args()
    results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in arguments.runs]
    plot(arguments.path, results)


if __name__ == "__main__":
    main()
