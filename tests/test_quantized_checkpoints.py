"""Checkpoints whose matrices are integers: saved and loaded again, the same in every framework, and never misread."""

import contextlib
import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conversion import convert, merge_adapter, open_checkpoint, save_checkpoint, verify
from conversion.adapter import save_adapter
from conversion.cli import main
from conversion.doctor import doctor
from conversion.formats import safetensors_file
from conversion.inspect import inspect
from conversion.synthetic import write_random
from conversion.tensors import TensorInfo, TensorSpec
from opt_common import CheckpointError, ConfigError, OPTConfig, quantization
from opt_common.hub import FORMATS, QUANTIZED, WEIGHT_FILES
from opt_common.lora import LoraConfig, adapter_table, resolve_lora
from opt_common.params import parameter_table
from opt_common.quantization import STORAGES, StoredPart, stored_parts, stored_table

FILE = WEIGHT_FILES[QUANTIZED].single
SHAPE = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 80, "num_hidden_layers": 2}
SMALL = OPTConfig(**{**SHAPE, "ffn_dim": 96}, max_position_embeddings=32)
IDS = np.random.default_rng(6).integers(3, 96, (2, 9))
CODES, SCALES = "model.decoder.layers.1.fc1.weight.int8_codes", "model.decoder.layers.1.fc1.weight.int8_scales"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A checkpoint of numbers."""
    directory = tmp_path_factory.mktemp("numbers") / "model"
    write_random(directory, SMALL)
    return directory


@pytest.fixture(scope="module")
def rounded(tmp_path_factory, numbers):
    """The same in few bits, by the rules in NumPy and without a framework: a directory for each quantisation."""
    place = tmp_path_factory.mktemp("rounded")
    for scheme in STORAGES:
        write_rounded(numbers, place / scheme, scheme)
    return place


def write_rounded(numbers, directory, scheme, **options):
    """Round a checkpoint as the rules say, and write it."""
    with open_checkpoint(numbers) as checkpoint:

        def read(parameter):
            if not isinstance(parameter, StoredPart):
                return checkpoint.read(parameter.name)
            weight = np.asarray(checkpoint.read(parameter.whole.name))
            if "int8" in parameter.name.rpartition(".")[2]:
                return quantization.quantize_rows(weight)[parameter.index]
            codes, scales, offsets = quantization.quantize_groups(weight)
            packed = codes[:, ::2] + 16 * codes[:, 1::2]
            return (packed, scales.astype(ml_dtypes.bfloat16), offsets.astype(ml_dtypes.bfloat16))[parameter.index]

        config = checkpoint.config.replace(quantization=scheme)
        options = {"dtype": "float32", "generation_config": None, **options}
        save_checkpoint(directory, config, parameter_table(config), read, format=QUANTIZED, **options)


def schemes(backend):
    return backend.rounded_layers().AVAILABLE


def logits(backend, model):
    return backend.forward(model, input_ids=IDS).logits


def test_a_saved_model_computes_the_same_bits_again(backend, numbers, tmp_path):
    for scheme in schemes(backend):
        model = backend.load(numbers, quantization=scheme)
        model.save_pretrained(tmp_path / scheme)
        assert {path.name for path in (tmp_path / scheme).iterdir()} == {FILE, "config.json", "generation_config.json"}
        again = backend.load(tmp_path / scheme)
        assert again.config.quantization == scheme
        assert (logits(backend, again) == logits(backend, model)).all()
        assert again.generation_config == model.generation_config
        # What is saved of what was loaded, in shards this time, is the same once more.
        again.save_pretrained(tmp_path / f"{scheme}-shards", max_shard_size="20kB")
        assert len(list((tmp_path / f"{scheme}-shards").glob("quantized-*"))) > 2
        assert arrays(tmp_path / f"{scheme}-shards") == arrays(tmp_path / scheme)


def arrays(directory):
    """The bytes of every stored tensor."""
    found = {}
    for path in directory.glob("*.safetensors"):
        reader = safetensors_file.open_reader(path)
        found |= {name: (info, reader.read(name).tobytes()) for name, info in reader.tensors.items()}
    return found


def test_every_framework_stores_the_integers_of_the_rules_and_loads_what_others_stored(
    backend, numbers, rounded, tmp_path
):
    for scheme in schemes(backend):
        model = backend.load(numbers, quantization=scheme)
        model.save_pretrained(tmp_path / scheme)
        assert (tmp_path / scheme / FILE).read_bytes() == (rounded / scheme / FILE).read_bytes()
        loaded = backend.load(rounded / scheme)
        assert (logits(backend, loaded) == logits(backend, model)).all()
    # "int8" and "int8-dynamic" have the same weights: each loads as the other, where it is asked for.
    for scheme in {"int8-dynamic", "int8"} & set(schemes(backend)):
        for stored in ("int8", "int8-dynamic"):
            other = backend.load(rounded / stored, quantization=scheme)
            assert other.config.quantization == scheme
            expected = logits(backend, backend.load(numbers, quantization=scheme))
            assert (logits(backend, other) == expected).all()


def test_what_does_not_fit_is_refused_with_what_to_pass(backend, rounded, tmp_path):
    available = schemes(backend)
    if "int8" not in available:
        with pytest.raises(
            ConfigError, match=r"'int8', which this framework does not have. Pass quantization='int8-dynamic', or set"
        ):
            backend.load(rounded / "int8")
        with pytest.raises(ConfigError, match=r"'int4', which this framework does not have. Use PyTorch, or write"):
            backend.load(rounded / "int4")
    else:
        with pytest.raises(CheckpointError, match=r"stored in int8, but quantization is 'int4', expected 'int8-dynam"):
            backend.load(rounded / "int8", quantization="int4")
    with pytest.raises(CheckpointError, match=r"stored in int4, but quantization is 'int8-dynamic', expected 'int4'"):
        backend.load(rounded / "int4", quantization="int8-dynamic")
    forgetful = changed_config(rounded / "int8-dynamic", tmp_path / "forgetful", quantization=None)
    with pytest.raises(CheckpointError, match="quantization is None, expected 'int8-dynamic' or 'int8'"):
        backend.load(forgetful)
    assert backend.load(forgetful, quantization="int8-dynamic").config.quantization == "int8-dynamic"


def changed_config(source, target, **changes):
    """A copy with another configuration."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


VARIANTS = {
    "untied": {"tie_word_embeddings": False},
    "projections, post-norm": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "no biases": {"enable_bias": False, "layer_norm_elementwise_affine": False},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_model_is_saved_and_loaded(backend, changes, tmp_path):
    write_random(tmp_path / "numbers", SMALL.replace(**{"word_embed_proj_dim": 64, **changes}))
    for scheme in schemes(backend):
        model = backend.load(tmp_path / "numbers", quantization=scheme)
        model.save_pretrained(tmp_path / scheme)
        assert (logits(backend, backend.load(tmp_path / scheme)) == logits(backend, model)).all()


def test_other_heads_and_none_are_saved_and_loaded(backend, numbers, rounded, tmp_path):
    scheme = "int8-dynamic"
    bare = backend.load(numbers, bare=True, quantization=scheme)
    bare.save_pretrained(tmp_path / "bare")
    for directory in (tmp_path / "bare", rounded / scheme):
        again = backend.load(directory, bare=True)
        found, expected = (backend.forward(model, input_ids=IDS).last_hidden_state for model in (again, bare))
        assert (found == expected).all()
    # Names without the prefix of a language model, as Hugging Face gives a bare decoder.
    assert (logits(backend, backend.load(tmp_path / "bare")) == logits(backend, backend.load(rounded / scheme))).all()
    classifier = backend.load(rounded / scheme, head="sequence_classification", new_head=True, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    again = backend.load(tmp_path / "classifier", head="sequence_classification")
    assert (logits(backend, again) == logits(backend, classifier)).all()


def test_dtype_is_that_of_what_is_not_quantised(backend, numbers, tmp_path):
    model = backend.load(numbers, dtype="bfloat16", quantization="int8-dynamic")
    model.save_pretrained(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        dtypes = {tensor.info.dtype.name for tensor in checkpoint.stored_tensors()}
        assert checkpoint.config.dtype == "bfloat16"
    assert dtypes == {"int8", "float32", "bfloat16"}
    again = backend.model_class(False, None).from_pretrained(tmp_path / "model", dtype="auto")
    assert (logits(backend, again) == logits(backend, model)).all()


def test_loading_takes_the_memory_of_the_result(backend, rounded, tmp_path):
    size = {"hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 64, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=1 << 17, word_embed_proj_dim=64, max_position_embeddings=32, **size)
    write_random(tmp_path / "numbers", config)
    write_rounded(tmp_path / "numbers", tmp_path / "model", "int8-dynamic")
    table_bytes = 4 * config.vocab_size * config.word_embed_proj_dim
    backend.load(rounded / "int8-dynamic")  # what is imported at first is not to count
    tracemalloc.start()
    try:
        backend.load(tmp_path / "model")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.6 * table_bytes, f"{peak} bytes beside a table of {table_bytes}"


def test_formats_of_numbers_are_written_where_they_are_asked_for(backend, rounded, tmp_path):
    model = backend.load(rounded / "int8-dynamic")
    model.save_pretrained(tmp_path / "numbers", format="torch")
    with open_checkpoint(rounded / "int8-dynamic") as ours, open_checkpoint(tmp_path / "numbers") as theirs:
        assert theirs.storage is None
        assert theirs.config.quantization is None
        for name in ours.names:
            np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    plain = backend.load(tmp_path / "numbers")
    with pytest.raises(CheckpointError, match="format is 'quantized', but the model is not"):
        plain.save_pretrained(tmp_path / "again", format=QUANTIZED)


def test_no_adapter_goes_on_a_quantised_model(backend, rounded):
    model = backend.load(rounded / "int8-dynamic")
    with pytest.raises(ConfigError, match=r"in few bits \(int8-dynamic\), which take no adapter"):
        model.add_lora(LoraConfig())


# Without a framework


def test_no_other_software_finds_weights_that_it_would_misread(rounded):
    for scheme in STORAGES:
        names = {path.name for path in (rounded / scheme).iterdir()}
        assert not any(files.single in names or any(map(files.is_shard, names)) for files in FORMATS.values())
        assert "quantization_config" not in json.loads((rounded / scheme / "config.json").read_text())


@pytest.mark.parametrize("scheme", STORAGES)
def test_inspect_and_doctor_say_what_it_is(rounded, scheme, capsys):
    found = inspect(rounded / scheme)
    assert (found.format, found.problem) == (QUANTIZED, None)
    assert found.parameters == sum(parameter.size for parameter in parameter_table(SMALL))
    assert found.total_bytes == sum(tensor.nbytes for tensor in infos(rounded / scheme).values())
    assert {tensor.name for tensor in found.tensors} == infos(rounded / scheme).keys()
    assert main(["inspect", str(rounded / scheme)]) == 0
    part = f"model.decoder.layers.*.fc1.weight.{STORAGES[scheme]}_codes"
    assert part in capsys.readouterr().out
    diagnosis = doctor(rounded / scheme)
    assert diagnosis.healthy
    assert "quantized" in {finding.state for finding in diagnosis.findings}


def infos(directory):
    return safetensors_file.open_reader(directory / FILE).tensors


def test_doctor_finds_a_configuration_that_says_otherwise(rounded, tmp_path):
    diagnosis = doctor(changed_config(rounded / "int4", tmp_path / "model", quantization="int8"))
    assert [finding.state for finding in diagnosis.findings if finding.severity == "problem"] == ["quantization"]


@pytest.mark.parametrize("scheme", STORAGES)
def test_a_conversion_to_numbers_is_asked_for(rounded, scheme, tmp_path, capsys):
    source = str(rounded / scheme)
    assert main(["convert", source, str(tmp_path / "a"), "--to", "flax"]) == 1
    assert "Use --dequantize" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    options = ["--to", "flax", "--dequantize", "--verify"]
    assert main(["convert", source, str(tmp_path / "a"), *options]) == 0, capsys.readouterr()
    with open_checkpoint(tmp_path / "a") as checkpoint, open_checkpoint(source) as ours:
        assert checkpoint.config.quantization is None
        assert {checkpoint.info(name).dtype.name for name in checkpoint.names} == {"float32"}
        for parameter in parameter_table(SMALL):
            if (own := quantization.storage_of(parameter, STORAGES[scheme])) is not None:
                weight = quantization.dequantize(ours.stored(parameter.name), parameter.shape)
                np.testing.assert_array_equal(checkpoint.read(parameter.name), weight)
                assert ours.storage_of(parameter.name) == own
    assert main(["convert", source, str(tmp_path / "b"), "--to", QUANTIZED, "--verify"]) == 0
    assert (tmp_path / "b" / FILE).read_bytes() == (rounded / scheme / FILE).read_bytes()
    assert (tmp_path / "b" / "config.json").read_bytes() == (rounded / scheme / "config.json").read_bytes()


def test_conversions_that_make_no_sense_are_refused(numbers, rounded, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no quantised weights. Leave out --dequantize"):
        convert(numbers, tmp_path / "a", "torch", dequantize=True)
    with pytest.raises(CheckpointError, match="is not quantised, and --to quantized rounds nothing"):
        convert(numbers, tmp_path / "a", QUANTIZED)
    with pytest.raises(CheckpointError, match="copies quantised weights as they are"):
        convert(rounded / "int4", tmp_path / "a", QUANTIZED, dequantize=True)
    lora = resolve_lora(SMALL, LoraConfig(), "lm")
    table = adapter_table(SMALL, lora, "lm")
    save_adapter(tmp_path / "adapter", lora, table, lambda row: np.ones(row.shape, np.float32))
    with pytest.raises(CheckpointError, match=r"is quantised \(int8\), so that nothing can be merged into it"):
        merge_adapter(rounded / "int8", tmp_path / "adapter", tmp_path / "a", "torch")
    with pytest.raises(CheckpointError, match="but the weights are not quantised"):
        merge_adapter(numbers, tmp_path / "adapter", tmp_path / "a", QUANTIZED)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_verify_compares_numbers_and_leaves_frameworks_out(numbers, rounded):
    assert verify(rounded / "int8", rounded / "int8").holds
    assert any("quantization" in problem for problem in verify(rounded / "int8", rounded / "int8-dynamic").problems)
    off = verify(rounded / "int8", numbers)
    assert {check.verdict for check in off.checks} == {"equal", "differs"}
    assert all(check.max_difference < 1e-3 for check in off.checks)
    (problem,) = verify(rounded / "int8", frameworks=["all"]).problems
    assert "products in few bits are not those of the reference to 1e-09" in problem


def edited(source, target, change):
    """A copy whose tensors have been changed: `change` gets them as a dictionary."""
    shutil.copytree(source, target)
    reader = safetensors_file.open_reader(source / FILE)
    tensors = {name: np.array(reader.read(name)) for name in reader.tensors}
    change(tensors)
    (target / FILE).unlink()
    specs = [TensorSpec(name=name, info=TensorInfo(array.dtype, array.shape)) for name, array in tensors.items()]
    safetensors_file.write(target / FILE, specs, tensors.__getitem__)
    return target


def put(name, make):
    """A change that replaces a tensor."""
    return lambda tensors: tensors.update({name: make(tensors[name])})


def with_number(value):
    def change(array):
        array.reshape(-1)[-1] = value
        return array

    return change


MATRIX = "model.decoder.layers.1.fc1.weight"
DAMAGED = {
    "no scales": ("int8", lambda tensors: tensors.pop(SCALES), "has no int8_scales"),
    "no integers": ("int8", lambda tensors: tensors.pop(CODES), "has no int8_codes"),
    "no offsets": ("int4", lambda tensors: tensors.pop(f"{MATRIX}.int4_offsets"), "has no int4_offsets"),
    "both storages": (
        "int8",
        lambda tensors: tensors.update({f"{MATRIX}.int4_codes": np.zeros((4, 16), np.uint8)}),
        "stored both in int8 and in int4",
    ),
    "numbers too": ("int8", lambda tensors: tensors.update({MATRIX: np.zeros((96, 64), "f4")}), "is there twice"),
    "scales too short": (
        "int8",
        put(SCALES, lambda a: a[:-1]),
        r"int8_scales is float32 \[95\], expected float32 \[96",
    ),
    "scales in half precision": ("int8", put(SCALES, lambda a: a.astype("f2")), "int8_scales is float16"),
    "unsigned integers": ("int8", put(CODES, lambda a: a.view("u1")), "int8_codes is uint8"),
    "a vector": ("int8", put(CODES, lambda a: a[0]), r"int8_codes is int8 \[64\], expected int8 of a matrix"),
    "a scalar": ("int8", put(CODES, lambda a: np.array(a[0, 0])), r"int8_codes is int8 \[\], expected int8 of"),
    "another width": ("int8", put(CODES, lambda a: a[:, 1:]), r"shape: model.* is \[96, 63\], expected \[96, 64\]"),
    "no rows": ("int8", put(CODES, lambda a: a[:0]), r"int8_codes is int8 \[0, 64\], expected int8 of a matrix"),
    "no columns": ("int4", put(f"{MATRIX}.int4_codes", lambda a: a[:, :0]), r"\[96, 0\], expected uint8 of a matrix"),
    "no whole groups": ("int4", put(f"{MATRIX}.int4_codes", lambda a: a[:, 1:]), r"\[96, 31\], expected uint8 of a"),
    "infinite scale": ("int8", put(SCALES, with_number(np.inf)), "scales or offsets that are not finite"),
    "no number": ("int4", put(f"{MATRIX}.int4_offsets", with_number(np.nan)), "scales or offsets that are not finite"),
    "a matrix in 8 bits among 4": (
        "int4",
        lambda tensors: tensors.update(replaced_by_rows(tensors)),
        "storage: model.decoder.layers.1.fc1.weight is int8, expected int4",
    ),
    "positions in 8 bits": (
        "int8",
        lambda tensors: tensors.update(positions_in_rows(tensors)),
        "storage: model.decoder.embed_positions.weight is int8, expected unquantised",
    ),
    "a matrix of numbers": (
        "int8",
        lambda tensors: tensors.update({MATRIX: tensors.pop(CODES) * tensors.pop(SCALES)[:, None]}),
        "storage: model.decoder.layers.1.fc1.weight is unquantised, expected int8",
    ),
}


def replaced_by_rows(tensors):
    parts = [tensors.pop(f"{MATRIX}.int4_{part}") for part in ("codes", "scales", "offsets")]
    weight = quantization.dequantize(parts, (96, 64))
    return dict(zip((CODES, SCALES), quantization.quantize_rows(weight), strict=True))


def positions_in_rows(tensors):
    name = "model.decoder.embed_positions.weight"
    codes, scales = quantization.quantize_rows(tensors.pop(name))
    return {f"{name}.int8_codes": codes, f"{name}.int8_scales": scales}


@pytest.mark.parametrize(("scheme", "change", "sentence"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_sentence(rounded, tmp_path, scheme, change, sentence):
    with pytest.raises(CheckpointError, match=sentence), loaded(edited(rounded / scheme, tmp_path / "model", change)):
        pass


@contextlib.contextmanager
def loaded(directory: Path):
    """What a backend does with a checkpoint before it has its parts."""
    from conversion import checked_parameters

    with open_checkpoint(directory) as checkpoint:
        checked_parameters(checkpoint, parameter_table(checkpoint.config))
        yield [checkpoint.stored(name) for name in checkpoint.names if checkpoint.storage_of(name) is not None]


def test_damage_reaches_the_user_of_a_framework_as_the_same_sentence(backend, rounded, tmp_path):
    bad = edited(rounded / "int8-dynamic", tmp_path / "model", put(SCALES, with_number(np.nan)))
    with pytest.raises(CheckpointError, match=r"fc1.weight has scales or offsets that are not finite"):
        backend.load(bad)
    assert "not-finite" in {finding.state for finding in doctor(bad).findings}
    assert not verify(bad).holds


def test_the_layout_is_the_documented_one():
    (matrix,) = [parameter for parameter in parameter_table(SMALL) if parameter.name == MATRIX]
    parts = {part.name: (part.dtype.name, part.shape) for part in stored_parts(matrix, "int4")}
    assert parts == {
        f"{MATRIX}.int4_codes": ("uint8", (96, 32)),
        f"{MATRIX}.int4_scales": ("bfloat16", (96, 2)),
        f"{MATRIX}.int4_offsets": ("bfloat16", (96, 2)),
    }
    codes = np.arange(16, dtype=np.uint8).reshape(1, 16)
    assert quantization.pack(codes)[0, :2].tolist() == [0x10, 0x32]
    assert (quantization.unpack(quantization.pack(codes)) == codes).all()
    names = [row.name for row in stored_table(parameter_table(SMALL), "int4")]
    assert names[:2] == [f"model.decoder.embed_tokens.weight.int8_{part}" for part in ("codes", "scales")]
    assert "model.decoder.layers.0.fc1.bias" in names
