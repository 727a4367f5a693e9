"""Checkpoints of OPT's published shapes with random weights: speed does not depend on what the numbers are."""

from pathlib import Path

import numpy as np

from conversion import save_checkpoint
from opt_common import OPTConfig
from opt_common.params import Parameter, parameter_table

POOL = 1 << 24
"""Random numbers that are drawn; tensors are stretches of them, so that gigabytes take seconds to make."""


def make(directory: Path, shape: str, *, dtype: str = "float32", seed: int = 0) -> Path:
    """The directory, with a checkpoint of a published shape such as "125m" in it; nothing is done if it is there.

    Args:
        directory: where to.
        shape: name of a released size; see `OPTConfig.from_size`.
        dtype: what the weights are stored in.
        seed: of the random numbers.
    """
    if (directory / "config.json").exists():
        return directory
    config = OPTConfig.from_size(shape)
    table = parameter_table(config)
    pool = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)

    def read(parameter: Parameter) -> np.ndarray:
        if parameter.kind.startswith("layer_norm"):
            return np.full(parameter.shape, parameter.kind.endswith("weight"), dtype=np.float32)
        if parameter.kind.endswith("bias"):
            return np.zeros(parameter.shape, dtype=np.float32)
        start = hash_place(parameter.name)
        return np.resize(np.roll(pool, -start), parameter.shape) * np.float32(config.init_std)

    save_checkpoint(directory, config, table, read, format="safetensors", dtype=dtype)
    return directory


def hash_place(name: str) -> int:
    """Where in the pool a tensor begins: the same place for the same name."""
    return int.from_bytes(name.encode()[-4:], "little") % POOL
