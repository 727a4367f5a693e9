"""LoRA adapters: PEFT's own files and numbers, what trains, merging, files that pass between the frameworks."""

import functools
import importlib
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from conversion.adapter import checked_adapter, open_adapter, save_adapter
from opt_common.errors import CheckpointError, ConfigError
from opt_common.lora import LoraConfig, adapter_table, resolve_lora
from opt_common.params import parameter_table
from tests.cases import config_of, expected, inputs_of
from tests.paths import GOLDENS
from tests.tolerances import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, FLOAT64_GRADIENT, compare

CLASSIFIER, ANSWERER = "sequence_classification", "question_answering"
CASES = {
    "plain": ("pre_ln", "lm"),
    "patterns": ("post_ln_proj", "lm"),
    "layers": ("gelu", "lm"),
    "regex": ("untied", "lm"),
    "seqcls": ("pre_ln", CLASSIFIER),
    "qa": ("post_ln_proj", ANSWERER),
}
"""Golden adapter -> the variant that it is for, and the head."""

OUTPUTS = ("logits", "start_logits", "end_logits")


@functools.cache
def golden(case):
    """What PEFT computes with a golden adapter."""
    with np.load(GOLDENS / "lora" / case / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def base_model(backend, case, dtype="float32"):
    """The model that a golden adapter is for. Its own head, where it has one, is in the adapter."""
    variant, head = CASES[case]
    options = {} if head == "lm" else {"new_head": True}
    if head == CLASSIFIER:
        options["num_labels"] = 3
    path = GOLDENS / variant / "safetensors"
    return backend.load(path, dtype=dtype, head=None if head == "lm" else head, **options)


def with_adapter(backend, case, dtype="float32"):
    """The same with the adapter."""
    model = base_model(backend, case, dtype)
    with backend.scope(model):
        model.load_adapter(GOLDENS / "lora" / case)
    return model


def table_of(model):
    """What the adapter of a model consists of."""
    return adapter_table(model.config, model.lora_config, model.head)


def numbers(backend, model):
    """Every tensor of a model's adapter: PEFT's name -> values."""
    table = table_of(model)
    return {table.stored_name(parameter): backend.get(model, parameter) for parameter in table.parameters}


def copied(backend, model):
    """All parameters of the base model, as they are now: some backends show their own memory."""
    return {name: values.copy() for name, values in backend.parameters(model).items()}


def outputs(backend, model, case):
    """A model's results for the golden batch."""
    found = backend.forward(model, input_ids=golden(case)["input_ids"], attention_mask=golden(case)["attention_mask"])
    return {name: getattr(found, name) for name in OUTPUTS if name in golden(case)}


def compare_outputs(found, wanted, case, tolerance):
    for name, values in found.items():
        attended = None if CASES[case][1] == CLASSIFIER else golden(case)["attention_mask"]
        compare(values, wanted[name], tolerance, what=f"{case} {name}", attended=attended)


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft_compute_what_peft_computes_merged_or_not(backend, case, tmp_path):
    model = with_adapter(backend, case)
    adapted = outputs(backend, model, case)
    compare_outputs(adapted, golden(case), case, FLOAT32)
    assert numbers(backend, model).keys() == stored(case).keys()

    before = copied(backend, model)
    model.merge_adapter()
    adapted_layer = table_of(model).layers[0].weight.name
    assert not np.array_equal(before[adapted_layer], backend.parameters(model)[adapted_layer])
    compare_outputs(outputs(backend, model, case), golden(case), case, FLOAT32)
    model.unmerge_adapter()
    after = backend.parameters(model)
    assert all(np.array_equal(before[name], after[name]) for name in before), "unmerging gives the same bits"
    compare_outputs(outputs(backend, model, case), adapted, case, FLOAT32)

    model.merge_and_unload()
    merged = backend.parameters(model)
    assert backend.count(model) == sum(parameter.size for parameter in backend.table(model))
    for name, values in golden(case).items():
        if name.startswith("weights/"):
            compare(merged[name.removeprefix("weights/")], values, FLOAT32, what=name)
    model.save_pretrained(tmp_path / "merged")
    saved = backend.load(tmp_path / "merged", head=None if CASES[case][1] == "lm" else CASES[case][1])
    compare_outputs(outputs(backend, saved, case), golden(case), case, FLOAT32)


def file_of(directory):
    """The weights of an adapter."""
    return directory / "adapter_model.safetensors"


def stored(case):
    """The tensors of a golden adapter, but for the copy of its base weight that PEFT puts beside an adapted head's."""
    tensors = safetensors.numpy.load_file(file_of(GOLDENS / "lora" / case))
    return {name: array for name, array in tensors.items() if not name.endswith("base_layer.weight")}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_passes_between_frameworks_bit_for_bit(backend, case, tmp_path):
    """Each writes the tensors of PEFT's file, whichever framework reads them next; the file is always the same."""
    source = GOLDENS / "lora" / case
    with_adapter(backend, case).save_adapter(tmp_path / "adapter")
    theirs, ours = stored(case), safetensors.numpy.load_file(file_of(tmp_path / "adapter"))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)
    with safetensors.safe_open(file_of(tmp_path / "adapter"), "np") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name, value in json.loads((source / "adapter_config.json").read_text()).items():
        if name in config:
            assert config[name] == value, name


def test_only_the_adapter_trains_and_a_new_one_changes_nothing(backend, load):
    model = backend.load(GOLDENS / "pre_ln" / "safetensors")
    group = inputs_of(expected("pre_ln")["leftpad"])
    before, weights = backend.forward(model, **group).logits, copied(backend, model)
    model.add_lora(LoraConfig(r=5, lora_alpha=10, bias="lora_only", target_modules=["fc1", "q_proj"]))
    assert np.array_equal(backend.forward(model, **group).logits, before)
    table = table_of(model)
    assert backend.count(model) == sum(parameter.size for parameter in table.parameters)
    for layer in table.layers:
        a, b = (backend.get(model, matrix) for matrix in layer.matrices)
        bound = 1 / np.sqrt(layer.weight.shape[1])
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert abs(a.mean()) < 0.2 * bound
        assert not b.any()
    firsts = [backend.get(model, layer.matrices[0]) for layer in table.layers[:2]]
    assert not np.array_equal(*firsts), "two layers start alike"

    labels = {**group, "labels": expected("pre_ln")["leftpad"]["labels"]}
    first = backend.forward(model, **labels).loss
    for _ in range(3):
        gradients = backend.gradients(model, table.parameters, **labels)
        for parameter in table.parameters:
            step = backend.get(model, parameter) - 0.2 * gradients[parameter.name]
            backend.set(model, parameter, step.astype(np.float32))
    assert backend.forward(model, **labels).loss < first - 0.05
    after = backend.parameters(model)
    trained = {parameter.name for parameter in table.others}
    assert {name for name in weights if not np.array_equal(weights[name], after[name])} == trained


@pytest.mark.parametrize("case", ["patterns", "regex"])
def test_float64_gradients_of_an_adapter_agree_between_backends(backends, case):
    found = []
    for backend in backends:
        model = with_adapter(backend, case, "float64")
        group = expected(CASES[case][0])["padtok"]
        table = table_of(model)
        arguments = inputs_of(group, labels=True)
        found.append(backend.gradients(model, table.parameters, **arguments))
        assert {values.dtype for values in found[-1].values()} == {np.dtype("float64")}
        assert all(values.any() for values in found[-1].values())
    for other in found[1:]:
        for name, gradient in found[0].items():
            compare(other[name], gradient, FLOAT64_GRADIENT, what=name)


def test_float64_adapters_are_their_definition(backend):
    """The layer's output is the output of weights to which scaling * B A has been added."""
    model = with_adapter(backend, "patterns", "float64")
    found = outputs(backend, model, "patterns")
    table, values = table_of(model), backend.parameters(model)
    for layer in table.layers:
        a, b = (backend.get(model, matrix) for matrix in layer.matrices)
        values[layer.weight.name] = values[layer.weight.name] + layer.scaling * b @ a
    plain = base_model(backend, "patterns", "float64")
    for parameter in parameter_table(plain.config):
        backend.set(plain, parameter, values[parameter.name])
    compare_outputs(found, outputs(backend, plain, "patterns"), "patterns", FLOAT64)
    scalings = {layer.module.removeprefix("model.decoder."): layer.scaling for layer in table.layers}
    assert scalings["layers.0.self_attn.q_proj"] == 4.0
    assert scalings["layers.1.fc1"] == 4 / np.sqrt(3)
    assert scalings["project_in"] == 6 / np.sqrt(2)


def test_generation_follows_the_adapter_as_it_comes_and_goes(backend):
    """What was compiled for the model before is not used for the model after."""
    prompt = expected("pre_ln")["nopad"]["input_ids"][:1, :5]
    model = base_model(backend, "plain")
    options = {"max_new_tokens": 1, "do_sample": False}
    bare = backend.generate(model, prompt, **options)
    model.load_adapter(GOLDENS / "lora" / "plain")
    adapted = backend.generate(model, prompt, **options)
    assert not np.array_equal(bare, adapted)
    model.merge_adapter()
    assert np.array_equal(backend.generate(model, prompt, **options), adapted)
    model.unmerge_adapter()
    assert np.array_equal(backend.generate(model, prompt, **options), adapted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_on_a_half_precision_model_is_in_float32_and_its_loss_is_finite(backend, dtype):
    """Row 18 of what users reported: peft#236, peft#350 and peft#1522, NaN and zero losses of question answering."""
    model = with_adapter(backend, "qa", dtype)
    group = golden("qa")
    ends = {f"{end}_positions": np.array([3, 1]) for end in ("start", "end")}
    arguments = {"input_ids": group["input_ids"], "attention_mask": group["attention_mask"], **ends}
    loss = backend.forward(model, **arguments).loss
    assert np.isfinite(loss)
    assert loss > 0
    table = table_of(model)
    for layer in table.layers:
        for matrix in layer.matrices:
            assert str(backend.parameter(model, matrix).dtype).endswith("float32")
    tolerance = {"float16": FLOAT16, "bfloat16": BFLOAT16}[dtype]
    for name, values in outputs(backend, model, "qa").items():
        compare(values, group[name], tolerance, what=name, attended=group["attention_mask"])
    gradients = backend.gradients(model, tuple(m for layer in table.layers for m in layer.matrices), **arguments)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_dropout_of_an_adapter_is_in_training_only(backend):
    model = with_adapter(backend, "plain")
    assert model.lora_config.lora_dropout == 0.1
    arguments = {name: golden("plain")[name] for name in ("input_ids", "attention_mask")}
    still = backend.forward(model, **arguments).logits
    assert np.array_equal(backend.forward(model, **arguments).logits, still)
    assert np.abs(backend.forward(model, training=True, **arguments).logits - still).max() > 1e-3


def test_a_model_has_one_adapter_and_its_checkpoint_is_never_without_it(backend, tmp_path):
    model = with_adapter(backend, "plain")
    with pytest.raises(ConfigError, match="it can have one"):
        model.add_lora(LoraConfig())
    with pytest.raises(ConfigError, match="it can have one"):
        model.load_adapter(GOLDENS / "lora" / "plain")
    with pytest.raises(CheckpointError, match="save_pretrained does not write"):
        model.save_pretrained(tmp_path / "model")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "model")
    assert np.array_equal(
        backend.get(model, table_of(model).layers[0].weight),
        backend.get(backend.load(tmp_path / "model"), table_of(model).layers[0].weight),
    )
    plain = base_model(backend, "plain")
    for name in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        with pytest.raises(ConfigError, match="has no adapter"):
            getattr(plain, name)()
    with pytest.raises(ConfigError, match="has no adapter"):
        plain.save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_new_adapters_start_as_asked(backend, init):
    model = backend.build(config_of("pre_ln"))
    model.add_lora(LoraConfig(r=16, target_modules="all-linear", init_lora_weights=init))
    matrices = [layer.matrices for layer in table_of(model).layers]
    a, b = (np.concatenate([backend.get(model, pair[index]).ravel() for pair in matrices]) for index in (0, 1))
    assert b.any() == (init is False)
    if init == "gaussian":
        assert abs(a.std() - 1 / 16) < 0.002
    elif init is False:
        assert abs(np.abs(b).max() - 1 / 4) < 0.01


# Without any framework


def test_what_the_defaults_and_all_linear_mean():
    config = config_of("post_ln_proj")
    lora = resolve_lora(config, LoraConfig(), "lm")
    assert (lora.target_modules, lora.task_type, lora.modules_to_save) == (("q_proj", "v_proj"), "CAUSAL_LM", None)
    assert len(adapter_table(config, lora, "lm").layers) == 2 * config.num_hidden_layers
    lora = resolve_lora(config, LoraConfig(target_modules="all-linear"), CLASSIFIER)
    table = adapter_table(config, lora, CLASSIFIER)
    assert len(table.layers) == 6 * config.num_hidden_layers + 2
    assert [parameter.name for parameter in table.others] == ["score.weight"]
    assert resolve_lora(config, LoraConfig(task_type="FEATURE_EXTRACTION"), CLASSIFIER).modules_to_save is None


def test_a_model_in_few_bits_takes_no_adapter():
    with pytest.raises(ConfigError, match=r"in few bits \(int8\)"):
        resolve_lora(config_of("pre_ln").replace(quantization="int8"), LoraConfig(), "lm")


UNSUPPORTED = {
    "use_dora": True,
    "lora_bias": True,
    "layer_replication": [[0, 2], [1, 3]],
    "trainable_token_indices": [1],
    "target_parameters": ["weight"],
    "use_qalora": True,
    "fan_in_fan_out": True,
    "megatron_config": {"x": 1},
    "alora_invocation_tokens": [1],
    "a_setting_of_tomorrow": "on",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, name):
    path = tmp_path / "adapter_config.json"
    source = json.loads((GOLDENS / "lora" / "plain" / "adapter_config.json").read_text())
    path.write_text(json.dumps({**source, name: UNSUPPORTED[name]}))
    with pytest.raises(ConfigError, match=name):
        LoraConfig.from_json_file(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "rank of r is 0"),
        ({"rank_pattern": {"fc1": 1.5}}, "rank of fc1 is 1.5"),
        ({"lora_alpha": float("nan")}, "alpha of lora_alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "regular expression can say"),
        ({"layers_pattern": "layers"}, "layers_pattern says where"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ["q_prj"]}, "q_prj, which this model has no linear layer of"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens, which this model has no"),
        ({"target_modules": ["lm_head"]}, "lm_head, which this model has no"),
        ({"target_modules": "nothing"}, "leaves no linear layer"),
        ({"layers_to_transform": [7]}, "leaves no linear layer"),
        ({"modules_to_save": ["embed_tokens"]}, "one tensor here"),
        ({"modules_to_save": ["pooler"]}, "pooler, which is no layer"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        resolve_lora(config_of("pre_ln"), LoraConfig(**values), "lm")


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    shutil.copytree(GOLDENS / "lora" / "plain", tmp_path / "adapter")
    tensors = safetensors.numpy.load_file(file_of(tmp_path / "adapter"))
    first, second, third, *_ = sorted(tensors)
    tensors["other"] = tensors.pop(first)
    tensors[second] = tensors[second][:, :2].copy()
    tensors[third] = tensors[third].astype(np.int32)
    safetensors.numpy.save_file(tensors, file_of(tmp_path / "adapter"))
    with open_adapter(tmp_path / "adapter") as adapter, pytest.raises(CheckpointError) as error:
        checked_adapter(adapter, config_of("pre_ln"), "lm")
    for part in (f"missing: {first}", "unexpected: other", f"shape: {second}", f"dtype: {third}"):
        assert part in str(error.value)


def test_absent_and_damaged_adapters_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="There is no"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        open_adapter(tmp_path)
    for text in ("[1]", "{", "\xff"):
        (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match="Fetch it again"):
            open_adapter(tmp_path)


def test_adapters_of_older_peft_read(tmp_path):
    """Until 2023 the weights were in a torch file; `base_layer` was missing from the names of biases."""
    torch_file = importlib.import_module("conversion.formats.torch_file")
    tensors = importlib.import_module("conversion.tensors")
    source = GOLDENS / "lora" / "layers"
    found = safetensors.numpy.load_file(file_of(source))
    older = {name.replace(".base_layer.", "."): array for name, array in found.items()}
    assert older.keys() != found.keys()
    specs = [
        tensors.TensorSpec(name=name, info=tensors.TensorInfo(array.dtype, array.shape))
        for name, array in older.items()
    ]
    torch_file.write(tmp_path / "adapter_model.bin", specs, older.__getitem__)
    shutil.copy(source / "adapter_config.json", tmp_path)
    with open_adapter(tmp_path) as adapter:
        table, names = checked_adapter(adapter, config_of("gelu"), "lm")
        for parameter, name in names.items():
            assert np.array_equal(adapter.read(name), found[table.stored_name(parameter)])


def test_a_write_that_fails_leaves_the_adapter_that_was_there(tmp_path):
    with open_adapter(GOLDENS / "lora" / "plain") as adapter:
        table, names = checked_adapter(adapter, config_of("pre_ln"), "lm")
        lora = adapter.lora
        save_adapter(tmp_path / "adapter", lora, table, lambda parameter: adapter.read(names[parameter]))
        before = file_of(tmp_path / "adapter").read_bytes()

        def fail(parameter):
            if parameter == table.parameters[-1]:
                raise OSError("no space left")
            return adapter.read(names[parameter])

        with pytest.raises(OSError, match="no space"):
            save_adapter(tmp_path / "adapter", lora, table, fail)
    assert file_of(tmp_path / "adapter").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
