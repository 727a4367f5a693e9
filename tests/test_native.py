"""What the frameworks' own functions save of a model: read without the framework, as any other checkpoint."""

import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from conversion import checked_parameters, convert, open_checkpoint
from conversion.doctor import doctor
from conversion.inspect import inspect
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError, OPTError
from opt_common.hub import find_weights
from opt_common.params import ARCHITECTURES, Head, parameter_table
from tests.adapters import BACKENDS, Adapter
from tests.conftest import adapter

Arrays = Mapping[str, np.ndarray]

TINY = OPTConfig(
    vocab_size=40, hidden_size=8, num_hidden_layers=12, ffn_dim=16, max_position_embeddings=6, num_attention_heads=2
)
"""Twelve layers: their numbers are not in the order of their texts."""

MODELS: Mapping[str, tuple[OPTConfig, Head | None, str]] = {
    "pre-norm": (TINY, "lm", "float32"),
    "bfloat16": (TINY.replace(num_hidden_layers=1), "lm", "bfloat16"),
    "post-norm": (
        TINY.replace(num_hidden_layers=1, word_embed_proj_dim=4, do_layer_norm_before=False),
        "lm",
        "float16",
    ),
    "untied": (TINY.replace(num_hidden_layers=1, tie_word_embeddings=False), "lm", "float32"),
    "plain": (
        TINY.replace(num_hidden_layers=1, enable_bias=False, layer_norm_elementwise_affine=False),
        None,
        "float32",
    ),
    "classifier": (TINY.replace(num_hidden_layers=1, num_labels=3), "sequence_classification", "float32"),
    "answers": (TINY.replace(num_hidden_layers=1), "question_answering", "float32"),
}


def build(backend: Adapter, name: str) -> Any:
    """A model none of whose tensors is like another."""
    config, head, dtype = MODELS[name]
    model = backend.build(config, dtype=dtype, bare=head is None, head=None if head == "lm" else head)
    random = np.random.default_rng(0)
    for row in backend.table(model):
        backend.set(model, row, random.standard_normal(row.shape).astype(np.float32))
    return model


def stated(config: OPTConfig, head: Head | None) -> str:
    """A `config.json` that names the class."""
    return config.replace(extra={"architectures": [ARCHITECTURES[head]]}).to_json()


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint that fits its configuration, half precision widened."""
    with open_checkpoint(path) as checkpoint:
        checked_parameters(checkpoint, parameter_table(checkpoint.config, head=checkpoint.head), other_heads=False)
        return {name: np.array(checkpoint.read(name)).astype(np.float32) for name in checkpoint.names}


def equal(found: Arrays, expected: Arrays) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_save_reads_bit_equal(tmp_path: Path, backend: Adapter, name: str):
    config, head, dtype = MODELS[name]
    model = build(backend, name)
    expected = backend.parameters(model)
    for kind, save in backend.native_saves(model).items():
        place = tmp_path / kind.replace("/", "-") / kind
        place.parent.mkdir(parents=True)
        save(place)
        home = tmp_path / kind.replace("/", "-")
        if place.suffix != ".keras":
            with pytest.raises(ConfigError, match=r"No config\.json beside"):
                open_checkpoint(place)
            (home / "config.json").write_text(stated(config, head))
        assert equal(read(place), expected), kind
        with open_checkpoint(place) as checkpoint:
            assert checkpoint.head == head
            assert {checkpoint.info(tensor).dtype.name for tensor in checkpoint.names} == {dtype}
        convert(place, tmp_path / "new", "safetensors")
        assert equal(read(tmp_path / "new"), expected), kind
        shutil.rmtree(tmp_path / "new")


def test_a_model_is_loaded_from_what_any_framework_saved(tmp_path: Path, backends: tuple[Adapter, ...]):
    ids = np.array([[2, 5, 7, 9]])
    for writer in backends:
        model = build(writer, "untied")
        saved = dict(list(writer.native_saves(model).items())[:2])
        for kind, save in saved.items():
            place = tmp_path / f"{writer.name}-{kind}" / kind
            place.parent.mkdir(parents=True)
            save(place)
            (place.parent / "config.json").write_text(stated(MODELS["untied"][0], "lm"))
            (place.parent / "generation_config.json").write_text('{"max_new_tokens": 3}')
            logits = writer.forward(model, input_ids=ids).logits
            for reader in backends:
                loaded = reader.load(place)
                assert equal(reader.parameters(loaded), writer.parameters(model))
                assert loaded.generation_config.max_new_tokens == 3
                if reader is writer:
                    assert np.array_equal(reader.forward(loaded, input_ids=ids).logits, logits)


def saved(backend: Adapter, kind: str, directory: Path, name: str = "untied") -> Path:
    """A model saved in one way, with its configuration beside it."""
    directory.mkdir(parents=True)
    backend.native_saves(build(backend, name))[kind](directory / kind)
    (directory / "config.json").write_text(stated(MODELS[name][0], MODELS[name][1]))
    return directory / kind


def test_a_directory_with_one_of_them_can_be_named_itself(tmp_path: Path, backend: Adapter):
    kind = next(iter(backend.native_saves(build(backend, "untied"))))
    place = saved(backend, kind, tmp_path / "a")
    place = place if place.is_dir() else place.parent
    expected = backend.parameters(build(backend, "untied"))
    assert equal(read(place), expected)
    assert equal(backend.parameters(backend.load(place)), expected)
    assert inspect(place).problem is None
    assert doctor(place).healthy
    (tmp_path / "a" / "vocab.json").write_text("{}")
    convert(place, tmp_path / "b", "tf")
    assert (tmp_path / "b" / "vocab.json").exists(), "the files beside the weights go along"


def test_of_several_one_must_be_named(tmp_path: Path):
    (tmp_path / "config.json").write_text(TINY.to_json())
    for name in ("a.weights.h5", "b.keras", "model.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"several checkpoints: a\.weights\.h5, b\.keras, model\.pt\. Name one"):
        find_weights(tmp_path)


# Files that are not to be trusted


def under_test(name: str) -> Adapter:
    """A framework whose files a test damages, if it is among those under test."""
    if name not in BACKENDS:
        pytest.skip(f"{name} is not under test (OPT_TEST_BACKENDS)")
    return adapter(name)


@pytest.fixture(scope="module")
def keras() -> Adapter:
    return under_test("tf")


@pytest.fixture(scope="module")
def flax() -> Adapter:
    return under_test("flax")


@pytest.mark.parametrize("kind", ["model.weights.h5", "model.keras"])
def test_damaged_files_of_keras(tmp_path: Path, keras: Adapter, kind: str):
    """Any outcome is a load or a `CheckpointError`."""
    place = saved(keras, kind, tmp_path / "a")
    whole = place.read_bytes()
    random = np.random.default_rng(0)
    outcomes = [_outcome(place, whole[: int(share * len(whole))]) for share in (0, 0.01, 0.3, 0.7, 0.999)]
    assert set(outcomes) == {CheckpointError}
    for _ in range(60):
        flipped = bytearray(whole)
        for position in random.integers(0, len(whole), 3):
            flipped[position] ^= int(random.integers(1, 256))
        assert _outcome(place, bytes(flipped)) in (None, CheckpointError, ConfigError)


def _outcome(place: Path, content: bytes) -> type[Exception] | None:
    place.write_bytes(content)
    try:
        with open_checkpoint(place) as checkpoint:
            for name in checkpoint.names:
                checkpoint.read(name)
    except OPTError as error:
        return type(error)
    return None


def test_a_group_inside_itself(tmp_path: Path, keras: Adapter):
    place = saved(keras, "model.weights.h5", tmp_path / "a")
    with h5py.File(place, "r+") as file:
        for number in range(20):
            file[f"layers/loop{number}"] = file["layers"]
    with pytest.raises(CheckpointError, match="lies in two places"):
        open_checkpoint(place)


def archive(place: Path, change: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> Path:
    """A `.keras` with its records changed."""
    with zipfile.ZipFile(place) as source:
        records = {name: source.read(name) for name in source.namelist()}
    change(records)
    with zipfile.ZipFile(place, "w", compression) as target:
        for name, content in records.items():
            target.writestr(name, content)
    return place


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: held.pop("config.json"), r"the archive has no config\.json"),
        (lambda held: held.pop("model.weights.h5"), r"the archive has no model\.weights\.h5"),
        (lambda held: held.update({"config.json": b"[" * 100_000}), "is no JSON"),
        (lambda held: held.update({"config.json": b" " * 10_000_001}), "its config.json has 10000001 bytes"),
        (lambda held: held.update({"config.json": b'{"registered_name": "os>system"}'}), "holds a 'os>system'"),
    ],
)
def test_archives_that_hold_something_else(tmp_path: Path, keras: Adapter, change: Any, told: str):
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(archive(saved(keras, "model.keras", tmp_path / "a"), change))


def test_an_archive_is_not_unpacked(tmp_path: Path, keras: Adapter):
    place = archive(saved(keras, "model.keras", tmp_path / "a"), lambda _: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        open_checkpoint(place)


@pytest.mark.parametrize("name", ["../x.weights.h5", "/etc/x.weights.h5", "config.json", 3, ["a.weights.h5", None]])
def test_an_index_of_keras_stays_in_its_directory(tmp_path: Path, name: Any):
    (tmp_path / "config.json").write_text(TINY.to_json())
    place = tmp_path / "x.weights.json"
    place.write_text(json.dumps({"weight_map": {"/layers/a/vars": name}}))
    with pytest.raises(CheckpointError, match=r"expected plain names of \*\.weights\.h5 files"):
        open_checkpoint(place)
    place.write_text(json.dumps({"weight_map": {"/layers/a/vars": ["a.weights.h5"]}}))
    with pytest.raises(CheckpointError, match=r"names files that are absent: a\.weights\.h5"):
        open_checkpoint(place)


def test_an_orbax_checkpoint_needs_tensorstore(tmp_path: Path, flax: Adapter, monkeypatch: pytest.MonkeyPatch):
    place = saved(flax, "arrays", tmp_path / "a")
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(CheckpointError, match=r"takes tensorstore to read.*opt-models\[orbax\]"):
        open_checkpoint(place)


def _described(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    described = json.loads((place / "_METADATA").read_text())
    change(described)
    (place / "_METADATA").write_text(json.dumps(described))


def test_an_orbax_checkpoint_cannot_lead_elsewhere(tmp_path: Path, flax: Adapter):
    place = saved(flax, "apart", tmp_path / "a")
    entry = {"key_metadata": [{"key": "..", "key_type": 2}, {"key": "x", "key_type": 2}]}
    for key in ("..", "../x", "a/b", "", "a.b", None, 7.5):
        entry["key_metadata"][0]["key"] = key
        _described(place, lambda held: held["tree_metadata"].update({"x": entry}))
        with pytest.raises(CheckpointError, match=r"it names a branch|can't be opened"):
            open_checkpoint(place)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": [10**9, 8], "chunks": [10**9, 8]}, "its arrays claim"),
        ({"chunks": [10**6, 10**6]}, "is stored in pieces"),
        ({"dtype": "<c8"}, "is no weight"),
        ({"dtype": "|O"}, "can't be opened"),
    ],
)
def test_an_orbax_array_that_claims_what_it_has_not(tmp_path: Path, flax: Adapter, change: dict[str, Any], told: str):
    place = saved(flax, "apart", tmp_path / "a")
    described = place / "model.decoder.embed_tokens.embedding/.zarray"
    described.write_text(json.dumps(json.loads(described.read_text()) | change))
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(place)


@pytest.mark.parametrize("kind", ["state", "apart"])
def test_damaged_orbax_checkpoints(tmp_path: Path, flax: Adapter, kind: str):
    place = saved(flax, kind, tmp_path / "a")
    random = np.random.default_rng(0)
    for path in sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size > 64)[:12]:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        for position in random.integers(0, len(whole), 5):
            flipped[position] ^= 0x5A
        for content in (whole[: len(whole) // 2], bytes(flipped)):
            path.write_bytes(content)
            try:
                with open_checkpoint(place) as checkpoint:
                    for name in checkpoint.names:
                        checkpoint.read(name)
            except OPTError:
                pass
        path.write_bytes(whole)
