"""Every field of the configuration has its effect in every backend: no framework ignores what another one reads."""

import dataclasses
import itertools

import numpy as np
import pytest

from opt_common import reference
from opt_common.config import OPTConfig
from opt_common.params import parameter_table
from tests.seeded import seeded_weight
from tests.tolerances import FLOAT64, compare

BASE = OPTConfig(
    vocab_size=40,
    hidden_size=8,
    num_hidden_layers=1,
    ffn_dim=12,
    max_position_embeddings=16,
    num_attention_heads=2,
    dropout=0.0,
)
IDS = np.random.default_rng(3).integers(4, 30, (2, 5))

SHAPE_AND_ARITHMETIC = {
    "vocab_size": 48,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "ffn_dim": 20,
    "max_position_embeddings": 20,
    "do_layer_norm_before": False,
    "_remove_final_layer_norm": True,
    "word_embed_proj_dim": 6,
    "num_attention_heads": 4,
    "activation_function": "gelu",
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "tie_word_embeddings": False,
}
"""Fields that the reference honours: the backend must follow it, and the result must change."""

TRAINING = ("dropout", "attention_dropout", "layerdrop")
NEW_WEIGHTS = ("init_std", "pad_token_id")
CALLS = ("use_cache", "eos_token_id")
CLASSIFICATION = ("num_labels", "id2label", "label2id", "problem_type")
"""Fields of sequence classifiers alone; `test_heads.py` shows what they do."""

ROUNDING = ("quantization",)
"""`test_quantization.py` shows what it does."""

CARRIED = ("bos_token_id", "dtype", "extra")
"""Fields about texts and files, which no computation depends on; `test_config.py` shows that they are kept."""


def test_every_field_is_tested():
    tested = {*SHAPE_AND_ARITHMETIC, *TRAINING, *NEW_WEIGHTS, *CALLS, *CARRIED, *CLASSIFICATION, *ROUNDING}
    assert tested == {field.name for field in dataclasses.fields(OPTConfig)}


def seeded_model(backend, config):
    """A float64 model with weights at which every part of it shows."""
    model = backend.build(config, dtype="float64")
    for parameter in backend.table(model):
        backend.set(model, parameter, seeded_weight(1, parameter.name, parameter.shape).astype(np.float64))
    return model


@pytest.mark.parametrize("field", SHAPE_AND_ARITHMETIC)
def test_the_backend_follows_the_reference(backend, field):
    config = BASE.replace(**{field: SHAPE_AND_ARITHMETIC[field]})
    if field == "hidden_size":
        config = config.replace(word_embed_proj_dim=12)
    model = seeded_model(backend, config)
    found = backend.forward(model, input_ids=IDS).logits
    compare(found, reference.forward(config, backend.parameters(model), IDS).logits, FLOAT64, what=field)
    before = {p.name: seeded_weight(1, p.name, p.shape) for p in parameter_table(BASE)}
    after = {p.name: p.shape for p in parameter_table(config)}
    unchanged = after == {name: value.shape for name, value in before.items()}
    assert not unchanged or np.abs(found - reference.forward(BASE, before, IDS).logits).max() > 1e-3


def test_dropout_falls_on_each_branch_and_scales_what_it_keeps(backend):
    """With the other branch silenced, a layer in training adds nothing or twice what it adds in evaluation."""
    config = BASE.replace(dropout=0.5, _remove_final_layer_norm=True)
    for silenced in ("self_attn.out_proj", "fc2"):
        model = seeded_model(backend, config)
        for parameter in backend.table(model):
            if f".{silenced}." in parameter.name:
                backend.set(model, parameter, np.zeros(parameter.shape))
        before, evaluated = backend.forward(model, input_ids=IDS, output_hidden_states=True).hidden_states
        again, trained = backend.forward(model, training=True, input_ids=IDS, output_hidden_states=True).hidden_states
        compare(again, before, FLOAT64, what="there is no dropout on the embeddings")
        dropped = np.abs(trained - before) < 1e-9
        assert 0.2 < dropped.mean() < 0.8
        compare(trained[~dropped], (before + 2 * (evaluated - before))[~dropped], FLOAT64, what=f"without {silenced}")
        other = backend.forward(model, training=True, input_ids=IDS, output_hidden_states=True).hidden_states[1]
        assert np.abs(other - trained).max() > 1e-3, "each call must draw anew"


def test_attention_dropout_falls_on_the_probabilities(backend):
    """A lone token attends to itself with probability one, so each head's context is dropped or doubled as a whole."""
    config = BASE.replace(attention_dropout=0.5, _remove_final_layer_norm=True)
    model = seeded_model(backend, config)
    for parameter in backend.table(model):
        if ".self_attn.out_proj." in parameter.name or ".fc2." in parameter.name:
            identity = np.eye(8) if "out_proj.weight" in parameter.name else np.zeros(parameter.shape)
            backend.set(model, parameter, identity)
    lone = np.arange(4, 28)[:, None]
    before, evaluated = backend.forward(model, input_ids=lone, output_hidden_states=True).hidden_states
    trained = backend.forward(model, training=True, input_ids=lone, output_hidden_states=True).hidden_states[1]
    heads, wanted = ((part - before).reshape(24, 2, 4) for part in (trained, evaluated))
    dropped = np.abs(heads).max(axis=-1) < 1e-9
    assert 0.2 < dropped.mean() < 0.8
    compare(heads[~dropped], 2 * wanted[~dropped], FLOAT64)


def test_layerdrop_passes_a_layer_s_input_through(backend):
    config = BASE.replace(layerdrop=0.5, num_hidden_layers=6, _remove_final_layer_norm=True)
    model = seeded_model(backend, config)
    states = backend.forward(model, training=True, input_ids=IDS, output_hidden_states=True).hidden_states
    drawn = [[np.array_equal(a, b) for a, b in itertools.pairwise(states)]]
    for _ in range(3):
        states = backend.forward(model, training=True, input_ids=IDS, output_hidden_states=True).hidden_states
        drawn.append([np.array_equal(a, b) for a, b in itertools.pairwise(states)])
    assert 0 < np.mean(drawn) < 1
    assert len({tuple(row) for row in drawn}) > 1, "each call must draw anew"
    always = seeded_model(backend, config.replace(layerdrop=1.0))
    states = backend.forward(always, training=True, input_ids=IDS, output_hidden_states=True).hidden_states
    assert all(np.array_equal(state, states[0]) for state in states)


@pytest.mark.parametrize("field", TRAINING)
def test_nothing_is_dropped_in_evaluation(backend, field):
    config = BASE.replace(**{field: 0.9})
    model = seeded_model(backend, config)
    wanted = reference.forward(config, backend.parameters(model), IDS).logits
    compare(backend.forward(model, input_ids=IDS).logits, wanted, FLOAT64)


@pytest.mark.parametrize("deviation", [0.02, 0.3])
def test_new_weights_have_the_deviation_of_the_configuration(backend, deviation):
    config = BASE.replace(init_std=deviation, vocab_size=512, hidden_size=64, word_embed_proj_dim=32, ffn_dim=96)
    model = backend.build(config)
    for parameter in backend.table(model):
        value = backend.get(model, parameter)
        if parameter.kind in ("linear.weight", "embedding.weight"):
            rows = np.delete(value, 1, axis=0) if "embed_tokens" in parameter.name else value
            assert abs(rows.std() / deviation - 1) < 0.1, parameter.name
            assert abs(rows.mean()) < 0.1 * deviation, parameter.name
        else:
            assert (value == (1 if parameter.kind == "layer_norm.weight" else 0)).all(), parameter.name


def test_the_pad_row_of_a_new_table_is_zero(backend):
    for pad in (1, 3, None):
        model = backend.build(BASE.replace(pad_token_id=pad))
        table = next(value for name, value in backend.parameters(model).items() if "embed_tokens" in name)
        assert [row for row in range(8) if not table[row].any()] == ([] if pad is None else [pad])


def test_use_cache_decides_when_a_call_does_not(backend):
    for default in (True, False):
        model = backend.build(BASE.replace(use_cache=default))
        assert (backend.forward(model, input_ids=IDS).cache is not None) == default
        assert backend.forward(model, input_ids=IDS, use_cache=True).cache is not None


def test_the_end_token_of_the_configuration_ends_a_text(backend):
    free = backend.generate(backend.build(BASE.replace(eos_token_id=None)), IDS[:1], max_new_tokens=3)
    end = int(free[0, 5])
    ended = backend.generate(backend.build(BASE.replace(eos_token_id=end)), IDS[:1], max_new_tokens=3)
    np.testing.assert_array_equal(ended, free[:, :6])
