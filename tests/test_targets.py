"""What a target holds besides its tensors: for each format, in one file and in shards, as its readers expect it."""

import json
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import pytest
from safetensors import safe_open

from conversion import convert, open_checkpoint
from conversion.formats import torch_file
from opt_common.config import OPTConfig
from opt_common.hub import FORMATS, METASEQ
from tests.paths import GOLDENS
from tests.test_conversion import MODELS, tensors

SIZE, LIMIT = "30KB", 30_000
SHARDED = [(name, size) for name in FORMATS for size in (None, SIZE)]
ARGUMENTS: dict[str, dict[str, Any]] = {
    **{f"{name}, {size or 'one file'}": {"to": name, "max_shard_size": size} for name, size in SHARDED},
    "metaseq, one file": {"to": METASEQ},
    "metaseq, parts": {"to": METASEQ, "model_parts": 2},
    "keras-hub": {"to": "keras-hub"},
}
CARRIED_FILES = (
    *("generation_config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "LICENSE.md", "LICENSE"),
)
HEADS = ("lm_head.weight", "lm_head/kernel")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with every file that may lie beside weights, and some that must stay."""
    directory = tmp_path_factory.mktemp("source") / "model"
    convert(MODELS["bfloat16"], directory, "torch", max_shard_size=SIZE)
    for name in CARRIED_FILES:
        (directory / name).write_text(f'{{"about": "{name}"}}')
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "README.md", "events.log"):
        (directory / name).write_bytes(b"stays")
    return directory


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_files_beside_the_weights_go_along(tmp_path: Path, source: Path, name: str):
    target = tmp_path / "target"
    result = convert(source, target, **ARGUMENTS[name])
    written = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert written == sorted(result.files)
    if result.target_format == "keras-hub":
        moved = {"vocab.json": "assets/tokenizer/vocabulary.json", "merges.txt": "assets/tokenizer/merges.txt"}
        others = {"metadata.json", "model.weights.h5", "tokenizer.json", "config.json"}
    else:
        moved, others = {}, {path.name for path in (target / "config.json", *opened_files(target))}
    carried = [file for file in CARRIED_FILES if not (moved and file == "tokenizer.json")]
    for file in carried:
        assert (target / moved.get(file, file)).read_bytes() == (source / file).read_bytes()
    assert set(written) - {moved.get(file, file) for file in carried} == others
    config = open_checkpoint(target).config
    assert config.dtype == "bfloat16"
    assert config.extra["architectures"] == ["OPTForCausalLM"]
    assert config.replace(extra={}) == OPTConfig.from_json_file(source / "config.json").replace(extra={})


def opened_files(target: Path) -> list[Path]:
    """The weight files of a checkpoint, and their index."""
    with open_checkpoint(target) as checkpoint:
        return [*checkpoint.files, *target.glob("*.index.json")]


@pytest.mark.parametrize(("name", "size"), SHARDED)
def test_files_and_index_are_those_of_the_format(tmp_path: Path, name: str, size: str | None):
    convert(MODELS["float32"], tmp_path / "a", name, max_shard_size=size)
    files = FORMATS[name]
    with open_checkpoint(tmp_path / "a") as checkpoint:
        found = [path.name for path in checkpoint.files]
        held = {checkpoint.native_name(tensor) for tensor in checkpoint.names}
        total = sum(checkpoint.info(tensor).nbytes for tensor in checkpoint.names)
        largest = max(checkpoint.info(tensor).nbytes for tensor in checkpoint.names)
    if size is None:
        assert found == [files.single]
        assert not (tmp_path / "a" / files.index).exists()
        return
    assert found == [files.shard(number, len(found)) for number in range(1, len(found) + 1)]
    index = json.loads((tmp_path / "a" / files.index).read_text())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"].values()) == set(found)
    scope = "tfopt_for_causal_lm/" if name == "tf" else ""
    tied = {"lm_head.weight"} if name == "torch" else set()
    assert set(index["weight_map"]) == {scope + native for native in held} | tied
    for file in found:
        assert (tmp_path / "a" / file).stat().st_size < max(LIMIT, largest) + 20_000, "and the structure of the file"


@pytest.mark.parametrize("size", [None, SIZE])
def test_safetensors_say_whose_layout_they_have(tmp_path: Path, size: str | None):
    """transformers 4.57 refuses a file whose metadata does not name a framework it knows."""
    convert(GOLDENS / "pre_ln/flax_msgpack", tmp_path / "a", "safetensors", max_shard_size=size)
    for path in (tmp_path / "a").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("size", [None, SIZE])
def test_keras_lists_every_weight(tmp_path: Path, size: str | None):
    convert(MODELS["float16"], tmp_path / "a", "tf", max_shard_size=size)
    for path in (tmp_path / "a").glob("*.h5"):
        with h5py.File(path) as file:
            if size is not None:
                assert all(isinstance(file[name], h5py.Dataset) for name in file.attrs["layer_names"])
                continue
            assert (file.attrs["backend"], file.attrs["keras_version"][:2]) == ("tensorflow", "2.")
            assert list(file.attrs["layer_names"]) == ["model"]
            assert list(file["top_level_model_weights"].attrs["weight_names"]) == []
            assert all(isinstance(file["model"][name], h5py.Dataset) for name in file["model"].attrs["weight_names"])


@pytest.mark.parametrize("size", [None, SIZE])
def test_flax_s_files_are_plain_trees(tmp_path: Path, size: str | None):
    convert(MODELS["float32"], tmp_path / "a", "flax", max_shard_size=size)
    for path in (tmp_path / "a").glob("*.msgpack"):
        assert set(msgpack.unpackb(path.read_bytes())) == {"model"}


@pytest.mark.parametrize(("name", "size"), SHARDED)
def test_a_tied_head_is_written_once(tmp_path: Path, name: str, size: str | None):
    """safetensors#98, #202, #265, #304: shared tensors must not be stored twice, nor refused."""
    convert(MODELS["float32"], tmp_path / "a", name, max_shard_size=size)
    natives: list[str] = []
    for path in opened_files(tmp_path / "a"):
        if path.suffix == ".json":
            continue
        if name == "torch":
            reader = torch_file.open_reader(path)
            places = {key: reader.read(key).__array_interface__["data"][0] for key in reader.tensors}
            natives += [key for key in places if key not in HEADS]
            if HEADS[0] in places:
                assert places[HEADS[0]] == places["model.decoder.embed_tokens.weight"], "one storage"
            continue
        with open_checkpoint(tmp_path / "a") as checkpoint:
            natives = [checkpoint.native_name(tensor) for tensor in checkpoint.names]
    assert not set(HEADS) & set(natives)
    assert len(natives) == len(tensors(MODELS["float32"]))


def test_a_dtype_that_was_asked_for_is_in_the_configuration(tmp_path: Path, source: Path):
    for name in ("safetensors", "tf", METASEQ, "keras-hub"):
        convert(source, tmp_path / name, name, dtype="float32")
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.config.dtype == "float32"
            assert {checkpoint.info(tensor).dtype for tensor in checkpoint.names} == {np.dtype(np.float32)}


def test_a_preset_without_a_vocabulary_has_no_tokenizer(tmp_path: Path, source: Path):
    """A `tokenizer.json` of Hugging Face's is no file that KerasHub knows by that name."""
    convert(source, tmp_path / "a", "torch")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "a" / name).unlink()
    result = convert(tmp_path / "a", tmp_path / "b", "keras-hub")
    assert not (tmp_path / "b/tokenizer.json").exists()
    assert "KerasHub loads it with preprocessor=None." in " ".join(result.warnings)
    assert not any("preprocessor" in warning for warning in convert(source, tmp_path / "c", "keras-hub").warnings)
