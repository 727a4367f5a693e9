"""Reading, writing, converting, verifying: every format, every dtype, one file and shards; bits are never lost."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion import Checkpoint, checked_parameters, convert, open_checkpoint, save_checkpoint, verify
from conversion import tensors as tensors_module
from conversion.canonical import DROPS, HEAD, drop_reason, to_canonical, to_native
from conversion.dtypes import parse_dtype
from conversion.formats import hdf5_file, msgpack_file, torch_file
from conversion.plan import make_plan, parse_size
from conversion.tensors import TensorInfo, TensorSpec, pieces
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError
from opt_common.hub import FORMATS
from opt_common.params import Parameter, parameter_table
from tests.cases import SMALL_VARIANTS, formats, half_formats
from tests.paths import GOLDENS

SHARD_SIZES = (None, "30KB")
HALF = {"fp16": "safetensors_fp16", "bf16": "safetensors_bf16", "_old_": "safetensors_fp16"}
MODELS = {
    "float32": GOLDENS / "pre_ln/safetensors",
    "float16": GOLDENS / "pre_ln/safetensors_fp16",
    "bfloat16": GOLDENS / "pre_ln/safetensors_bf16",
}


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint: dtype, shape, bytes."""
    with open_checkpoint(path) as checkpoint:
        checked_parameters(checkpoint, parameter_table(checkpoint.config))
        return {name: (*describe(checkpoint, name), checkpoint.read(name).tobytes()) for name in checkpoint.names}


def describe(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...]]:
    info = checkpoint.info(name)
    array = checkpoint.read(name)
    assert (array.dtype, array.shape) == (info.dtype, info.shape)
    return info.dtype.name, info.shape


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def save_random(directory: Path, config: OPTConfig, **options: Any) -> dict[str, np.ndarray]:
    """Write a checkpoint with seeded weights; its tensors."""
    random = np.random.default_rng(0)
    table = parameter_table(config)
    arrays = {parameter.name: random.standard_normal(parameter.shape).astype(np.float32) for parameter in table}
    save_checkpoint(directory, config, table, lambda parameter: arrays[parameter.name], **options)
    return arrays


@pytest.fixture
def tiny() -> OPTConfig:
    return OPTConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, ffn_dim=16, max_position_embeddings=6, num_attention_heads=2
    )


# Reading


@pytest.mark.parametrize(
    ("variant", "folder"),
    [(variant, folder) for variant in SMALL_VARIANTS for folder in (*formats(variant), *half_formats(variant))],
)
def test_every_published_layout_reads_bit_equal(variant: str, folder: str):
    half = next((reference for mark, reference in HALF.items() if mark in folder), "safetensors")
    assert tensors(GOLDENS / variant / folder) == tensors(GOLDENS / variant / half)


def test_a_single_file_and_an_index_can_be_named():
    whole = tensors(GOLDENS / "sharded/torch_bin")
    assert tensors(GOLDENS / "sharded/torch_bin/pytorch_model.bin.index.json") == whole
    assert tensors(GOLDENS / "pre_ln/tf_h5/tf_model.h5") == tensors(GOLDENS / "pre_ln/torch_bin")


def test_arrays_outlive_the_checkpoint_and_cannot_be_written():
    with open_checkpoint(GOLDENS / "pre_ln/tf_h5") as checkpoint:
        array = checkpoint.read("model.decoder.layers.0.fc1.weight")
    assert array.shape == (128, 32)
    assert np.isfinite(array).all()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


@pytest.mark.parametrize("head", ["lm", None])
@pytest.mark.parametrize("scheme", ["torch", "keras", "nnx"])
@pytest.mark.parametrize("change", [{}, {"word_embed_proj_dim": 4, "do_layer_norm_before": False}, {"tie": False}])
def test_names_go_there_and_back(tiny: OPTConfig, scheme: Any, change: dict[str, Any], head: Any):
    config = tiny.replace(**{{"tie": "tie_word_embeddings"}.get(key, key): value for key, value in change.items()})
    for parameter in parameter_table(config, head=head):
        for bare in (False, True) if parameter.name != HEAD else (False,):
            path = to_native(parameter, scheme, bare=bare)
            for native in ("/".join(path), ".".join(path)):
                canonical = to_canonical(native, scheme)
                assert (canonical.name, canonical.transposed) == (parameter.name, parameter.transposed(scheme))


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", ""])
def test_row_9_names_with_and_without_prefix(prefix: str):
    """text-generation-inference#1060: the keys of opt-350m lack `model.`."""
    for rest in ("embed_tokens.weight", "layers.11.fc1.bias", "final_layer_norm.weight", "project_in.weight"):
        assert to_canonical(prefix + rest, "torch").name == f"model.decoder.{rest}"


@pytest.mark.parametrize(
    "scope", ["", "tfopt_for_causal_lm/", "tfopt_for_causal_lm_12/", "tfopt_model/", "model/", "x/"]
)
def test_any_scope_of_tensorflow_is_dropped(scope: str):
    name = to_canonical(f"{scope}model/decoder/layers.3/self_attn/q_proj/kernel:0", "keras")
    assert (name.name, name.transposed) == ("model.decoder.layers.3.self_attn.q_proj.weight", True)
    table = to_canonical(f"{scope}model/decoder/embed_tokens/weight:0", "keras")
    assert (table.name, table.transposed) == ("model.decoder.embed_tokens.weight", False)


def test_intended_drops_have_a_reason():
    assert drop_reason("decoder.version")
    assert drop_reason("decoder.embed_positions._float_tensor")
    assert drop_reason("model.decoder.embed_tokens.weight") is None
    assert all(drop.reason for drop in DROPS)


def rewrite(source: Path, target: Path, change: Callable[[dict[str, np.ndarray]], None], **config: Any) -> Path:
    """A safetensors checkpoint with its tensors changed at will."""
    from conversion.formats import safetensors_file

    with open_checkpoint(source) as checkpoint:
        arrays = {name: checkpoint.read(name) for name in checkpoint.names}
        changed = checkpoint.config.replace(**config)
    change(arrays)
    target.mkdir()
    specs = [TensorSpec(name=name, info=TensorInfo(array.dtype, array.shape)) for name, array in arrays.items()]
    safetensors_file.write(target / "model.safetensors", specs, arrays.__getitem__)
    (target / "config.json").write_text(changed.to_json())
    return target


def test_rows_10_and_39_a_tied_head_under_either_name(tmp_path: Path):
    """transformers#43159, #41038, safetensors#98: `save_model` keeps the head's name alone."""

    def only_head(arrays: dict[str, np.ndarray]) -> None:
        arrays[HEAD] = arrays.pop("model.decoder.embed_tokens.weight")

    def both(arrays: dict[str, np.ndarray]) -> None:
        arrays[HEAD] = arrays["model.decoder.embed_tokens.weight"].copy()

    whole = tensors(MODELS["float32"])
    assert tensors(rewrite(MODELS["float32"], tmp_path / "head", only_head)) == whole
    assert tensors(rewrite(MODELS["float32"], tmp_path / "both", both)) == whole


def test_row_10_a_head_of_its_own_in_a_tied_model_is_an_error(tmp_path: Path):
    def differ(arrays: dict[str, np.ndarray]) -> None:
        arrays[HEAD] = arrays["model.decoder.embed_tokens.weight"].copy()
        arrays[HEAD][-1, -1] += 1

    source = rewrite(MODELS["float32"], tmp_path / "a", differ)
    with pytest.raises(CheckpointError, match='"tie_word_embeddings": false'):
        open_checkpoint(source)
    assert HEAD in tensors(rewrite(GOLDENS / "untied/safetensors", tmp_path / "b", lambda _: None))


def test_row_15_all_misfits_are_named_in_one_error(tmp_path: Path):
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        del arrays["model.decoder.layers.1.fc1.weight"]
        arrays["model.decoder.layers.7.fc1.bias"] = np.zeros(3, np.float32)
        arrays["model.decoder.layers.0.fc2.bias"] = np.zeros(5, np.float32)
        arrays["model.decoder.layers.0.fc1.bias"] = np.zeros(128, np.int64)

    with (
        open_checkpoint(rewrite(MODELS["float32"], tmp_path / "a", spoil)) as checkpoint,
        pytest.raises(CheckpointError) as error,
    ):
        checked_parameters(checkpoint, parameter_table(checkpoint.config))
    message = str(error.value)
    assert "4 problems" in message
    assert "missing: model.decoder.layers.1.fc1.weight, of shape [128, 32]" in message
    assert "unexpected: model.decoder.layers.7.fc1.bias, of shape [3]" in message
    assert "shape: model.decoder.layers.0.fc2.bias is [5], expected [32]" in message
    assert "dtype: model.decoder.layers.0.fc1.bias is int64" in message


def test_row_6_a_missing_final_norm_tells_its_story(tmp_path: Path):
    """transformers#17653, #17545, metaseq#164, CTranslate2#850: the norm was missing, and the output abnormal."""

    def old(arrays: dict[str, np.ndarray]) -> None:
        for leaf in ("weight", "bias"):
            del arrays[f"model.decoder.final_layer_norm.{leaf}"]

    with (
        open_checkpoint(rewrite(MODELS["float32"], tmp_path / "a", old)) as checkpoint,
        pytest.raises(CheckpointError, match=r"4\.20\.1.*_remove_final_layer_norm"),
    ):
        checked_parameters(checkpoint, parameter_table(checkpoint.config))
    source = rewrite(MODELS["float32"], tmp_path / "b", old, _remove_final_layer_norm=True)
    assert len(tensors(source)) == 50


def test_two_names_for_one_tensor_are_an_error(tmp_path: Path):
    def twice(arrays: dict[str, np.ndarray]) -> None:
        arrays["decoder.layers.0.fc1.bias"] = arrays["model.decoder.layers.0.fc1.bias"]

    with pytest.raises(CheckpointError, match=r"'model.decoder.layers.0.fc1.bias' and 'decoder.layers.0.fc1.bias'"):
        open_checkpoint(rewrite(MODELS["float32"], tmp_path / "a", twice))


# Converting


@pytest.mark.parametrize("dtype", MODELS)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(FORMATS, FORMATS)))
def test_rows_13_and_36_all_pairs_keep_every_bit(tmp_path: Path, source: str, target: str, dtype: str):
    """transformers#12554, #12545, #12626, #37999 (wrong or no tensors), #31210, #32200, #20248, #17959 (no shards)."""
    expected = tensors(MODELS[dtype])
    for first, second in itertools.permutations(SHARD_SIZES):
        old, new, back = (tmp_path / f"{first}-{second}-{step}" for step in ("old", "new", "back"))
        convert(MODELS[dtype], old, source, max_shard_size=first)
        convert(old, new, target, max_shard_size=second)
        assert tensors(new) == expected
        convert(new, back, source, max_shard_size=first)
        assert files(back) == files(old), "a round trip gives the first bytes again"
        for directory, size in ((old, first), (new, second)):
            assert any(directory.glob("*.index.json")) == (size is not None)


@pytest.mark.parametrize("variant", ["post_ln_proj", "untied", "no_bias_no_affine", "gelu", "remove_final_ln"])
def test_every_variant_goes_around_all_formats(tmp_path: Path, variant: str):
    source = GOLDENS / variant / "safetensors"
    expected = tensors(source)
    for step, name in enumerate(("tf", "flax", "torch", "safetensors")):
        result = convert(source, tmp_path / str(step), name)
        source = result.target
        assert tensors(source) == expected
        assert OPTConfig.from_json_file(source / "config.json") == OPTConfig.from_json_file(
            GOLDENS / variant / "safetensors/config.json"
        )
        limited = (variant == "no_bias_no_affine" and name in ("tf", "flax")) or (variant, name) == ("untied", "tf")
        assert bool(result.warnings) == limited


@pytest.mark.parametrize("name", FORMATS)
def test_a_bare_decoder_stays_one(tmp_path: Path, name: str):
    source = GOLDENS / "post_ln_proj/base_torch_bin"
    convert(source, tmp_path / "new", name)
    with open_checkpoint(tmp_path / "new") as checkpoint:
        natives = {checkpoint.native_name(tensor) for tensor in checkpoint.names}
    start = {"tf": "tfopt_model/model/decoder/", "flax": "decoder/"}.get(name, "decoder.")
    assert all(native.startswith(start) for native in natives)
    assert json.loads((tmp_path / "new/config.json").read_text())["architectures"] == ["OPTModel"]
    assert tensors(tmp_path / "new") == tensors(source)


def test_files_beside_the_weights_go_along(tmp_path: Path):
    source = tmp_path / "source"
    convert(MODELS["float32"], source, "torch")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (source / name).write_text(name)
    (source / "optimizer.pt").write_bytes(b"large")
    convert(source, tmp_path / "target", "flax")
    assert (tmp_path / "target/merges.txt").read_text() == "merges.txt"
    assert (tmp_path / "target/generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert not (tmp_path / "target/optimizer.pt").exists()


def test_dtype_is_changed_only_when_asked_and_never_to_infinity(tmp_path: Path, tiny: OPTConfig):
    convert(MODELS["float32"], tmp_path / "half", "safetensors", dtype="bf16")
    assert tensors(tmp_path / "half") == tensors(MODELS["bfloat16"])
    assert OPTConfig.from_json_file(tmp_path / "half/config.json").dtype == "bfloat16"
    convert(tmp_path / "half", tmp_path / "wide", "torch", dtype="float64")
    convert(tmp_path / "wide", tmp_path / "back", "safetensors", dtype="torch.bfloat16")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "half")

    name = "model.decoder.layers.1.fc2.weight"

    def large(parameter: Parameter) -> np.ndarray:
        return np.full(parameter.shape, 70000.0 if parameter.name == name else 1.0, np.float32)

    save_checkpoint(tmp_path / "large", tiny, parameter_table(tiny), large)
    with pytest.raises(CheckpointError, match=rf"{name}: 70000 is too large for float16"):
        convert(tmp_path / "large", tmp_path / "never", "safetensors", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "half", "large", "wide"]
    with pytest.raises(CheckpointError, match=r"dtype is 'int8', expected one of float64, float32, float16, bfloat16"):
        parse_dtype("int8")


def test_row_40_nothing_that_is_there_is_touched(tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        convert(MODELS["float32"], target, "torch")
    convert(MODELS["float32"], target, "torch", force=True)
    convert(MODELS["float16"], target, "torch", force=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert tensors(target) == tensors(MODELS["float16"])
    before = files(target)
    with pytest.raises(CheckpointError, match=r"holds other weights, pytorch_model\.bin"):
        convert(MODELS["float32"], target, "tf", force=True)
    with pytest.raises(CheckpointError, match=r"holds other weights, pytorch_model\.bin"):
        convert(MODELS["float32"], target, "torch", force=True, max_shard_size="30KB")
    assert files(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_source_and_target_may_not_overlap(tmp_path: Path, place: str):
    source = tmp_path / "a/source"
    source.parent.mkdir()
    convert(MODELS["float32"], source, "torch")
    with pytest.raises(CheckpointError, match="overlap"):
        convert(source, source / place, "flax", force=True)


def test_a_target_beside_a_source_that_is_a_file(tmp_path: Path):
    source = tmp_path / "source"
    convert(MODELS["float32"], source, "torch")
    file = source / "pytorch_model.bin"
    for target in (file, source, tmp_path):
        with pytest.raises(CheckpointError, match="overlap"):
            convert(file, target, "flax", force=True)
    convert(file, source / "new", "flax")
    assert tensors(source / "new") == tensors(MODELS["float32"])


def test_a_target_that_is_a_link_to_itself(tmp_path: Path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target in (tmp_path / "loop", tmp_path / "loop/target"):
        for resume in (False, True):
            with pytest.raises(CheckpointError, match=r"leads to itself\. Choose another target"):
                convert(MODELS["float32"], target, "torch", resume=resume)


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, tiny: OPTConfig):
    def fail(parameter: Parameter) -> np.ndarray:
        if parameter.name.endswith("layers.1.fc2.bias"):
            raise OSError(28, "No space left on device")
        return np.zeros(parameter.shape, np.float32)

    for name in FORMATS:
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path / name, tiny, parameter_table(tiny), fail, format=name, dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_an_interrupted_save_never_mixes(tmp_path: Path, tiny: OPTConfig, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "target"
    save_random(target, tiny, max_shard_size="1KB")
    replaced: list[str] = []
    replace = Path.replace

    def stop_after_two(self: Path, other: Path) -> Path:
        if len(replaced) == 2:
            raise KeyboardInterrupt
        replaced.append(self.name)
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        save_random(target, tiny, max_shard_size="1KB")
    with pytest.raises(CheckpointError):
        open_checkpoint(target)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("70KB", 70_000), ("1GiB", 2**30), ("1.5 kib", 1536), (123, 123)],
)
def test_sizes(text: str | int, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5 parsecs", "1e9", "GB", "5GBB", "٣GB", None])
def test_sizes_that_make_no_sense(text: Any):
    with pytest.raises(CheckpointError, match="max_shard_size"):
        parse_size(text)


def test_shards_respect_the_limit_and_the_index_is_huggingfaces(tmp_path: Path, tiny: OPTConfig):
    save_random(tmp_path / "new", tiny, max_shard_size="2KB", format="torch")
    index = json.loads((tmp_path / "new/pytorch_model.bin.index.json").read_text())
    assert index["weight_map"][HEAD] == index["weight_map"]["model.decoder.embed_tokens.weight"]
    sizes = [parameter.size * 4 for parameter in parameter_table(tiny)]
    assert index["metadata"]["total_size"] == sum(sizes)
    names = {parameter.name: np.dtype(np.float32) for parameter in parameter_table(tiny)}
    plan = make_plan(tiny, parameter_table(tiny), names, format_name="torch", max_shard_size="2KB")
    assert len(plan.shards) == 4
    assert all(sum(t.stored_bytes for t in shard if not t.spec.shares) <= 2000 for shard in plan.shards)
    alone = make_plan(tiny, parameter_table(tiny), names, format_name="tf", max_shard_size=1)
    assert [len(shard) for shard in alone.shards] == [1] * len(names)


# The bytes of each format


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_source_gives_the_same_bytes(tmp_path: Path, name: str):
    for directory in ("a", "b"):
        convert(MODELS["bfloat16"], tmp_path / directory, name)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(("variant", "folder"), [("pre_ln", "flax_msgpack"), ("post_ln_proj", "flax_msgpack")])
def test_msgpack_is_byte_for_byte_what_flax_writes(tmp_path: Path, variant: str, folder: str):
    convert(GOLDENS / variant / "safetensors", tmp_path / "new", "flax")
    golden = (GOLDENS / variant / folder / "flax_model.msgpack").read_bytes()
    assert (tmp_path / "new/flax_model.msgpack").read_bytes() == golden


def test_msgpack_cuts_large_arrays_and_joins_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(msgpack_file, "MAX_CHUNK_BYTES", 1000)
    monkeypatch.setattr(tensors_module, "PIECE_BYTES", 700)
    array = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    arrays = {"a/kernel": array, "a/scalar": np.float32(3).reshape(()), "b": array[:2].astype(ml_dtypes.bfloat16)}
    specs = [TensorSpec(name=name, info=TensorInfo(value.dtype, value.shape)) for name, value in arrays.items()]
    msgpack_file.write(tmp_path / "x.msgpack", specs, arrays.__getitem__)
    assert (tmp_path / "x.msgpack").read_bytes().count(b"__msgpack_chunked_array__") == 1
    reader = msgpack_file.open_reader(tmp_path / "x.msgpack")
    for name, value in arrays.items():
        assert reader.read(name).dtype == value.dtype
        assert reader.read(name).tobytes() == value.tobytes()
        assert reader.read(name).shape == value.shape


def test_bfloat16_in_hdf5_is_widened_exactly_and_marked(tmp_path: Path):
    convert(MODELS["bfloat16"], tmp_path / "new", "tf")
    with open_checkpoint(MODELS["bfloat16"]) as checkpoint, h5py.File(tmp_path / "new/tf_model.h5") as file:
        weight = checkpoint.read("model.decoder.layers.0.fc1.weight")
        dataset = file["model/tfopt_for_causal_lm/model/decoder/layers.0/fc1/kernel:0"]
        assert dataset.dtype == np.float32
        assert dataset.attrs["dtype"] == "bfloat16"
        assert np.array_equal(dataset[()], weight.T.astype(np.float32))
    with h5py.File(tmp_path / "new/tf_model.h5", "r+") as file:
        file["model/tfopt_for_causal_lm/model/decoder/layers.0/fc1/kernel:0"][0, 0] = 1.0001
    with open_checkpoint(tmp_path / "new") as checkpoint, pytest.raises(CheckpointError, match="marked as bfloat16"):
        checkpoint.read("model.decoder.layers.0.fc1.weight")


@pytest.mark.parametrize("single", [True, False])
def test_hdf5_splits_long_lists_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool):
    monkeypatch.setattr(hdf5_file, "ATTRIBUTE_BYTES", 100)
    scope = "scope/" if single else ""
    names = [f"{scope}model/decoder/layers.{index}/fc1/bias:0" for index in range(9)]
    info = TensorInfo(np.dtype(np.float32), (3,))
    specs = [TensorSpec(name=name, info=info) for name in names]
    hdf5_file.write(tmp_path / "x.h5", specs, lambda name: np.full(3, names.index(name), np.float32))
    with h5py.File(tmp_path / "x.h5") as file:
        where = file["model"] if single else file
        attribute = "weight_names" if single else "layer_names"
        assert f"{attribute}0" in where.attrs
        assert attribute not in where.attrs
    reader = hdf5_file.open_reader(tmp_path / "x.h5")
    assert list(reader.tensors) == names
    assert [reader.read(name)[0] for name in names] == list(range(9))


def test_records_of_torch_files_are_aligned(tmp_path: Path):
    convert(MODELS["float32"], tmp_path / "new", "torch")
    reader = torch_file.open_reader(tmp_path / "new/pytorch_model.bin")
    addresses = [reader.read(name).__array_interface__["data"][0] for name in reader.tensors]
    assert {address % 64 for address in addresses} == {0}
    assert reader.read(HEAD).__array_interface__ == reader.read("model.decoder.embed_tokens.weight").__array_interface__


@settings(deadline=None)
@given(
    rows=st.integers(0, 300),
    columns=st.integers(1, 300),
    transposed=st.booleans(),
    piece=st.sampled_from([64, 1000, 1 << 20]),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_pieces_are_the_array_in_order(rows: int, columns: int, transposed: bool, piece: int, dtype: Any):
    array = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) % 251
    array = array.T if transposed else array
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors_module, "PIECE_BYTES", piece)
        joined = b"".join(part.tobytes() for part in pieces(array, np.dtype(dtype), "x"))
    assert joined == array.astype(dtype).tobytes()


# Verifying


def test_verify_compares_bits_and_function(tmp_path: Path):
    convert(MODELS["float32"], tmp_path / "same", "tf")
    result = verify(tmp_path / "same", MODELS["float32"])
    assert result.holds
    assert {check.verdict for check in result.checks} == {"equal"}
    assert result.function is not None
    assert result.function.first_divergent is None
    assert (result.function.logits, result.function.greedy_equal) == (0.0, True)

    half = verify(MODELS["float16"], MODELS["float32"])
    assert half.holds
    assert {check.verdict for check in half.checks} == {"rounded"}


def test_verify_finds_the_first_layer_that_differs(tmp_path: Path):
    def nudge(arrays: dict[str, np.ndarray]) -> None:
        arrays["model.decoder.layers.1.fc2.bias"] = arrays["model.decoder.layers.1.fc2.bias"] + np.float32(0.5)

    other = rewrite(MODELS["float32"], tmp_path / "other", nudge)
    result = verify(other, MODELS["float32"])
    assert not result.holds
    assert result.problems == ("model.decoder.layers.1.fc2.bias differs (float32 and float32): max |difference| 0.5.",)
    assert result.function is not None
    assert result.function.first_divergent == 2, "the output of layer 1"


def test_verify_reports_numbers_that_are_none(tmp_path: Path):
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["model.decoder.layers.1.fc2.bias"] = np.full(32, np.nan, np.float32)

    result = verify(rewrite(MODELS["float32"], tmp_path / "other", spoil))
    assert result.problems == ("model.decoder.layers.1.fc2.bias holds numbers that are not finite.",)


def test_verify_compares_what_the_configurations_compute(tmp_path: Path):
    other = rewrite(MODELS["float32"], tmp_path / "other", lambda _: None, activation_function="gelu")
    assert "activation_function" in " ".join(verify(other, MODELS["float32"]).problems)


def test_an_untied_copy_of_a_tied_head_is_the_same_model(tmp_path: Path):
    def untie(arrays: dict[str, np.ndarray]) -> None:
        arrays[HEAD] = arrays["model.decoder.embed_tokens.weight"]

    other = rewrite(MODELS["float32"], tmp_path / "other", untie, tie_word_embeddings=False)
    result = verify(other, MODELS["float32"])
    assert result.holds
    assert HEAD in {check.name for check in result.checks}


@pytest.mark.parametrize("problem", ["absent", "no config", "no weights", "other suffix"])
def test_wrong_places_give_a_sentence(tmp_path: Path, problem: str):
    path = tmp_path / "model"
    if problem != "absent":
        path.mkdir()
    if problem in ("no weights", "other suffix"):
        (path / "config.json").write_bytes((MODELS["float32"] / "config.json").read_bytes())
    if problem == "other suffix":
        path = path / "weights.onnx"
        path.write_bytes(b"x")
    with pytest.raises((CheckpointError, ConfigError)) as error:
        open_checkpoint(path)
    assert os.fspath(tmp_path) in str(error.value)


def test_the_directories_above_a_target_are_made(tmp_path):
    target = tmp_path / "runs" / "one" / "model"
    convert(MODELS["float32"], target, "flax")
    assert tensors(target) == tensors(MODELS["float32"])
