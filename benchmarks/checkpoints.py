"""Checkpoints of OPT's published shapes with random weights."""

from pathlib import Path

from conversion.synthetic import write_random
from opt_common import OPTConfig


def make(directory: Path, shape: str, *, dtype: str = "float32", seed: int = 0) -> Path:
    """The directory, with a checkpoint of a published shape such as "125m" in it; nothing is done if it is there.

    Args:
        directory: where to.
        shape: name of a released size; see `OPTConfig.from_size`.
        dtype: what the weights are stored in.
        seed: of the random numbers.
    """
    if not (directory / "config.json").exists():
        write_random(directory, OPTConfig.from_size(shape), dtype=dtype, seed=seed)
    return directory
