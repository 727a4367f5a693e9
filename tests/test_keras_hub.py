"""Presets of KerasHub, without KerasHub: its layout is written down in `goldens/keras_hub_layout.json`.

`make oracle-keras-hub` holds that file to KerasHub itself, loads there what is written here, and here what it saves.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest

from conversion import cli, convert, open_checkpoint, save_checkpoint, verify
from conversion.inspect import inspect
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError
from opt_common.hub import resolve
from opt_common.params import parameter_table
from opt_common.tokenizer import OPTTokenizer
from tests.adapters import Adapter
from tests.paths import GOLDENS, OWN_GOLDENS
from tests.test_sources import Arrays, equal, read, weights

LAYOUT: dict[str, Any] = json.loads((OWN_GOLDENS / "keras_hub_layout.json").read_text(encoding="utf-8"))
POSITIONS = "model.decoder.embed_positions.weight"
OUR_GROUP = "opt_models"


@pytest.fixture(scope="module")
def config() -> OPTConfig:
    """The model whose layout is written down: twelve layers, whose numbers are not in the order of their texts."""
    return OPTConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=12, ffn_dim=16, max_position_embeddings=6, num_attention_heads=2
    )


def save(directory: Path, config: OPTConfig, dtype: Any = np.float32, **options: Any) -> Arrays:
    """Write a model with seeded weights as a preset; its tensors."""
    arrays = {name: array.astype(dtype) for name, array in weights(config).items()}
    table = parameter_table(config)
    save_checkpoint(directory, config, table, lambda row: arrays[row.name], format="keras-hub", **options)
    return arrays


def as_keras_hub_would(directory: Path) -> Path:
    """Take out of a preset what KerasHub would not have written."""
    with h5py.File(directory / "model.weights.h5", "r+") as file:
        del file[OUR_GROUP]
    (directory / "metadata.json").write_text("{}")
    return directory


def stored(directory: Path) -> dict[str, h5py.Dataset]:
    """The arrays of a preset by their path."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(directory / "model.weights.h5") as file:
        file.visititems(lambda path, item: found.update({path: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def test_what_is_written_is_keras_hub_s_layout(tmp_path: Path, config: OPTConfig):
    arrays = save(tmp_path / "a", config)
    found = stored(tmp_path / "a")
    assert {path: list(array.shape) for path, array in found.items() if not path.startswith(OUR_GROUP)} == (
        LAYOUT["shapes"]
    )
    assert json.loads((tmp_path / "a/config.json").read_text()) == LAYOUT["config.json"]
    layer = "layers/transformer_decoder_10/"
    query = arrays["model.decoder.layers.10.self_attn.q_proj.weight"]
    assert np.array_equal(found[f"{layer}_self_attention_layer/query_dense/vars/0"][3, 1], query[4:, 3])
    out = arrays["model.decoder.layers.10.self_attn.out_proj.weight"]
    assert np.array_equal(found[f"{layer}_self_attention_layer/output_dense/vars/0"][1, :, 3], out[3, 4:])
    assert np.array_equal(found["layers/token_and_position_embedding/position_embedding/vars/0"], arrays[POSITIONS][2:])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_there_and_back_is_the_identity(tmp_path: Path, config: OPTConfig, dtype: Any):
    changed = config.replace(attention_dropout=0.3, bos_token_id=0)
    arrays = save(tmp_path / "a", changed, dtype)
    assert equal(read(tmp_path / "a"), arrays)
    for to in ("safetensors", "keras-hub"):
        convert(tmp_path / "a", tmp_path / to, to)
        assert equal(read(tmp_path / to), arrays)
        with open_checkpoint(tmp_path / to) as checkpoint:
            assert checkpoint.config.replace(extra={}, dtype=None) == changed
    first, second = (path / "model.weights.h5" for path in (tmp_path / "a", tmp_path / "keras-hub"))
    assert first.read_bytes() == second.read_bytes(), "the same tensors give the same bytes"
    policy = json.loads((tmp_path / "a/config.json").read_text())["config"]["dtype"]["config"]["name"]
    assert policy == np.dtype(dtype).name


def test_what_keras_hub_saves_is_read(tmp_path: Path, config: OPTConfig, backend: Adapter):
    """Its position table lacks the two rows in front of position 0, which no attended token uses."""
    arrays = save(tmp_path / "a", config)
    arrays[POSITIONS][:2] = 0
    source = as_keras_hub_would(tmp_path / "a")
    assert equal(read(source), arrays)
    assert equal(backend.parameters(backend.load(source)), arrays)
    assert inspect(source).format == "keras-hub"
    assert inspect(source / "model.weights.h5").problem is None
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.config.attention_dropout == checkpoint.config.dropout
    assert verify(source, source).holds


def test_shards_are_read(tmp_path: Path, config: OPTConfig):
    arrays = save(tmp_path / "a", config)
    arrays[POSITIONS][:2] = 0
    whole = as_keras_hub_would(tmp_path / "a") / "model.weights.h5"
    weight_map: dict[str, Any] = {}
    for number, start in enumerate(("layers/transformer", "layers/token", "layers/layer_n")):
        name = f"model_{number:05d}.weights.h5"
        weight_map[f"/{start}/vars"] = [name] if number else name
        with h5py.File(whole) as source, h5py.File(tmp_path / "a" / name, "w") as shard:
            for path in (path for path in stored(tmp_path / "a") if path.startswith(start)):
                shard[path] = source[path][()]
    whole.unlink()
    (tmp_path / "a/model.weights.json").write_text(json.dumps({"weight_map": weight_map}))
    assert equal(read(tmp_path / "a"), arrays)


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("post_ln_proj", r"2 problems:\n.*It is post-norm, as OPT-350m\.\n.*projections around its decoder"),
        ("no_bias_no_affine", r"2 problems:\n.*no biases, as Galactica-30b's\.\n.*layer norms have no weights"),
        ("gelu", r"Its activation is gelu; KerasHub's is relu\."),
        ("remove_final_ln", r"It has no final layer norm\."),
        ("untied", r"Its head is not the token table\."),
    ],
)
def test_what_keras_hub_cannot_hold_is_refused_with_the_reason(tmp_path: Path, variant: str, told: str):
    """keras-hub#699, #707: 350m is post-norm, which `OPTBackbone` is not."""
    with pytest.raises(CheckpointError, match=f"(?s)KerasHub's OPT can't hold this model\\. .*{told}"):
        convert(GOLDENS / variant / "safetensors", tmp_path / "a", "keras-hub")
    assert not (tmp_path / "a").exists()


def test_other_heads_and_sizes_are_refused(tmp_path: Path, config: OPTConfig):
    head = parameter_table(config, head="question_answering")
    with pytest.raises(CheckpointError, match="It has no language model's head but another"):
        save_checkpoint(tmp_path / "a", config, head, lambda row: np.zeros(row.shape, np.float32), format="keras-hub")
    with pytest.raises(CheckpointError, match="written as one file; leave max_shard_size"):
        convert(resolve("opt-tiny"), tmp_path / "a", "keras-hub", max_shard_size="1MB")


def test_the_tokenizer_goes_along_both_ways(tmp_path: Path):
    source = resolve("opt-tiny")
    assert cli.main(["convert", str(source), str(tmp_path / "a"), "--to", "keras-hub", "--verify", "--quiet"]) == 0
    described = json.loads((tmp_path / "a/tokenizer.json").read_text())
    assert described == LAYOUT["tokenizer.json"]
    assert (tmp_path / "a/assets/tokenizer/vocabulary.json").read_bytes() == (source / "vocab.json").read_bytes()
    # KerasHub writes the merges without the header that everyone else takes for one.
    merges = tmp_path / "a/assets/tokenizer/merges.txt"
    merges.write_text(merges.read_text().split("\n", 1)[1])
    convert(tmp_path / "a", tmp_path / "b", "torch")
    texts = ["Once upon a time, there was a clever little girl.", "It's 7 o'clock"]
    ids = [OPTTokenizer.from_pretrained(path)(texts)["input_ids"] for path in (source, tmp_path / "b")]
    assert ids[0] == ids[1]
    assert (tmp_path / "b/generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    convert(tmp_path / "b", tmp_path / "a", "keras-hub", force=True)
    assert (tmp_path / "a/assets/tokenizer/merges.txt").read_text().startswith("#version"), "files below are replaced"


def test_other_presets_and_damaged_ones(tmp_path: Path, config: OPTConfig):
    save(tmp_path / "a", config)

    def changed(name: str, change: dict[str, Any]) -> Path:
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        described = json.loads((tmp_path / "b" / name).read_text())
        described.get("config", described).update(change.pop("config", {}))
        (tmp_path / "b" / name).write_text(json.dumps(described | change))
        return tmp_path / "b"

    with pytest.raises(
        CheckpointError, match="is a preset of 'keras_hub>BertBackbone', expected keras_hub>OPTBackbone"
    ):
        open_checkpoint(changed("config.json", {"registered_name": "keras_hub>BertBackbone"}))
    with pytest.raises(CheckpointError, match=r"split into \[2, 4\], but its config\.json says 4 heads of 2"):
        open_checkpoint(changed("config.json", {"config": {"num_heads": 4}}))
    with pytest.raises(CheckpointError, match=r"expected \[99, 8\]"):
        read(changed("config.json", {"config": {"vocabulary_size": 99}}))
    directory = changed("config.json", {})
    with h5py.File(directory / "model.weights.h5", "r+") as file:
        file["layers/other/vars/0"] = np.zeros(3, np.float32)
        del file[f"{OUR_GROUP}/embed_positions/vars/0"]
        file[f"{OUR_GROUP}/embed_positions/vars/0"] = np.zeros((2, 8), np.float32)
    with pytest.raises(CheckpointError, match=r"unexpected: layers/other/vars/0"):
        read(directory)
    with h5py.File(directory / "model.weights.h5", "r+") as file:
        del file[f"{OUR_GROUP}/embed_positions/vars/0"]
        file[f"{OUR_GROUP}/embed_positions/vars/0"] = np.zeros((3, 8), np.float32)
    with pytest.raises(CheckpointError, match="does not fit the position table"):
        read(directory)
