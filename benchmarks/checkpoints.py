"""Checkpoints of OPT's published shapes with random weights: speed does not depend on what the numbers are."""

from pathlib import Path

import numpy as np

from conversion import save_checkpoint
from opt_common import OPTConfig
from opt_common.params import Parameter, parameter_table

SHAPES = {
    "125m": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "ffn_dim": 3072},
    "350m": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "1.3b": {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "ffn_dim": 8192},
    "2.7b": {"num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 32, "ffn_dim": 10240},
}
"""What the published configurations change of the defaults."""

POOL = 1 << 24
"""Random numbers that are drawn; tensors are stretches of them, so that gigabytes take seconds to make."""


def make(directory: Path, shape: str, *, dtype: str = "float32", seed: int = 0) -> Path:
    """The directory, with a checkpoint of a published shape such as "125m" in it; nothing is done if it is there.

    Args:
        directory: where to.
        shape: key of `SHAPES`.
        dtype: what the weights are stored in.
        seed: of the random numbers.
    """
    if (directory / "config.json").exists():
        return directory
    config = OPTConfig(**SHAPES[shape])
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
