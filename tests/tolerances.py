"""How far results may lie from what they are held to: THE table, and the one comparison the suite uses.

An error above the table is taken for a mistake until its cause is written down here.
"""

import dataclasses

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Greatest difference allowed: `absolute + relative * max|expected|`.

    Attributes:
        absolute: in the unit of the result.
        relative: share of the largest expected magnitude.
        why: where the figure comes from.
    """

    absolute: float
    relative: float = 0.0
    why: str

    def limit(self, expected: npt.NDArray[np.float64]) -> float:
        """The greatest difference from these values."""
        return self.absolute + self.relative * float(np.abs(expected).max(initial=0.0))


FLOAT32 = Tolerance(
    absolute=1e-5, relative=2e-6, why="Hugging Face's own float32 lies up to 1.1e-5 from its float64 on the goldens"
)
FLOAT32_GRADIENT = Tolerance(
    absolute=1e-5,
    relative=2e-6,
    why="a gradient sums as many float32 roundings as the forward pass does, and is smaller",
)
FLOAT32_REAL_SHAPE = Tolerance(
    absolute=1e-4, why="sums of 4096 terms through 24 layers: rounding grows with width and depth"
)
FLOAT64_GOLDEN = Tolerance(
    absolute=1e-9, why="the goldens' own float64 rounding is near 1e-13; the rest is room for libraries"
)
FLOAT64 = Tolerance(
    absolute=1e-10, why="between implementations of one definition only the order of float64 sums differs"
)
FLOAT64_GRADIENT = Tolerance(absolute=1e-9, why="as FLOAT64; gradients of summed rows are up to ten times larger")
PROCESSED = Tolerance(
    absolute=1e-6, relative=1e-7, why="one float32 rounding of the goldens themselves, 6e-8 of scores up to 30"
)
BEAM_SCORE = Tolerance(
    absolute=1e-5, relative=2e-6, why="a sum of up to twelve log-probabilities, each with FLOAT32's rounding"
)
INT8_PRODUCT = Tolerance(
    absolute=1e-6,
    relative=2e-4,
    why="an input between two integers may be rounded either way: one step of its row's scale",
)
INT4_PRODUCT = Tolerance(absolute=1e-6, relative=8e-3, why="inputs and results of the kernel are bfloat16: 8 bits")
CACHE_FLOAT64 = Tolerance(absolute=1e-10, why="a step computes the full pass's sums over the same keys")
FLOAT16 = Tolerance(
    absolute=2e-3,
    relative=4e-3,
    why="float16 keeps 11 bits: 4.9e-4 relative per rounding, and about eight operations are chained",
)
BFLOAT16 = Tolerance(
    absolute=1.6e-2,
    relative=3.2e-2,
    why="bfloat16 keeps 8 bits, three fewer than float16: eight times FLOAT16",
)


def compare(
    found: npt.ArrayLike,
    expected: npt.ArrayLike,
    tolerance: Tolerance,
    *,
    what: str = "",
    attended: npt.ArrayLike | None = None,
    query_axis: int = 1,
) -> float:
    """Assert that two arrays agree, and return the greatest difference.

    Args:
        found: the result.
        expected: what it is held to, of the same shape.
        tolerance: a row of the table above.
        what: name of the result, for the message.
        attended: (B, T) mask; positions where it is 0 mean nothing and are left out.
        query_axis: axis of T: 1 for (B, T, …), 2 for attention probabilities (B, N, T, S).
    """
    __tracebackhide__ = True
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    counted = np.ones(expected.shape, dtype=bool)
    if attended is not None:
        mask_BT = np.asarray(attended) == 1
        shape = [1] * expected.ndim
        shape[0], shape[query_axis] = mask_BT.shape
        counted &= mask_BT.reshape(shape)
    assert counted.any(), f"{what}: nothing to compare"
    expected = np.where(counted, expected, 0).astype(np.float64)
    difference = np.abs(np.where(counted, found, 0).astype(np.float64) - expected)
    difference = np.where(np.isnan(difference), np.inf, difference)
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    index = tuple(int(i) for i in worst)
    limit = tolerance.limit(expected)
    message = (
        f"{what}: |{found[worst]!r} - {expected[worst]!r}| = {difference[worst]:.3g} at {index}, allowed {limit:.3g}"
    )
    assert difference[worst] <= limit, message
    return float(difference[worst])


def fails(
    found: npt.ArrayLike, expected: npt.ArrayLike, tolerance: Tolerance, *, attended: npt.ArrayLike | None
) -> bool:
    """Whether `compare` would refuse: what the mutation checks demand."""
    try:
        compare(found, expected, tolerance, attended=attended)
    except AssertionError:
        return True
    return False
