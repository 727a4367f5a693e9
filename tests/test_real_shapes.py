"""The released 125m and 350m shapes, with seeded weights: Hugging Face's logits, the reference, and the backends agree.

Full width and depth show what tiny models hide: 64-wide heads, the true vocabulary, rounding through 24 layers.
"""

import functools

import numpy as np
import pytest

from opt_common import reference
from tests.cases import SHAPES, config_of, expected, seeded_parameters, write_seeded
from tests.paths import GOLDENS
from tests.tolerances import FLOAT32_REAL_SHAPE, compare

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real shapes")]


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory):
    """Name and directory of a seeded checkpoint; removed with the module, for it has up to 1.3 GB."""
    directory = tmp_path_factory.mktemp(request.param)
    yield request.param, write_seeded(request.param, directory)
    for file in directory.iterdir():
        file.unlink()


@functools.lru_cache(maxsize=1)
def reference_logits(name):
    """Of the last position, in float64."""
    ids = expected(name)["nopad"]["input_ids"]
    return reference.forward(config_of(name), seeded_parameters(name), ids).logits[:, -1]


def test_the_reference_is_hugging_face_s(shape):
    name, _ = shape
    compare(reference_logits(name), expected(name)["nopad"]["last_logits"], FLOAT32_REAL_SHAPE, what=name)


def test_every_backend_is_hugging_face_s_and_the_reference(shape, backends):
    name, directory = shape
    golden = expected(name)["nopad"]
    for backend in backends:  # one after the other: each model has up to 1.3 GB
        model = backend.load(directory)
        found = backend.forward(model, input_ids=golden["input_ids"], use_cache=False).logits[:, -1]
        compare(found, golden["last_logits"], FLOAT32_REAL_SHAPE, what=f"{backend.name} {name}")
        compare(found, reference_logits(name), FLOAT32_REAL_SHAPE, what=f"{backend.name} {name}")


@pytest.mark.skipif(GOLDENS.name != "goldens", reason="another golden directory was named by OPT_GOLDENS")
def test_there_are_shapes_to_test():
    assert SHAPES == ("shape_125m", "shape_350m")


def test_the_shapes_are_the_released_ones():
    for name in SHAPES:
        wanted = config_of(name).from_size(name.removeprefix("shape_"))
        assert config_of(name).replace(extra={}, dtype=None) == wanted


def test_logits_are_large_enough_to_tell(shape):
    """At these weights an error of the tolerance is far below the spread of the logits."""
    name, _ = shape
    assert np.std(expected(name)["nopad"]["last_logits"]) > 1
