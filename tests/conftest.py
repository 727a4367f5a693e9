"""Fixtures of the whole suite."""

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any framework is imported: one thread, because the models are tiny and tests run side by side; no log lines;
# nothing in the cache directory of whoever runs the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

from tests.adapters import ADAPTERS, BACKENDS, Adapter
from tests.cases import has_seed, write_seeded
from tests.paths import GOLDENS


@functools.cache
def adapter(name: str) -> Adapter:
    """The one adapter of a framework."""
    return ADAPTERS[name]()


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Adapter:
    """Each framework under test."""
    return adapter(request.param)


@pytest.fixture(scope="session")
def backends() -> tuple[Adapter, ...]:
    """All frameworks under test at once, for tests that hold them against each other."""
    return tuple(map(adapter, BACKENDS))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a variant's checkpoint in a format; seeded variants are written on first use."""

    @functools.cache
    def find(variant: str, format: str = "safetensors") -> Path:
        if has_seed(variant):
            return write_seeded(variant, tmp_path_factory.mktemp(variant) / format)
        return GOLDENS / variant / format

    return find


@pytest.fixture(scope="session")
def load(checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """Load a variant, once per session: for tests that leave the model as it is."""

    @functools.lru_cache(maxsize=32)
    def cached(
        backend: Adapter, variant: str, format: str = "safetensors", dtype: str = "float32", bare: bool = False
    ) -> Any:
        return backend.load(checkpoint(variant, format), dtype=dtype, bare=bare)

    return cached


GROWTH_BYTES = 2 << 30
"""Memory that a test process may gain before compiled programs are forgotten: thousands of them come together."""

_limit_bytes = [2 * GROWTH_BYTES]


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Forget what JAX has compiled for earlier tests when it has become too much."""
    yield
    if "jax" in sys.modules and resident_bytes() > _limit_bytes[0]:
        sys.modules["jax"].clear_caches()
        gc.collect()
        # What stays is other things: forgetting more often would only compile more.
        _limit_bytes[0] = max(_limit_bytes[0], resident_bytes() + GROWTH_BYTES)


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
