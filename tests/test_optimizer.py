"""AdamW's state travels: a model half trained in one framework is finished in another, as if nothing had happened."""

import functools
import importlib
import json

import numpy as np
import pytest
import safetensors.numpy

from opt_common.adamw import MOMENTS, adamw_step, trained_table
from opt_common.errors import CheckpointError, ConfigError
from opt_common.lora import LoraConfig
from tests.cases import config_of, expected, inputs_of
from tests.paths import GOLDENS
from tests.tolerances import FLOAT64_GRADIENT, compare

# Epsilon is large, so that a step shows where it is added; the rate is a number of float32, which Keras keeps it in.
SETTINGS = {"learning_rate": 2**-7, "beta_1": 0.9, "beta_2": 0.95, "epsilon": 1e-2, "weight_decay": 0.1}
VARIANT = "post_ln_proj"
N = 2


def batches():
    """Two different batches, for the steps in turn."""
    groups = (expected(VARIANT)[group] for group in ("rightpad", "leftpad"))
    return [inputs_of(group, labels=True) for group in groups] * N


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint without dropout."""
    from conversion import open_checkpoint, save_checkpoint
    from opt_common.params import parameter_table

    directory = tmp_path_factory.mktemp("source")
    config = config_of(VARIANT).replace(dropout=0.0, attention_dropout=0.0, layerdrop=0.0)
    with open_checkpoint(GOLDENS / VARIANT / "safetensors") as checkpoint:
        save_checkpoint(directory, config, parameter_table(config), lambda row: checkpoint.read(row.name))
    return directory


def module_of(backend):
    """The module with `save_optimizer`."""
    return importlib.import_module(f"{backend.package.__name__}.optimizer")


def optimized(backend, directory):
    """A model in float64 and a new optimizer of it."""
    model = backend.load(directory, dtype="float64")
    return model, backend.adamw(model, SETTINGS)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """What a framework has after N steps, written by it, and what its parameters are after 2N without a break."""

    @functools.cache
    def find(backend):
        directory = tmp_path_factory.mktemp(backend.name)
        model, optimizer = optimized(backend, source)
        backend.steps(model, optimizer, batches()[:N])
        with backend.scope(model):
            model.save_pretrained(directory)
            module_of(backend).save_optimizer(directory, model, optimizer)
        backend.steps(model, optimizer, batches()[N:])
        return directory, {name: values.copy() for name, values in backend.parameters(model).items()}

    return find


def test_half_in_one_framework_and_half_in_another_is_all_in_either(backends, trained):
    """Every ordered pair, and a framework with itself."""
    for first in backends:
        for second in backends:
            directory, unbroken = trained(first)
            model, optimizer = optimized(second, directory)
            with second.scope(model):
                state = module_of(second).load_optimizer(directory, model, optimizer)
            assert state.step == N
            second.steps(model, optimizer, batches()[N:])
            for name, values in second.parameters(model).items():
                what = f"{name}, {first.name} then {second.name}"
                compare(values, unbroken[name], FLOAT64_GRADIENT, what=what)
                compare(values, trained(second)[1][name], FLOAT64_GRADIENT, what=what)


def test_a_step_is_the_rule(backend, source):
    """Each framework's optimizer, with the arguments that `opt_common.adamw` says, computes the rule."""
    model, optimizer = optimized(backend, source)
    rule = {name: values.copy() for name, values in backend.parameters(model).items()}
    moments = {name: (np.zeros_like(values), np.zeros_like(values)) for name, values in rule.items()}
    for step, batch in enumerate(batches()[:3], start=1):
        gradients = backend.gradients(model, **batch)
        backend.steps(model, optimizer, [batch])
        for name, gradient in gradients.items():
            rule[name], moments[name] = adamw_step(rule[name], gradient, moments[name], step, **SETTINGS)
    for name, values in backend.parameters(model).items():
        compare(values, rule[name], FLOAT64_GRADIENT, what=name)


def test_the_file_has_pytorch_s_words_and_canonical_names(backend, trained):
    directory, _ = trained(backend)
    path = directory / "optimizer.safetensors"
    model = backend.load(directory, dtype="float64")
    names = [parameter.name for parameter in trained_table(model.config, None, "lm")]
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {f"{moment}.{name}" for moment in MOMENTS for name in names}
        metadata = file.metadata()
    assert (metadata["optimizer"], metadata["step"]) == ("AdamW", str(N))
    for group in json.loads(metadata["groups"]):
        assert set(group.pop("names")) == set(names)
        assert group == SETTINGS
    assert (backend.name == "flax") == (metadata["groups"] == "[]")


def test_an_adapter_s_training_travels_too(backends, source, tmp_path):
    """Only the adapter is in the file, and its optimizer goes on in another framework."""
    first, second = backends[0], backends[-1]
    models = [backend.load(source, dtype="float64") for backend in (first, second)]
    with first.scope(models[0]):
        models[0].add_lora(LoraConfig(r=2, target_modules=["q_proj", "fc2"], bias="lora_only"))
    optimizer = first.adamw(models[0], SETTINGS)
    first.steps(models[0], optimizer, batches()[:N])
    with first.scope(models[0]):
        models[0].save_adapter(tmp_path)
        module_of(first).save_optimizer(tmp_path, models[0], optimizer)
    with second.scope(models[1]):
        models[1].load_adapter(tmp_path)
        optimizers = optimizer, second.adamw(models[1], SETTINGS)
        module_of(second).load_optimizer(tmp_path, models[1], optimizers[1])
    for backend, model, optimizer in zip((first, second), models, optimizers, strict=True):
        backend.steps(model, optimizer, batches()[N:])
    for parameter in trained_table(models[0].config, models[0].lora_config, "lm"):
        values = [backend.get(model, parameter) for backend, model in zip((first, second), models, strict=True)]
        compare(*values, FLOAT64_GRADIENT, what=parameter.name)


def test_what_does_not_fit_is_refused(backend, source, trained, tmp_path):
    directory, _ = trained(backend)
    module = module_of(backend)
    model, optimizer = optimized(backend, source)
    with pytest.raises(CheckpointError, match="There is no"):
        module.load_optimizer(tmp_path, model, optimizer)
    adapted = backend.load(source, dtype="float64")
    with backend.scope(adapted):
        adapted.add_lora(LoraConfig())
        with pytest.raises(ConfigError, match="just the parameters that train"):
            module.save_optimizer(tmp_path, adapted, optimizer)
        with pytest.raises(CheckpointError, match="does not fit what trains"):
            module.load_optimizer(directory, adapted, backend.adamw(adapted, SETTINGS))
    for change, message in (({"optimizer": "Lion"}, "no state of AdamW"), ({"step": "-1"}, "no optimizer took")):
        with safetensors.safe_open(directory / "optimizer.safetensors", "np") as file:
            metadata = {**file.metadata(), **change}
        tensors = safetensors.numpy.load_file(directory / "optimizer.safetensors")
        safetensors.numpy.save_file(tensors, tmp_path / "optimizer.safetensors", metadata)
        with pytest.raises(CheckpointError, match=message):
            module.load_optimizer(tmp_path, model, optimizer)


def test_an_optimizer_that_took_no_step_travels(backend, source, tmp_path):
    model, optimizer = optimized(backend, source)
    with backend.scope(model):
        module_of(backend).save_optimizer(tmp_path, model, optimizer)
        assert module_of(backend).load_optimizer(tmp_path, model, optimizer).step == 0
    backend.steps(model, optimizer, batches()[:1])
    again, optimizer = optimized(backend, source)
    backend.steps(again, optimizer, batches()[:1])
    for name, values in backend.parameters(again).items():
        assert np.array_equal(values, backend.parameters(model)[name]), name
