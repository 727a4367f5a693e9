"""The NumPy reference against the goldens: what the three backends are held to must itself be right."""

import functools

import numpy as np
import pytest
import safetensors.numpy

from opt_common import reference
from opt_common.config import ACTIVATIONS
from tests.cases import (
    THOROUGH,
    VARIANTS,
    batches,
    config_of,
    expected,
    generation_cases,
    has_seed,
    inputs_of,
    numbered,
    seeded_parameters,
)
from tests.tolerances import FLOAT32, FLOAT64_GOLDEN, compare


@pytest.fixture(scope="module")
def parameters(checkpoint):
    """Canonical parameters of a variant, read by the safetensors library rather than by our own reader."""

    @functools.cache
    def find(variant):
        if has_seed(variant):
            return seeded_parameters(variant)
        files = sorted(checkpoint(variant).glob("*.safetensors"))
        return {name: array for file in files for name, array in safetensors.numpy.load_file(file).items()}

    return find


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss(variant, parameters):
    for name in batches(variant):
        group = expected(variant)[name]
        output = reference.forward(config_of(variant), parameters(variant), **inputs_of(group, labels=True))
        compare(output.logits, group["logits"], FLOAT32, what=name, attended=group.get("attention_mask"))
        if "loss" in group:
            compare(output.loss, group["loss"][0], FLOAT32, what=f"{name} loss")


@pytest.mark.parametrize("variant", THOROUGH)
def test_float64(variant, parameters):
    for name in ("nopad", "leftpad"):
        group = expected(variant)[name]
        output = reference.forward(config_of(variant), parameters(variant), **inputs_of(group))
        compare(output.logits, group["logits_float64"], FLOAT64_GOLDEN, what=name, attended=group.get("attention_mask"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_attentions(variant, parameters):
    for name in batches(variant):
        group = expected(variant)[name]
        mask = group.get("attention_mask")
        states, attentions = numbered(group, "hidden_states"), numbered(group, "attentions")
        output = reference.forward(config_of(variant), parameters(variant), **inputs_of(group))
        if states:
            for index, (found, golden) in enumerate(zip(output.hidden_states, states, strict=True)):
                compare(found, golden, FLOAT32, what=f"{name} hidden_states[{index}]", attended=mask)
            assert output.last_hidden_state is output.hidden_states[-1]
        if attentions:
            for index, (found, golden) in enumerate(zip(output.attentions, attentions, strict=True)):
                compare(found, golden, FLOAT32, what=f"{name} attentions[{index}]", attended=mask, query_axis=2)


@pytest.mark.parametrize("group", ["explicit_pos", "inputs_embeds"])
@pytest.mark.parametrize("variant", THOROUGH)
def test_explicit_positions_and_embeddings(variant, group, parameters):
    golden = expected(variant)[group]
    output = reference.forward(config_of(variant), parameters(variant), **inputs_of(golden))
    compare(output.logits, golden["logits"], FLOAT32, what=group, attended=golden.get("attention_mask"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy(variant, parameters):
    case = next(
        case for name, case in generation_cases(variant).items() if name.startswith("greedy_left_pad") or "text" in name
    )
    prompt = np.array(case["input_ids"])
    new_tokens = 4  # the prefix is enough here, and quick without a cache
    found = reference.generate_greedy(
        config_of(variant), parameters(variant), prompt, np.array(case["attention_mask"]), new_tokens
    )
    np.testing.assert_array_equal(found, np.array(case["output_ids"])[:, : prompt.shape[1] + new_tokens])


def test_a_query_that_may_attend_to_nothing_gives_finite_numbers(parameters):
    ids = np.array([[1, 1, 5, 6]])
    output = reference.forward(config_of("pre_ln"), parameters("pre_ln"), ids, np.array([[0, 0, 0, 0]]))
    assert np.isfinite(output.logits).all()


def test_a_loss_without_labels_that_count_is_nan():
    assert np.isnan(reference.causal_lm_loss(np.zeros((1, 3, 5)), np.full((1, 3), -100)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_published_formulas(name):
    # Values of the formulas at 0.5 and -1.5, from 30-digit arithmetic.
    published = {
        "relu": (0.5, 0.0),
        "gelu": (0.34573123063700655, -0.1002108019032871),
        "gelu_new": (0.34571400982514392, -0.10042842301976708),
        "gelu_pytorch_tanh": (0.34571400982514392, -0.10042842301976708),
        "quick_gelu": (0.35038843660638012, -0.10833780155292343),
        "silu": (0.31122966560092728, -0.27363828570953451),
        "swish": (0.31122966560092728, -0.27363828570953451),
        "tanh": (0.46211715726000976, -0.90514825364486644),
    }
    found = reference.ACTIVATION_FUNCTIONS[name](np.array([0.5, -1.5]))
    np.testing.assert_allclose(found, published[name], rtol=0, atol=1e-12)
