"""Gradients of the loss with respect to every parameter: against the goldens, the reference, and each other."""

import functools

import numpy as np
import pytest

from opt_common import reference
from tests.cases import SMALL_VARIANTS, config_of, expected, inputs_of
from tests.tolerances import FLOAT32_GRADIENT, FLOAT64_GRADIENT, compare

GOLDEN_GRADIENTS = [
    (variant, group)
    for variant in SMALL_VARIANTS
    for group in ("leftpad", "padtok", "rightpad")
    if f"grad_{group}" in expected(variant)
]
VARIANTS = ("pre_ln", "post_ln_proj", "no_bias_no_affine", "untied")


@pytest.mark.parametrize(("variant", "group"), GOLDEN_GRADIENTS)
def test_float32_gradients_are_the_goldens(backend, load, variant, group):
    golden = expected(variant)[f"grad_{group}"]
    found = backend.gradients(load(backend, variant), **inputs_of(expected(variant)[group], labels=True))
    assert set(found) == set(golden)
    for name, gradient in golden.items():
        compare(found[name], gradient, FLOAT32_GRADIENT, what=name)


@pytest.fixture(scope="module")
def float64_gradients(load):
    """Gradients in float64 of a batch with pad tokens among the attended ones."""

    @functools.cache
    def find(backend, variant):
        model = load(backend, variant, dtype="float64")
        return backend.gradients(model, **inputs_of(expected(variant)["padtok"], labels=True))

    return find


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_gradients_agree_between_backends(backends, float64_gradients, variant):
    first, *others = backends
    if not others:
        pytest.skip("one backend under test has nothing to agree with; the test below holds it to the reference")
    for other in others:
        for name, gradient in float64_gradients(first, variant).items():
            what = f"{name}: {other.name} against {first.name}"
            compare(float64_gradients(other, variant)[name], gradient, FLOAT64_GRADIENT, what=what)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_gradients_are_slopes_of_the_reference_loss(backend, load, variant):
    """A central difference along a random direction of each parameter, in the NumPy model."""
    model = load(backend, variant, dtype="float64")
    group = expected(variant)["nopad"]
    arguments = inputs_of(group, labels=True)
    pad = config_of(variant).pad_token_id
    assert (group["input_ids"] != pad).all(), "the pad row has a rule of its own, tested below"
    parameters, gradients = backend.parameters(model), backend.gradients(model, **arguments)
    rng = np.random.default_rng(0)
    step = 1e-5  # its error is near step**2 times the third derivative, and rounding / step: 1e-10 each
    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        losses = [
            reference.forward(
                config_of(variant), {**parameters, name: parameters[name] + sign * step * direction}, **arguments
            ).loss
            for sign in (1, -1)
        ]
        slope = (losses[0] - losses[1]) / (2 * step)
        assert abs(float((gradient * direction).sum()) - slope) < 2e-8, name


def test_the_pad_row_of_an_untied_table_gets_no_gradient(backend, load):
    group = expected("untied")["padtok"]
    config = config_of("untied")
    assert (group["input_ids"] == config.pad_token_id).any()
    table = backend.gradients(load(backend, "untied"), **inputs_of(group, labels=True))[
        "model.decoder.embed_tokens.weight"
    ]
    used = np.unique(group["input_ids"][:, :-1])
    assert (table[config.pad_token_id] == 0).all()
    assert (np.abs(table[used[used != config.pad_token_id]]).max(axis=1) > 0).all()


def test_without_a_pad_token_every_row_gets_gradient(backend):
    config = config_of("untied").replace(pad_token_id=None)
    group = expected("untied")["padtok"]
    table = backend.gradients(backend.build(config), **inputs_of(group, labels=True))[
        "model.decoder.embed_tokens.weight"
    ]
    assert np.abs(table[config_of("untied").pad_token_id]).max() > 0
