"""Every backend against Hugging Face's results: every variant, every format, every kind of input."""

import numpy as np
import pytest

from opt_common import reference
from opt_common.config import ACTIVATIONS
from tests.cases import (
    SMALL_VARIANTS,
    THOROUGH,
    VARIANTS,
    batches,
    config_of,
    expected,
    formats,
    half_formats,
    inputs_of,
    numbered,
)
from tests.tolerances import FLOAT32, FLOAT64, FLOAT64_GOLDEN, compare

EVERY_FORMAT = [(variant, name) for variant in SMALL_VARIANTS for name in formats(variant)]
HALF_FORMATS = [("pre_ln", name) for name in half_formats("pre_ln")]


@pytest.mark.parametrize(("variant", "format"), EVERY_FORMAT)
def test_every_format_gives_the_golden_logits(backend, load, variant, format):
    group = expected(variant)["leftpad"]
    found = backend.forward(load(backend, variant, format), **inputs_of(group))
    compare(found.logits, group["logits"], FLOAT32, what=f"{variant}/{format}", attended=group["attention_mask"])


@pytest.mark.parametrize(("variant", "format"), HALF_FORMATS)
def test_half_precision_files_give_the_logits_of_the_rounded_weights(backend, load, variant, format):
    group = expected(variant, "lowprec_expected.npz")["leftpad"]
    stored = "bf16" if format.endswith("bf16") else "fp16"  # the old torch files are float16 too
    found = backend.forward(load(backend, variant, format), **inputs_of(group))
    golden = group[f"{stored}_weights_fp32_compute_logits"]
    compare(found.logits, golden, FLOAT32, what=format, attended=group["attention_mask"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_batch(backend, load, variant):
    model = load(backend, variant)
    for name in batches(variant):
        group = expected(variant)[name]
        mask = group["attention_mask"]
        details = "hidden_states.0" in group and variant not in ("real_vocab",)
        found = backend.forward(
            model, **inputs_of(group, labels=True), output_hidden_states=details, output_attentions=details
        )
        compare(found.logits, group["logits"], FLOAT32, what=f"{name} logits", attended=mask)
        assert np.isfinite(found.logits).all(), "outputs at masked positions must be finite"
        if "loss" in group:
            compare(found.loss, group["loss"].reshape(found.loss.shape), FLOAT32, what=f"{name} loss")
        if details:
            compare_details(found, group, name)


def compare_details(found, group, name):
    """Hidden states and attention probabilities of every layer."""
    mask = group["attention_mask"]
    for index, (state, golden) in enumerate(zip(found.hidden_states, numbered(group, "hidden_states"), strict=True)):
        compare(state, golden, FLOAT32, what=f"{name} hidden_states[{index}]", attended=mask)
    for index, (probs, golden) in enumerate(zip(found.attentions, numbered(group, "attentions"), strict=True)):
        compare(probs, golden, FLOAT32, what=f"{name} attentions[{index}]", attended=mask, query_axis=2)


def test_nothing_is_collected_unasked(backend, load):
    found = backend.forward(load(backend, "pre_ln"), **inputs_of(expected("pre_ln")["nopad"]))
    assert found.hidden_states is None
    assert found.attentions is None
    assert found.loss is None


@pytest.mark.parametrize("variant", THOROUGH)
def test_no_mask_means_all_ones(backend, load, variant):
    group = expected(variant)["nopad"]
    found = backend.forward(load(backend, variant), input_ids=group["input_ids"])
    compare(found.logits, group["logits"], FLOAT32)


@pytest.mark.parametrize("group", ["explicit_pos", "inputs_embeds"])
@pytest.mark.parametrize("variant", THOROUGH)
def test_explicit_positions_and_embeddings(backend, load, variant, group):
    """transformers#33121: OPT took no position_ids; TensorFlow's took them and looked at none."""
    golden = expected(variant)[group]
    found = backend.forward(load(backend, variant), **inputs_of(golden))
    compare(found.logits, golden["logits"], FLOAT32, what=group, attended=golden.get("attention_mask"))


@pytest.mark.parametrize("variant", THOROUGH)
def test_positions_of_masked_tokens_may_be_given_as_minus_one(backend, load, variant):
    group = expected(variant)["leftpad"]
    positions = reference.positions(group["attention_mask"])
    found = backend.forward(load(backend, variant), **inputs_of(group), position_ids=positions)
    compare(found.logits, group["logits"], FLOAT32, attended=group["attention_mask"])


@pytest.mark.parametrize(
    "format", ["safetensors", "base_safetensors", "base_torch_bin", "base_tf_h5", "base_flax_msgpack"]
)
def test_the_bare_model_ends_where_the_head_begins(backend, load, format):
    group = expected("post_ln_proj")["leftpad"]
    golden = numbered(group, "hidden_states")[-1]
    found = backend.forward(load(backend, "post_ln_proj", format, bare=True), **inputs_of(group))
    compare(found.last_hidden_state, golden, FLOAT32, what=format, attended=group["attention_mask"])


@pytest.mark.parametrize("variant", THOROUGH)
def test_float64_against_the_goldens(backend, load, variant):
    model = load(backend, variant, dtype="float64")
    for name in ("nopad", "leftpad"):
        group = expected(variant)[name]
        found = backend.forward(model, **inputs_of(group))
        assert found.logits.dtype == np.float64
        compare(found.logits, group["logits_float64"], FLOAT64_GOLDEN, what=name, attended=group["attention_mask"])


@pytest.mark.parametrize("variant", [variant for variant in SMALL_VARIANTS if variant != "sharded"])
def test_float64_against_the_reference(backend, load, variant):
    """One definition, so the only difference left is the order of sums."""
    model = load(backend, variant, dtype="float64")
    parameters = backend.parameters(model)
    group = expected(variant)["leftpad"]
    found = backend.forward(model, **inputs_of(group, labels=True), output_hidden_states=True, output_attentions=True)
    wanted = reference.forward(config_of(variant), parameters, **inputs_of(group, labels=True))
    mask = group["attention_mask"]
    compare(found.logits, wanted.logits, FLOAT64, what="logits", attended=mask)
    plain = backend.forward(model, **inputs_of(group))  # asked for nothing, a backend may take a fused kernel
    compare(plain.logits, wanted.logits, FLOAT64, what="logits of a plain call", attended=mask)
    compare(found.loss.reshape(()), wanted.loss, FLOAT64, what="loss")
    for index, (state, golden) in enumerate(zip(found.hidden_states, wanted.hidden_states, strict=True)):
        compare(state, golden, FLOAT64, what=f"hidden_states[{index}]", attended=mask)
    for index, (probs, golden) in enumerate(zip(found.attentions, wanted.attentions, strict=True)):
        compare(probs, golden, FLOAT64, what=f"attentions[{index}]", attended=mask, query_axis=2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_the_reference_s(backend, activation):
    config = config_of("gelu").replace(activation_function=activation, num_hidden_layers=1, init_std=0.4)
    model = backend.build(config, dtype="float64")
    ids = expected("gelu")["nopad"]["input_ids"]
    wanted = reference.forward(config, backend.parameters(model), ids)
    compare(backend.forward(model, input_ids=ids).logits, wanted.logits, FLOAT64, what=activation)


def test_a_row_without_any_token_is_finite_and_harms_no_other(backend, load):
    group = expected("pre_ln")["leftpad"]
    mask = group["attention_mask"].copy()
    mask[1] = 0
    found = backend.forward(load(backend, "pre_ln"), input_ids=group["input_ids"], attention_mask=mask)
    assert np.isfinite(found.logits).all()
    compare(found.logits, group["logits"], FLOAT32, attended=mask)
