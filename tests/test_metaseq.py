"""metaseq checkpoints: whole, in model-parallel parts, in shards; written by PyTorch as the layout's rules say."""

import argparse
import itertools
import json
import os
import sys
import tracemalloc
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion import cli, convert, open_checkpoint, save_checkpoint, verify
from conversion.canonical import EMBEDDING, HEAD
from conversion.checkpoint import checked_parameters
from conversion.formats import torch_pickle
from conversion.metaseq_config import arguments_of
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError
from opt_common.hub import MetaseqName, find_weights, resolve
from opt_common.params import parameter_table
from tests.adapters import Adapter
from tests.cases import SMALL_VARIANTS
from tests.paths import GOLDENS
from tests.test_conversion_hostile import CANARY, GADGETS

CONFIGS = {
    "pre-norm": OPTConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, ffn_dim=24, max_position_embeddings=6, num_attention_heads=8
    ),
    "post-norm with projections": OPTConfig(
        vocab_size=40,
        hidden_size=16,
        word_embed_proj_dim=12,
        num_hidden_layers=2,
        ffn_dim=24,
        max_position_embeddings=6,
        num_attention_heads=8,
        do_layer_norm_before=False,
    ),
}
PARTS = (None, 1, 2, 4, 8)
Arrays = dict[str, np.ndarray]


def weights(config: OPTConfig, dtype: str = "float32") -> Arrays:
    """Seeded tensors of a model, canonical names."""
    random = np.random.default_rng(0)
    return {row.name: random.standard_normal(row.shape).astype(dtype) for row in parameter_table(config)}


def part_of(arrays: Arrays, part: int, parts: int, *, fused: bool) -> Arrays:
    """What metaseq keeps in one part: written down here a second time, from the description of the layout."""
    state: Arrays = {}
    rows = ("embed_tokens", "q_proj", "k_proj", "v_proj", "fc1", "lm_head")
    for name, array in arrays.items():
        split = (
            0 if set(rows) & set(name.split(".")) else 1 if name.endswith(("out_proj.weight", "fc2.weight")) else None
        )
        metaseq = name.removeprefix("model.").replace("decoder.final_layer_norm", "decoder.layer_norm")
        metaseq = metaseq.replace("project_in", "project_in_dim").replace("project_out", "project_out_dim")
        share = array if split is None else np.split(array, parts, split)[part]
        state[metaseq.replace("lm_head", "decoder.output_projection")] = share
    for name in [name for name in state if fused and ".k_proj." in name]:
        k, v, q = (state.pop(name.replace("k_proj", projection)) for projection in ("k_proj", "v_proj", "q_proj"))
        state[name.replace("k_proj", "qkv_proj")] = np.concatenate([k, v, q])
    return {**state, "decoder.version": np.array([3.0], np.float32)}


def torch_save(path: Path, state: Mapping[str, np.ndarray], **beside: Any) -> None:
    """A file as metaseq saves it."""
    import torch

    model = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}
    torch.save({"args": None, "cfg": None, **beside, "model": model, "optimizer_history": [{"loss": 0.5}]}, path)


def options(config: OPTConfig, parts: int | None = None) -> dict[str, Any]:
    return {"cfg": {"model": arguments_of(config, parts)}}


def save(
    directory: Path, config: OPTConfig, arrays: Arrays, parts: int | None = None, *, fused: bool = True, **beside: Any
) -> Path:
    """A checkpoint in one file or in parts; the directory."""
    directory.mkdir()
    for part in range(parts or 1):
        name = "reshard.pt" if parts is None else f"reshard-model_part-{part}.pt"
        state = part_of(arrays, part, parts or 1, fused=fused)
        torch_save(directory / name, state, **(beside or options(config, parts)))
    return directory


def read(path: Path, **options: Any) -> Arrays:
    """All tensors of a checkpoint that fits its configuration."""
    with open_checkpoint(path, **options) as checkpoint:
        checked_parameters(checkpoint, parameter_table(checkpoint.config))
        arrays = {name: checkpoint.read(name) for name in checkpoint.names}
        for name, array in arrays.items():
            info = checkpoint.info(name)
            assert (info.dtype, info.shape) == (array.dtype, array.shape)
            assert not array.flags.writeable
        return arrays


def same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


# Reading


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("parts", PARTS)
def test_rows_11_and_37_every_layout_reads_bit_equal(tmp_path: Path, model: str, fused: bool, parts: int | None):
    """transformers#21519, #22526, metaseq#475, #691: K, V, Q is the order. metaseq#407, #695: parts need no merge."""
    arrays = weights(CONFIGS[model], "float16")
    directory = save(tmp_path / "a", CONFIGS[model], arrays, parts, fused=fused)
    assert same(read(directory), arrays)
    assert same(read(sorted(directory.iterdir())[-1]), arrays), "one file stands for all"
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.config == CONFIGS[model].replace(dtype="float16")


def test_row_11_the_order_is_key_value_query(tmp_path: Path):
    config = CONFIGS["pre-norm"]
    arrays = weights(config)
    for number, projection in enumerate(("k_proj", "v_proj", "q_proj")):
        for layer, leaf in itertools.product(range(2), ("weight", "bias")):
            arrays[f"model.decoder.layers.{layer}.self_attn.{projection}.{leaf}"][:] = number
    import torch

    convert_source = save(tmp_path / "a", config, arrays, 2)
    stored = torch.load(convert_source / "reshard-model_part-1.pt")["model"]
    assert stored["decoder.layers.0.self_attn.qkv_proj.bias"].tolist() == [0.0] * 8 + [1.0] * 8 + [2.0] * 8
    assert same(read(convert_source), arrays)


def flatten(tensors: Arrays, shards: int, padding: int) -> tuple[list[np.ndarray], dict[str, Any], list[int]]:
    """A flattened parameter: its shards, its metadata without the padding, and the padding of each shard."""
    flat = np.concatenate([array.reshape(-1) for array in tensors.values()])
    flat = np.concatenate([flat, np.full(padding + -(len(flat) + padding) % shards, 7, flat.dtype)])
    length = len(flat) // shards
    metadata = {
        "names": list(tensors),
        "shapes": [array.shape for array in tensors.values()],
        "numels": [array.size for array in tensors.values()],
    }
    real = sum(metadata["numels"])
    paddings = [min(length, max(0, (shard + 1) * length - real)) for shard in range(shards)]
    return np.split(flat, shards), metadata, paddings


def save_shards(directory: Path, config: OPTConfig, arrays: Arrays, parts: int, shards: int, padding: int = 0) -> Path:
    """A checkpoint as fully sharded training leaves it: one flattened parameter for each layer and one for the rest."""
    directory.mkdir()
    for part in range(parts):
        state = part_of(arrays, part, parts, fused=True)
        version = state.pop("decoder.version")
        groups: dict[str, Arrays] = {}
        for name, array in state.items():
            module = ".".join(name.split(".")[:3]) if ".layers." in name else ""
            groups.setdefault(module, {})[name.removeprefix(f"{module}." if module else "")] = array
        flat = {module: flatten(tensors, shards, padding) for module, tensors in groups.items()}
        for shard in range(shards):
            metadata = [
                {"fsdp_path": module, "params": {"flat_param_0": {**entry, "padding": paddings[shard]}}}
                for module, (_, entry, paddings) in flat.items()
            ]
            held = {f"{module}.flat_param_0".lstrip("."): pieces[shard] for module, (pieces, *_) in flat.items()}
            name = f"checkpoint_last-model_part-{part}-shard{shard}.pt"
            beside = {**options(config), "shard_metadata": {"param_metadata": metadata, "buffer_names": []}}
            torch_save(directory / name, {**held, "decoder.version": version}, **beside)
    return directory


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize(("parts", "shards", "padding"), [(1, 1, 0), (1, 3, 2), (2, 2, 0), (4, 5, 3)])
def test_row_37_shards_of_flattened_parameters(tmp_path: Path, model: str, parts: int, shards: int, padding: int):
    arrays = weights(CONFIGS[model])
    assert same(read(save_shards(tmp_path / "a", CONFIGS[model], arrays, parts, shards, padding)), arrays)


def test_a_merged_tensor_takes_its_own_memory_only(tmp_path: Path):
    config = CONFIGS["pre-norm"].replace(vocab_size=1 << 16)
    directory = save(tmp_path / "a", config, weights(config), 4)
    with open_checkpoint(directory) as checkpoint:
        tracemalloc.start()
        try:
            size = checkpoint.read(EMBEDDING).nbytes
            assert tracemalloc.get_traced_memory()[1] < 1.1 * size
        finally:
            tracemalloc.stop()


def test_a_head_beside_the_token_table(tmp_path: Path):
    tied = CONFIGS["pre-norm"]
    arrays = weights(tied)
    both = {**arrays, HEAD: arrays[EMBEDDING]}
    assert same(read(save(tmp_path / "same", tied, both, 2)), arrays)
    other = {**both, HEAD: arrays[EMBEDDING] + 1}
    with pytest.raises(CheckpointError, match="differ"):
        read(save(tmp_path / "differ", tied, other, 2))
    assert same(read(save(tmp_path / "untied", tied.replace(tie_word_embeddings=False), other, 2)), other)


# Arguments


def test_objects_among_the_arguments_are_neither_imported_nor_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """omegaconf wraps each value in a node; metaseq's older files have a namespace."""
    config = CONFIGS["pre-norm"]
    module = types.ModuleType("omegaconf")
    for name in ("DictConfig", "AnyNode"):
        kind = type(name, (), {"__module__": "omegaconf"})
        setattr(module, name, kind)
    monkeypatch.setitem(sys.modules, "omegaconf", module)

    def node(kind: str, **state: Any) -> Any:
        made = getattr(module, kind)()
        made.__dict__.update(state)
        return made

    values = {name: node("AnyNode", _val=value, _metadata=int) for name, value in arguments_of(config, None).items()}
    inner = node("DictConfig", _content=values, _metadata={"odd": {None: 1, (1, 2): 3}, "set": {1, 2}})
    cfg = node("DictConfig", _content={"model": inner, "seed": np.float64(1)})
    namespace = argparse.Namespace(**arguments_of(config, None), layers=[1, Path("x")])
    saved = {
        "new": save(tmp_path / "new", config, weights(config), cfg=cfg),
        "old": save(tmp_path / "old", config, weights(config), args=namespace, extra_state={"loss": np.float32(1)}),
    }
    monkeypatch.delitem(sys.modules, "omegaconf")
    for directory in saved.values():
        with open_checkpoint(directory) as checkpoint:
            assert checkpoint.config == config.replace(dtype="float32")
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize("gadget", GADGETS)
def test_nothing_is_executed_among_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gadget: str):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    try:
        torch_pickle.load(GADGETS[gadget], inert=True)
    except torch_pickle.RefusedError:
        pass
    else:
        assert gadget in (
            "torch.load inside",
            "nested name",
            "torch._utils other",
            "torch.serialization",
            "numpy",
            "module as name",
            "codecs",
            "pathlib",
            "torch._utils sparse",
            "torch.jit",
        )
    assert not Path(CANARY).exists()
    assert set(sys.modules) == before


def test_an_object_in_place_of_a_tensor_is_refused(tmp_path: Path):
    import torch

    (tmp_path / "a").mkdir()
    model = {"decoder.version": torch.ones(1), "decoder.embed_tokens.weight": argparse.Namespace()}
    torch.save({"model": model}, tmp_path / "a/restored.pt")
    with pytest.raises(CheckpointError, match=r"no tensors: decoder\.embed_tokens\.weight"):
        open_checkpoint(tmp_path / "a")
    torch.save({"model": {}, "args": types.SimpleNamespace(a=os.path.join)}, tmp_path / "a/restored.pt")
    with pytest.raises(CheckpointError, match="nothing was executed"):
        open_checkpoint(tmp_path / "a")


def test_what_the_file_does_not_say_a_user_must(tmp_path: Path):
    config = CONFIGS["pre-norm"]
    arrays = weights(config)
    directory = save(tmp_path / "a", config, arrays, args=argparse.Namespace(arch="transformer_lm"))
    with pytest.raises(ConfigError, match=r"number of attention heads .* --config") as error:
        open_checkpoint(directory)
    assert "pre-norm" not in str(error.value), "the final norm says it"
    (tmp_path / "config.json").write_text(config.to_json())
    assert same(read(directory, config=tmp_path / "config.json"), arrays)
    (directory / "config.json").write_text(config.to_json())
    assert same(read(directory), arrays)


def test_layers_whose_norms_could_be_either(tmp_path: Path):
    config = CONFIGS["pre-norm"].replace(_remove_final_layer_norm=True)
    said = {"decoder_attention_heads": 8}
    with pytest.raises(ConfigError, match="whether its layers are pre-norm"):
        open_checkpoint(save(tmp_path / "a", config, weights(config), cfg={"model": said}))
    for name, before in (("b", True), ("c", False)):
        said["decoder_normalize_before"] = before
        with open_checkpoint(save(tmp_path / name, config, weights(config), cfg=said)) as checkpoint:
            assert checkpoint.config.do_layer_norm_before == before
            assert not checkpoint.config.has_final_layer_norm


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("no_scale_embedding", False, "square root"),
        ("decoder_learned_pos", False, "not learned"),
        ("alibi", True, "ALiBi"),
        ("activation_fn", "relu_squared", "activation_function is 'relu_squared'"),
        ("decoder_attention_heads", 7, "multiple of num_attention_heads"),
    ],
)
def test_a_model_that_is_no_opt_is_refused(tmp_path: Path, option: str, value: Any, said: str):
    config = CONFIGS["pre-norm"]
    model = {**arguments_of(config, None), option: value}
    with pytest.raises(ConfigError, match=said):
        open_checkpoint(save(tmp_path / "a", config, weights(config), cfg={"model": model}))


# Files that do not belong together


def spoil(directory: Path, part: int, name: str, change: Any) -> None:
    import torch

    path = directory / f"reshard-model_part-{part}.pt"
    content = torch.load(path)
    content["model"][name] = change(content["model"][name])
    torch.save(content, path)


def test_row_37_copies_that_differ_are_all_named(tmp_path: Path):
    config = CONFIGS["pre-norm"]
    directory = save(tmp_path / "a", config, weights(config), 4)
    spoil(directory, 1, "decoder.layer_norm.weight", lambda tensor: tensor + 1)
    spoil(directory, 3, "decoder.layers.1.fc2.bias", lambda tensor: -tensor)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(directory)
    assert "2 problems" in str(error.value)
    assert "decoder.layer_norm.weight, of which each part has a copy, is not the same in part 1" in str(error.value)
    assert "decoder.layers.1.fc2.bias, of which each part has a copy, is not the same in part 3" in str(error.value)


def test_copies_that_differ_by_rounding_are_told_of(tmp_path: Path):
    config = CONFIGS["pre-norm"]
    arrays = weights(config)
    directory = save(tmp_path / "a", config, arrays, 2)
    spoil(directory, 1, "decoder.embed_positions.weight", lambda tensor: tensor * (1 + 2**-20))
    with pytest.warns(UserWarning, match=r"embed_positions\.weight differs by up to .* part 0 is used"):
        assert same(read(directory), arrays)


def test_row_37_missing_parts(tmp_path: Path):
    config = CONFIGS["pre-norm"]
    directory = save(tmp_path / "a", config, weights(config), 4)
    (directory / "reshard-model_part-3.pt").unlink()
    with pytest.raises(CheckpointError, match=r"hold 12 columns of .*out_proj\.weight, expected 16; a part is missing"):
        open_checkpoint(directory)
    (directory / "reshard-model_part-1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks part 1 of its metaseq checkpoint\. Fetch"):
        open_checkpoint(directory)


def test_parts_of_different_models(tmp_path: Path):
    config = CONFIGS["pre-norm"]
    directory = save(tmp_path / "a", config, weights(config), 2)
    spoil(directory, 1, "decoder.layers.0.fc1.weight", lambda tensor: tensor[:-1])
    with pytest.raises(CheckpointError, match=r"fc1\.weight is not the same kind of tensor in part 1"):
        open_checkpoint(directory)


def test_row_37_missing_shards_and_metadata(tmp_path: Path):
    config = CONFIGS["pre-norm"]
    directory = save_shards(tmp_path / "a", config, weights(config), 2, 3)
    for part in range(2):
        (directory / f"checkpoint_last-model_part-{part}-shard2.pt").unlink()
    with pytest.raises(CheckpointError, match="a shard is missing"):
        open_checkpoint(directory)
    (directory / "checkpoint_last-model_part-1-shard1.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks part 1 shard 1 of"):
        open_checkpoint(directory)
    (tmp_path / "b").mkdir()
    torch_save(tmp_path / "b/x-shard0.pt", {"flat_param_0": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match="does not say of what flat_param_0 is made"):
        open_checkpoint(tmp_path / "b")


def test_a_directory_with_several_checkpoints(tmp_path: Path):
    config = CONFIGS["pre-norm"]
    arrays = weights(config)
    directory = save(tmp_path / "a", config, arrays, 2)
    (save(tmp_path / "b", config, arrays) / "reshard.pt").rename(directory / "restored.pt")
    with pytest.raises(CheckpointError, match=r"2 metaseq checkpoints: reshard-model_part-0\.pt, restored\.pt"):
        open_checkpoint(directory)
    assert same(read(directory / "restored.pt"), arrays)
    convert(directory / "restored.pt", tmp_path / "c", "safetensors")
    (directory / "restored.pt").rename(tmp_path / "c/restored.pt")
    assert find_weights(tmp_path / "c")[0] == "safetensors", "the hub's formats come first"
    with pytest.raises(CheckpointError, match=r"No config\.json"):
        resolve(tmp_path)


def test_other_pytorch_files_are_not_taken_for_metaseq(tmp_path: Path):
    for name in ("pytorch_model.bin", "optimizer.pt", "rng_state.pt", "restored.bin", "-shard1.pt"):
        assert MetaseqName.parse(name) is None
    assert MetaseqName.parse("checkpoint_last-model_part-7-shard12.pt") == MetaseqName(
        stem="checkpoint_last", part=7, shard=12
    )
    (tmp_path / "weights.pt").write_bytes((GOLDENS / "pre_ln/torch_bin/pytorch_model.bin").read_bytes())
    (tmp_path / "config.json").write_bytes((GOLDENS / "pre_ln/torch_bin/config.json").read_bytes())
    assert same(read(tmp_path / "weights.pt"), read(GOLDENS / "pre_ln/torch_bin"))
    (tmp_path / "weights.pt").rename(tmp_path / "restored.pt")
    with pytest.raises(CheckpointError, match="no state dict named 'model'"):
        open_checkpoint(tmp_path)


# Writing


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("parts", PARTS)
def test_what_is_written_is_the_layout_and_reads_back_the_same(tmp_path: Path, model: str, parts: int | None):
    import torch

    config, arrays = CONFIGS[model], weights(CONFIGS[model])
    table = parameter_table(config)
    for name in ("a", "b"):
        save_checkpoint(
            tmp_path / name, config, table, lambda row: arrays[row.name], format="metaseq", model_parts=parts
        )
    written = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}, "the same bytes"
    weight_files = ["restored.pt"] if parts is None else [f"reshard-model_part-{part}.pt" for part in range(parts)]
    assert sorted(written) == ["config.json", *weight_files]
    for part, name in enumerate(weight_files):
        content = torch.load(tmp_path / "a" / name, weights_only=True)
        stored = {name: tensor.numpy() for name, tensor in content["model"].items()}
        assert same(stored, part_of(arrays, part, parts or 1, fused=True))
        assert content["cfg"]["model"]["decoder_attention_heads"] == 8
    assert same(read(tmp_path / "a"), arrays)
    (tmp_path / "a/config.json").unlink()
    assert same(read(tmp_path / "a"), arrays)
    with open_checkpoint(tmp_path / "a") as checkpoint:
        assert checkpoint.config == config.replace(dtype="float32")


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
@pytest.mark.parametrize("parts", [None, 4])
def test_any_model_goes_there_and_back(tmp_path: Path, variant: str, parts: int | None):
    source = GOLDENS / variant / "safetensors"
    convert(source, tmp_path / "there", "metaseq", model_parts=parts)
    convert(tmp_path / "there", tmp_path / "back", "safetensors")
    assert same(read(tmp_path / "back"), read(source))
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "back") as b:
        assert a.config.replace(extra={}) == b.config.replace(extra={})


@pytest.mark.parametrize("folder", ["safetensors_fp16", "safetensors_bf16", "tf_h5", "flax_msgpack"])
def test_any_format_and_dtype_goes_there_and_back(tmp_path: Path, folder: str):
    source = GOLDENS / "pre_ln" / folder
    convert(source, tmp_path / "there", "metaseq", model_parts=2)
    arrays = read(source)
    written = read(tmp_path / "there")
    assert same({name: written[name] for name in arrays}, arrays)
    assert verify(tmp_path / "there", source).holds


def test_parts_that_do_not_divide_the_model(tmp_path: Path):
    config = CONFIGS["pre-norm"].replace(vocab_size=42, ffn_dim=20)
    save_checkpoint(tmp_path / "a", config, parameter_table(config), lambda row: np.zeros(row.shape, np.float32))
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "a", tmp_path / "b", "metaseq", model_parts=16)
    for sentence in ("num_attention_heads is 8, which 16", "ffn_dim is 20, which 16", "vocab_size is 42, which 16"):
        assert sentence in str(error.value)
    for arguments, said in (
        ({"to": "metaseq", "model_parts": 0}, "expected 1 or more"),
        ({"to": "torch", "model_parts": 2}, "Only metaseq"),
        ({"to": "metaseq", "max_shard_size": "1MB"}, "no shards"),
    ):
        with pytest.raises(CheckpointError, match=said):
            convert(tmp_path / "a", tmp_path / "b", **arguments)
    assert not (tmp_path / "b").exists()


def test_projections_of_several_dtypes_cannot_be_fused(tmp_path: Path):
    config = CONFIGS["pre-norm"]
    arrays = weights(config)
    arrays["model.decoder.layers.1.self_attn.v_proj.weight"] = np.zeros((16, 16), np.float16)
    save_checkpoint(tmp_path / "a", config, parameter_table(config), lambda row: arrays[row.name])
    with pytest.raises(CheckpointError, match=r"several dtypes here: decoder\.layers\.1\.self_attn\.qkv_proj\.weight"):
        convert(tmp_path / "a", tmp_path / "b", "metaseq")
    convert(tmp_path / "a", tmp_path / "b", "metaseq", dtype="float16")


def test_row_40_old_parts_are_not_left_beside_new_ones(tmp_path: Path):
    source = GOLDENS / "pre_ln/safetensors"
    convert(source, tmp_path / "a", "metaseq", model_parts=4)
    convert(source, tmp_path / "a", "metaseq", model_parts=4, dtype="float16", force=True)
    assert {array.dtype.name for array in read(tmp_path / "a").values()} == {"float16"}
    for arguments in ({"to": "metaseq", "model_parts": 2}, {"to": "metaseq"}, {"to": "torch"}):
        with pytest.raises(CheckpointError, match="holds other weights"):
            convert(source, tmp_path / "a", force=True, **arguments)
    assert len(read(tmp_path / "a")) == 52


# Use


def test_a_backend_loads_it_without_a_config(tmp_path: Path, backend: Adapter):
    convert(GOLDENS / "post_ln_proj/safetensors", tmp_path / "a", "metaseq", model_parts=2)
    (tmp_path / "a/config.json").unlink()
    model, reference = (backend.load(path) for path in (tmp_path / "a", GOLDENS / "post_ln_proj/safetensors"))
    assert same(backend.parameters(model), backend.parameters(reference))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = str(tmp_path / "a")
    assert (
        cli.main(["convert", str(GOLDENS / "pre_ln/flax_msgpack"), target, "--to", "metaseq", "--model-parts", "2"])
        == 0
    )
    assert capsys.readouterr().out.startswith("flax -> metaseq: 52 tensors, ")
    assert cli.main(["verify", target, "--against", str(GOLDENS / "pre_ln/torch_bin")]) == 0
    assert "52 the same bits" in capsys.readouterr().out
    Path(target, "config.json").unlink()
    assert cli.main(["inspect", f"{target}/reshard-model_part-1.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "metaseq"
    assert cli.main(["inspect", target, "--config", str(GOLDENS / "gelu/config.json")]) == 0
    assert "would not load" in capsys.readouterr().out
    assert cli.main(["convert", target, str(tmp_path / "b"), "--to", "metaseq", "--model-parts", "3"]) == 1
    assert "num_attention_heads is 4, which 3 does not divide" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["parts", "shards"])
def test_flipped_bytes_never_do_more_than_fail(tmp_path: Path, kind: str):
    config = CONFIGS["pre-norm"]
    arrays = weights(config)
    directory = (
        save(tmp_path / "a", config, arrays, 2)
        if kind == "parts"
        else save_shards(tmp_path / "a", config, arrays, 1, 2, 3)
    )
    path = sorted(directory.iterdir())[0]
    whole = path.read_bytes()
    pickled = len(whole.partition(b"byteorder")[0])
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        spoiled = bytearray(whole)
        for position in random.integers(0, pickled, 2):
            spoiled[position] = random.integers(256)
        path.write_bytes(spoiled)
        try:
            read(directory)
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > 75
