"""The parameter table: which tensors exist, with which shapes, under which names."""

import pytest
import safetensors

from opt_common.config import OPTConfig
from opt_common.params import LEAVES, module_kind, parameter_table
from tests.cases import SMALL_VARIANTS, config_of
from tests.paths import GOLDENS


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_the_table_is_hugging_face_s_state_dict(variant):
    stored = {}
    for file in (GOLDENS / variant / "safetensors").glob("*.safetensors"):
        with safetensors.safe_open(file, "np") as tensors:
            stored |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
    assert {parameter.name: parameter.shape for parameter in parameter_table(config_of(variant))} == stored


def names(**changes):
    config = OPTConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, ffn_dim=6, num_attention_heads=2, **changes)
    return {parameter.name: parameter.shape for parameter in parameter_table(config)}


BASE = names()


@pytest.mark.parametrize(
    ("changes", "added", "removed"),
    [
        ({"word_embed_proj_dim": 4}, {"project_in.weight", "project_out.weight"}, set()),
        ({"do_layer_norm_before": False}, set(), {"decoder.final_layer_norm.weight", "decoder.final_layer_norm.bias"}),
        (
            {"_remove_final_layer_norm": True},
            set(),
            {"decoder.final_layer_norm.weight", "decoder.final_layer_norm.bias"},
        ),
        ({"tie_word_embeddings": False}, {"lm_head.weight"}, set()),
    ],
)
def test_conditions_of_existence(changes, added, removed):
    found = set(names(**changes))
    assert found - set(BASE) == {n if n.startswith("lm") else f"model.decoder.{n}" for n in added}
    assert set(BASE) - found == {f"model.{name}" for name in removed}


def test_biases_and_affine_norms_can_be_absent():
    assert not any(name.endswith("bias") and "norm" not in name for name in names(enable_bias=False))
    assert not any("norm" in name for name in names(layer_norm_elementwise_affine=False))
    assert any(name.endswith("fc1.bias") for name in names(layer_norm_elementwise_affine=False))
    assert any(name.endswith("layer_norm.bias") for name in names(enable_bias=False))


def test_shapes():
    shapes = names(word_embed_proj_dim=4, max_position_embeddings=9, tie_word_embeddings=False)
    assert shapes["model.decoder.embed_tokens.weight"] == (11, 4)
    assert shapes["model.decoder.embed_positions.weight"] == (11, 8)  # 9 positions and two rows in front
    assert shapes["model.decoder.project_in.weight"] == (8, 4)
    assert shapes["model.decoder.project_out.weight"] == (4, 8)
    assert shapes["model.decoder.layers.1.fc1.weight"] == (6, 8)
    assert shapes["model.decoder.layers.1.fc2.weight"] == (8, 6)
    assert shapes["lm_head.weight"] == (11, 4)


def test_the_bare_table_has_no_head():
    config = OPTConfig(tie_word_embeddings=False)
    assert [p.name for p in parameter_table(config, head=None)] == [
        p.name for p in parameter_table(config) if p.name != "lm_head.weight"
    ]


def test_leaf_names_and_layouts_of_the_frameworks():
    table = {parameter.name: parameter for parameter in parameter_table(OPTConfig())}
    linear = table["model.decoder.layers.0.fc1.weight"]
    assert [linear.leaf(scheme) for scheme in ("torch", "keras", "nnx")] == ["weight", "kernel", "kernel"]
    assert [linear.transposed(scheme) for scheme in ("torch", "keras", "nnx")] == [False, True, True]
    assert linear.path("keras") == ("model", "decoder", "layers", "0", "fc1", "kernel")
    tokens = table["model.decoder.embed_tokens.weight"]
    assert [tokens.leaf(scheme) for scheme in ("torch", "keras", "nnx")] == ["weight", "embeddings", "embedding"]
    assert not any(tokens.transposed(scheme) for scheme in ("torch", "keras", "nnx"))
    norm = table["model.decoder.final_layer_norm.bias"]
    assert [norm.leaf(scheme) for scheme in ("torch", "keras", "nnx")] == ["bias", "beta", "bias"]


def test_every_kind_is_in_use():
    assert {parameter.kind for parameter in parameter_table(OPTConfig())} == set(LEAVES)
    assert [module_kind(name) for name in ("embed_tokens", "fc1", "self_attn_layer_norm")] == [
        "embedding",
        "linear",
        "layer_norm",
    ]


def test_every_backend_has_exactly_the_table_s_parameters(backend, load):
    for variant in SMALL_VARIANTS:
        model = load(backend, variant)
        table = backend.table(model)
        for parameter in table:
            assert backend.get(model, parameter).shape == parameter.shape, parameter.name
        assert backend.count(model) == sum(parameter.size for parameter in table), variant
