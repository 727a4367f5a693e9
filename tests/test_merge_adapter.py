"""`opt-convert merge-adapter`: PEFT's merged weights, in every format and dtype, with no framework."""

import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from conversion import convert, merge_adapter, open_checkpoint
from conversion.cli import main
from opt_common.errors import CheckpointError, ConfigError
from opt_common.lora import adapter_table
from tests.paths import GOLDENS
from tests.test_lora import CASES, compare_outputs, file_of, golden, outputs, with_adapter
from tests.tolerances import FLOAT32, compare

ADAPTERS = GOLDENS / "lora"
BASE = GOLDENS / "pre_ln" / "safetensors"


def read_all(directory):
    """Every tensor of a checkpoint."""
    with open_checkpoint(directory) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.names}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_checkpoint_is_peft_s_and_each_backend_s(backends, case, tmp_path):
    variant, head = CASES[case]
    merge_adapter(GOLDENS / variant / "safetensors", ADAPTERS / case, tmp_path / "merged", "safetensors")
    tensors = read_all(tmp_path / "merged")
    for name, values in golden(case).items():
        if name.startswith("weights/"):
            compare(tensors[name.removeprefix("weights/")], values, FLOAT32, what=name)
    backend = backends[len(case) % len(backends)]  # each has its turn; that they merge alike is in test_lora.py
    model = backend.load(tmp_path / "merged", head=None if head == "lm" else head)
    compare_outputs(outputs(backend, model, case), golden(case), case, FLOAT32)
    adapted = with_adapter(backend, case)
    adapted.merge_and_unload()
    for name, values in backend.parameters(adapted).items():
        compare(tensors[name], values, FLOAT32, what=name)


@pytest.mark.parametrize("to", ["safetensors", "torch", "tf", "flax", "metaseq"])
def test_every_format_holds_the_same_bits(to, tmp_path):
    merge_adapter(BASE, ADAPTERS / "plain", tmp_path / "merged", "safetensors")
    source = GOLDENS / "pre_ln" / "flax_msgpack"
    merge_adapter(
        source, ADAPTERS / "plain", tmp_path / to / "x", to, **({} if to == "metaseq" else {"max_shard_size": "70KB"})
    )
    convert(tmp_path / to / "x", tmp_path / "back", "safetensors")
    first, second = read_all(tmp_path / "merged"), read_all(tmp_path / "back")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    untouched = read_all(BASE)
    changed = {name for name in first if not np.array_equal(first[name], untouched[name])}
    assert changed == {f"model.decoder.layers.{i}.self_attn.{name}_proj.weight" for i in range(3) for name in "qv"}


@pytest.mark.parametrize(
    ("folder", "dtype"), [("safetensors_fp16", np.float16), ("safetensors_bf16", ml_dtypes.bfloat16)]
)
def test_half_precision_is_computed_in_float32_and_rounded_once(folder, dtype, tmp_path):
    merge_adapter(GOLDENS / "pre_ln" / folder, ADAPTERS / "plain", tmp_path / "merged", "safetensors")
    name = "model.decoder.layers.1.self_attn.v_proj.weight"
    stored = safetensors.numpy.load_file(file_of(ADAPTERS / "plain"))
    a, b = (stored[f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"] for part in "AB")
    base = read_all(GOLDENS / "pre_ln" / folder)[name].astype(np.float32)
    found = read_all(tmp_path / "merged")[name]
    assert found.dtype == dtype
    assert np.array_equal(found, (b @ a * np.float32(4) + base).astype(dtype))
    merge_adapter(GOLDENS / "pre_ln" / folder, ADAPTERS / "plain", tmp_path / "wide", "safetensors", dtype="float32")
    assert read_all(tmp_path / "wide")[name].dtype == np.float32


def test_a_classifier_s_adapter_makes_a_classifier_of_a_language_model(tmp_path):
    merge_adapter(BASE, ADAPTERS / "seqcls", tmp_path / "merged", "safetensors")
    with open_checkpoint(tmp_path / "merged") as checkpoint:
        assert (checkpoint.head, checkpoint.config.num_labels) == ("sequence_classification", 3)
        head = checkpoint.read("score.weight")
    assert np.array_equal(
        head, safetensors.numpy.load_file(file_of(ADAPTERS / "seqcls"))["base_model.model.score.weight"]
    )


def test_an_adapter_of_a_bare_decoder_merges_into_a_language_model(tmp_path):
    shutil.copytree(ADAPTERS / "plain", tmp_path / "bare")
    tensors = safetensors.numpy.load_file(file_of(ADAPTERS / "plain"))
    tensors = {name.replace("model.model.decoder.", "model.decoder."): array for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, file_of(tmp_path / "bare"))
    merge_adapter(BASE, tmp_path / "bare", tmp_path / "merged", "safetensors")
    merge_adapter(BASE, ADAPTERS / "plain", tmp_path / "same", "safetensors")
    first, second = read_all(tmp_path / "merged"), read_all(tmp_path / "same")
    assert all(np.array_equal(first[name], second[name]) for name in second)


def test_the_command_runs_where_no_framework_can_be_imported(tmp_path):
    blocked = "import sys\nfor name in ('torch', 'tensorflow', 'keras', 'jax', 'flax'):\n    sys.modules[name] = None\n"
    run = f"{blocked}from conversion.cli import main\nsys.exit(main(sys.argv[1:]))"
    arguments = [str(BASE), str(ADAPTERS / "plain"), str(tmp_path / "merged"), "--to", "flax", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", run, "merge-adapter", *arguments], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["target_format"] == "flax"
    assert (tmp_path / "merged" / "flax_model.msgpack").exists()
    assert (tmp_path / "merged" / "generation_config.json").exists()


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="shape: "):
        merge_adapter(GOLDENS / "post_ln_proj" / "safetensors", ADAPTERS / "plain", tmp_path / "x", "safetensors")
    with pytest.raises(ConfigError, match="There is no"):
        merge_adapter(BASE, tmp_path, tmp_path.parent / "x", "safetensors")
    shutil.copytree(ADAPTERS / "plain", tmp_path / "huge")
    tensors = safetensors.numpy.load_file(file_of(tmp_path / "huge"))
    safetensors.numpy.save_file({name: array * 1e4 for name, array in tensors.items()}, file_of(tmp_path / "huge"))
    half = str(GOLDENS / "pre_ln" / "safetensors_fp16")
    assert main(["merge-adapter", half, str(tmp_path / "huge"), str(tmp_path / "x"), "--to", "torch"]) == 1
    assert "too large for float16" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge"]


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A base of 60 MB in 28 layers is merged with far less than that."""
    import tracemalloc

    from conversion import save_checkpoint
    from conversion.adapter import save_adapter
    from opt_common.config import OPTConfig
    from opt_common.lora import LoraConfig, resolve_lora
    from opt_common.params import parameter_table

    config = OPTConfig(
        vocab_size=64,
        hidden_size=256,
        ffn_dim=512,
        num_hidden_layers=28,
        num_attention_heads=4,
        word_embed_proj_dim=256,
    )
    rng = np.random.default_rng(0)
    table = parameter_table(config)
    save_checkpoint(tmp_path / "base", config, table, lambda row: rng.random(row.shape, np.float32), dtype="float32")
    lora = resolve_lora(config, LoraConfig(target_modules="all-linear", r=4), "lm")
    adapted = adapter_table(config, lora, "lm")
    save_adapter(tmp_path / "adapter", lora, adapted, lambda row: rng.random(row.shape, np.float32))
    tracemalloc.start()
    result = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", "safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(4 * row.size for row in table)
    assert result.total_bytes > 25 * largest
    assert peak < 8 * largest
