"""Checkpoints that nobody trained: released shapes with random weights, and models with outliers put into them."""

import os
import zlib
from typing import Any

import numpy as np

from conversion.checkpoint import open_checkpoint
from conversion.convert import locate
from conversion.merge import weights_of
from conversion.save import save_checkpoint
from opt_common.config import OPTConfig
from opt_common.evaluation import outlier_scales
from opt_common.params import Parameter, parameter_table

_POOL = 1 << 24
# Random numbers that are drawn; tensors are stretches of them, so that gigabytes take seconds to make.


def write_random(
    directory: str | os.PathLike[str], config: OPTConfig, *, dtype: str = "float32", seed: int = 0
) -> None:
    """Write a checkpoint with random weights: speed does not depend on what the numbers are.

    Args:
        directory: where to.
        config: the shape.
        dtype: what the weights are stored in.
        seed: of the random numbers.

    Raises:
        CheckpointError: if it cannot be written.
    """
    pool = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)

    def read(parameter: Parameter) -> np.ndarray[Any, Any]:
        if parameter.kind.startswith("layer_norm"):
            return np.full(parameter.shape, parameter.kind.endswith("weight"), dtype=np.float32)
        if parameter.kind.endswith("bias"):
            return np.zeros(parameter.shape, dtype=np.float32)
        # Matrices of their own: a converter that stores equal ones once would make a smaller model.
        start = zlib.crc32(parameter.name.encode()) % _POOL
        return np.resize(np.roll(pool, -start), parameter.shape) * np.float32(config.init_std)

    save_checkpoint(directory, config, parameter_table(config), read, dtype=dtype)


def write_outliers(source: str, directory: str | os.PathLike[str], factor: float, **hub: Any) -> None:
    """Write a language model with outliers put into it, in float32; see `opt_common.evaluation.outlier_scales`.

    Args:
        source: a directory, a weight file or a hub id.
        directory: where to.
        factor: how much larger the outliers are.
        hub: how it is fetched, as in `convert`.

    Raises:
        CheckpointError: if it cannot be read or written.
        ConfigError: if the model's norms do not stand before its matrices.
    """
    with open_checkpoint(locate(source, **hub)) as checkpoint:
        weights = weights_of(checkpoint)
        scales = outlier_scales(weights.config, factor)

        def read(parameter: Parameter) -> np.ndarray[Any, Any]:
            array = np.asarray(weights.read(parameter), dtype=np.float32)
            scale = scales.get(parameter.name)
            return array if scale is None else array * scale

        save_checkpoint(directory, weights.config, weights.table, read, dtype="float32")
