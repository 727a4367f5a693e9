"""The configuration: the released sizes, files that come back as they were, and every problem at once."""

import dataclasses
import json

import pytest

from opt_common.config import SIZES, OPTConfig
from opt_common.errors import ConfigError
from opt_common.params import count_parameters
from tests.cases import VARIANTS
from tests.paths import GOLDENS

# layers, hidden, heads, head_dim, ffn, embed, pre-norm, parameters: metaseq's opt_job_constants.py; the counts are
# those of the shapes, with a tied head and 2050 position rows.
RELEASED = {
    "125m": (12, 768, 12, 64, 3072, 768, True, 125_239_296),
    "350m": (24, 1024, 16, 64, 4096, 512, False, 331_196_416),
    "1.3b": (24, 2048, 32, 64, 8192, 2048, True, 1_315_758_080),
    "2.7b": (32, 2560, 32, 80, 10240, 2560, True, 2_651_596_800),
    "6.7b": (32, 4096, 32, 128, 16384, 4096, True, 6_658_473_984),
    "13b": (40, 5120, 40, 128, 20480, 5120, True, 12_853_473_280),
    "30b": (48, 7168, 56, 128, 28672, 7168, True, 29_974_540_288),
    "66b": (64, 9216, 72, 128, 36864, 9216, True, 65_719_701_504),
    "175b": (96, 12288, 96, 128, 49152, 12288, True, 174_604_468_224),
}


def test_released_sizes_are_all_there():
    assert tuple(RELEASED) == SIZES


@pytest.mark.parametrize("size", RELEASED)
def test_released_size(size):
    config = OPTConfig.from_size(size)
    assert (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
        config.ffn_dim,
        config.word_embed_proj_dim,
        config.do_layer_norm_before,
        count_parameters(config),
    ) == RELEASED[size]
    common = (config.vocab_size, config.max_position_embeddings, config.activation_function, config.dropout)
    assert common == (50272, 2048, "relu", 0.1)
    assert (config.attention_dropout, config.init_std, config.layerdrop) == (0.0, 0.02, 0.0)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (2, 1, 2)
    assert config.tie_word_embeddings
    assert config.enable_bias
    assert config.layer_norm_elementwise_affine


def test_defaults_are_the_125m_shape():
    assert OPTConfig() == OPTConfig.from_size("125m")


def test_an_unreleased_size_lists_the_released_ones():
    with pytest.raises(ConfigError, match=r"'760m'.*125m, 350m"):
        OPTConfig.from_size("760m")


def test_only_350m_projects_and_lacks_the_final_norm():
    for size in SIZES:
        config = OPTConfig.from_size(size)
        assert config.has_projection == (size == "350m")
        assert config.has_final_layer_norm == (size != "350m")


DEFAULT_LABELS = {
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hugging_face_file_comes_back_with_every_key(variant, tmp_path):
    original = json.loads((GOLDENS / variant / "config.json").read_text())
    config = OPTConfig.from_json_file(GOLDENS / variant / "config.json")
    (tmp_path / "config.json").write_text(config.to_json())
    written = json.loads((tmp_path / "config.json").read_text())
    stored = original.pop("dtype", original.pop("torch_dtype", None))
    # `save_pretrained` leaves these out where they say what is assumed anyway, and so does this package.
    for key, default in DEFAULT_LABELS.items():
        if original.get(key, ...) == default:
            del original[key]
    assert written.get("torch_dtype", written.get("dtype")) == stored
    assert {key: written[key] for key in original} == original
    assert OPTConfig.from_json_file(tmp_path / "config.json") == config


def test_unknown_keys_are_kept_and_written_back():
    unknown = {"prefix": "</s>", "transformers_version": "4.21.0.dev0", "task": {"nested": [1, None]}}
    config = OPTConfig.from_dict({"hidden_size": 64, "num_attention_heads": 4, **unknown})
    assert config.extra == unknown
    assert {key: config.to_dict()[key] for key in unknown} == unknown
    assert OPTConfig.from_dict(config.to_dict()) == config
    assert config.replace(dropout=0.0).extra == unknown


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float16", "torch.float16"])
def test_both_names_of_the_stored_dtype_are_read(key, value):
    assert OPTConfig.from_dict({key: value}).dtype == "float16"


def test_every_field_goes_through_a_file():
    changed = {
        "vocab_size": 100,
        "hidden_size": 24,
        "num_hidden_layers": 5,
        "ffn_dim": 7,
        "max_position_embeddings": 9,
        "do_layer_norm_before": False,
        "_remove_final_layer_norm": True,
        "word_embed_proj_dim": 6,
        "dropout": 0.25,
        "attention_dropout": 0.125,
        "num_attention_heads": 3,
        "activation_function": "gelu",
        "layerdrop": 0.5,
        "init_std": 0.75,
        "use_cache": False,
        "pad_token_id": None,
        "bos_token_id": 7,
        "eos_token_id": 8,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
        "num_labels": 3,
        "id2label": {0: "no", 1: "yes", 2: "maybe"},
        "label2id": {"no": 0, "yes": 1, "maybe": 2},
        "problem_type": "regression",
        "dtype": "bfloat16",
        "quantization": "int8-dynamic",
        "extra": {"prefix": "x"},
    }
    assert set(changed) == {field.name for field in dataclasses.fields(OPTConfig)}
    config = OPTConfig(**changed)
    default = OPTConfig()
    assert all(getattr(config, name) != getattr(default, name) for name in changed)
    assert OPTConfig.from_dict(json.loads(config.to_json())) == config


def test_labels_are_derived_from_each_other():
    assert (OPTConfig().num_labels, OPTConfig().id2label) == (2, {0: "LABEL_0", 1: "LABEL_1"})
    three = OPTConfig(num_labels=3)
    assert three.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    named = three.replace(id2label={0: "no", 1: "yes"})
    assert (named.num_labels, named.label2id) == (2, {"no": 0, "yes": 1})
    assert OPTConfig(label2id={"no": 0, "yes": 1}) == named
    assert named.replace(num_labels=1).id2label == {0: "LABEL_0"}
    assert named.replace(dropout=0.0).id2label == named.id2label
    assert hash(named.replace(dropout=0.0)) != hash(named)


def test_labels_are_written_as_hugging_face_writes_them():
    keys = ("num_labels", "id2label", "label2id", "problem_type")
    assert not any(key in OPTConfig().to_dict() for key in keys)
    written = json.loads(OPTConfig(num_labels=1, problem_type="regression").to_json())
    assert [written.get(key) for key in keys] == [None, {"0": "LABEL_0"}, {"LABEL_0": 0}, "regression"]
    assert OPTConfig.from_dict({"num_labels": 4}).id2label[3] == "LABEL_3"


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        OPTConfig(hidden_size=10, num_attention_heads=3, dropout=2.0, activation_function="swiglu", pad_token_id=-1)
    message = str(caught.value)
    for part in ("hidden_size is 10", "num_attention_heads (3)", "dropout is 2.0", "'swiglu'", "pad_token_id is -1"):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive integer"),
        ({"ffn_dim": "3072"}, "ffn_dim is '3072'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"enable_bias": 1}, "enable_bias is 1, expected true or false"),
        ({"layerdrop": -0.1}, "layerdrop is -0.1"),
        ({"init_std": -1}, "init_std is -1"),
        ({"eos_token_id": 50272}, "eos_token_id is 50272"),
        ({"dtype": 16}, "dtype is 16"),
        ({"num_labels": 0}, "num_labels is 0, expected a positive integer"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, r"id2label is .*from 0 to num_labels - 1 \(2\)"),
        ({"id2label": {1: "a", 2: "b"}}, "id2label is"),
        ({"id2label": ["a", "b"]}, r"id2label is \['a', 'b'\], expected a name for the number"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking', expected null or one of regression"),
    ],
)
def test_a_value_no_model_can_have_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        OPTConfig(**changes)


def test_another_model_s_file_is_refused():
    with pytest.raises(ConfigError, match=r"'gpt2'.*expected 'opt'"):
        OPTConfig.from_dict({"model_type": "gpt2"})


@pytest.mark.parametrize("content", ["{", "[1]", "\ufeff", "[" * 100_000])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        OPTConfig.from_json_file(tmp_path / "config.json")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"No config\.json in"):
        OPTConfig.from_json_file(tmp_path / "config.json")


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPTConfig().dropout = 0.5
