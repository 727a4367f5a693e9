"""Random weights that are the same bits on every machine and in every environment.

The shapes of the released models, and a model with OPT's true vocabulary, are too large to keep here; their
goldens were computed from these weights, and the tests write them anew. Only NumPy is needed here, because
`goldens/regenerate.py` runs in an environment without this package.
"""

import math
import zlib

import numpy as np

_UNIT = math.sqrt(3.0)
"""Half the width of a uniform distribution whose standard deviation is one."""


def seeded_weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values, in canonical layout, of the tensor with a canonical name.

    Raw bits of a counter-based generator and exact float32 arithmetic: no library's normal distribution enters, so
    that no release of NumPy can change the values. Nothing is left at 0 or 1, and every scale is one at which a sign
    error, a dropped norm or a swapped matrix shows.
    """
    count = math.prod(shape)
    bits = np.random.Philox(key=[seed, zlib.crc32(name.encode())]).random_raw((count + 3) // 4)
    unit = (bits.astype("<u8").view("<u2")[:count].astype(np.float32) - np.float32(32767.5)) / np.float32(32768)
    centre, deviation = _centre_and_deviation(name, shape)
    values = unit * np.float32(deviation * _UNIT) + np.float32(centre)
    return values.reshape(shape)


def _centre_and_deviation(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("bias"):
        return 0.0, 0.1
    if name.endswith("layer_norm.weight"):
        return 1.0, 0.1
    if "embed_positions" in name:
        return 0.0, 0.5
    if "embed_tokens" in name or "lm_head" in name:
        return 0.0, 2 / math.sqrt(shape[1])  # keeps the logits' deviation near two at any width
    return 0.0, 1 / math.sqrt(shape[1])
