"""A user's mistake gets one clear sentence, the same in every backend, before anything is computed."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.numpy

from opt_common.errors import CheckpointError, ConfigError, GenerationError, InputError, OPTError
from tests.adapters import BACKENDS
from tests.cases import config_of
from tests.paths import GOLDENS, ROOT

IDS = np.array([[5, 6, 7]])


@pytest.fixture
def model(backend, load):
    return load(backend, "pre_ln")


@pytest.mark.parametrize("bad", [512, 50272, -1, -100])
def test_an_id_out_of_range(backend, model, bad):
    with pytest.raises(InputError, match=f"input_ids has the value {bad}, expected values from 0 to 511"):
        backend.forward(model, checked=True, input_ids=np.array([[5, bad, 6]]))
    with pytest.raises(InputError, match=f"input_ids has the value {bad}"):
        backend.generate(model, np.array([[5, bad]]), max_new_tokens=1)


def test_an_input_that_is_too_long(backend, model):
    """transformers 5.23 says `IndexError: index out of range in self`; look-ups in JAX clamp in silence."""
    limit = config_of("pre_ln").max_position_embeddings
    with pytest.raises(InputError, match=f"{limit + 1} tokens long.*positions for {limit}"):
        backend.forward(model, checked=True, input_ids=np.full((1, limit + 1), 5))


def test_padding_does_not_count_as_length(backend, model):
    limit = config_of("pre_ln").max_position_embeddings
    mask = np.ones((1, limit + 1), np.int64)
    mask[0, 0] = 0
    found = backend.forward(model, checked=True, input_ids=np.full((1, limit + 1), 5), attention_mask=mask)
    assert np.isfinite(found.logits).all()


@pytest.mark.parametrize("bad", [-2, 64])
def test_a_position_out_of_range(backend, model, bad):
    with pytest.raises(InputError, match=f"position_ids has the value {bad}, expected values from -1 to 63"):
        backend.forward(model, checked=True, input_ids=IDS, position_ids=np.array([[0, bad, 1]]))


@pytest.mark.parametrize("bad", [512, -1])
def test_a_label_out_of_range(backend, model, bad):
    with pytest.raises(InputError, match=f"labels has the value {bad}"):
        backend.forward(model, checked=True, input_ids=IDS, labels=np.array([[5, bad, -100]]))


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_an_empty_prompt(backend, model, shape):
    with pytest.raises(InputError, match="input is empty"):
        backend.forward(model, checked=True, input_ids=np.zeros(shape, np.int64))
    with pytest.raises(InputError, match="input is empty"):
        backend.generate(model, np.zeros(shape, np.int64), max_new_tokens=1)


def test_a_prompt_of_padding_only(backend, model):
    with pytest.raises(GenerationError, match="Prompt 1 is empty"):
        backend.generate(model, [[5, 6], [1, 1]], [[1, 1], [0, 0]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "either input_ids or inputs_embeds, got neither"),
        ({"input_ids": IDS, "inputs_embeds": np.zeros((1, 3, 32), np.float32)}, "got both"),
        ({"input_ids": IDS[0]}, r"input_ids has shape \(3,\)"),
        ({"inputs_embeds": np.zeros((1, 3, 31), np.float32)}, r"expected \(batch, length, 32\)"),
        ({"input_ids": IDS, "attention_mask": np.ones((1, 4), np.int64)}, r"attention_mask has shape \(1, 4\)"),
        ({"input_ids": IDS, "attention_mask": np.array([[1, 2, 1]])}, "values other than 0 and 1"),
        ({"input_ids": IDS, "position_ids": np.ones((2, 3), np.int64)}, r"position_ids has shape \(2, 3\)"),
        ({"input_ids": IDS, "labels": np.ones((1, 2), np.int64)}, r"labels has shape \(1, 2\)"),
        ({"input_ids": IDS.astype(np.float32)}, "input_ids has dtype float32, expected integers"),
    ],
)
def test_arguments_that_do_not_fit(backend, model, arguments, told):
    with pytest.raises(InputError, match=told):
        backend.forward(model, checked=True, **arguments)


def test_all_problems_of_a_call_are_told_at_once(backend, model):
    with pytest.raises(InputError, match=r"(?s)position_ids has the value 99.*input_ids has the value 600"):
        backend.forward(model, checked=True, input_ids=np.array([[600]]), position_ids=np.array([[99]]))


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [("return_dict", False, "results are always records"), ("head_mask", np.ones((3, 4), np.float32), "v_proj")],
)
def test_a_dropped_argument_says_what_to_write_instead(backend, model, name, value, advice):
    with pytest.raises(InputError, match=f"{name}=.*{advice}"):
        backend.forward(model, checked=True, input_ids=IDS, **{name: value})


def test_a_typo_is_not_swallowed(backend, model):
    with pytest.raises(TypeError, match="atention_mask"):
        backend.forward(model, checked=True, input_ids=IDS, atention_mask=np.ones((1, 3), np.int64))
    with pytest.raises((GenerationError, TypeError), match="max_new_token"):
        backend.generate(model, IDS, max_new_token=1)


def test_results_are_read_by_name_and_by_number(backend, model):
    """transformers.Trainer reads `[0]` and `[1:]`. Unpacking is refused: Hugging Face's results give names then."""
    with backend.scope(model):
        output = model(input_ids=backend.tensor(IDS), labels=backend.tensor(IDS))
    assert output[0] is output["loss"] is output.loss
    assert output[1:] == (output.logits,)
    with pytest.raises(KeyError, match="past_key_values"):
        output["past_key_values"]
    with pytest.raises(InputError, match=r"read a field by its name.*logits"):
        _, _ = output


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_length": 3}, "no room"),
        ({"max_new_tokens": 1000}, "do not fit"),
        ({"eos_token_id": "x"}, "eos_token_id is .*'x'.*expected an id"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected True or False"),
    ],
)
def test_generation_settings_that_cannot_be(backend, model, settings, told):
    with pytest.raises(GenerationError, match=told):
        backend.generate(model, IDS, **settings)


def test_pad_tokens_without_a_mask_are_worth_a_warning(backend, model):
    """nnsight#673, unsloth#3795, alpaca-lora#315: padding was read as text, and nothing said so."""
    with pytest.warns(UserWarning, match="no attention_mask was given"):
        backend.generate(model, [[1, 5, 6]], max_new_tokens=1)


# Checkpoints


@pytest.fixture
def broken(tmp_path):
    """A checkpoint with a missing, an unexpected and a mis-shaped tensor."""
    tensors = safetensors.numpy.load_file(GOLDENS / "pre_ln" / "safetensors" / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.weight"]
    tensors["model.decoder.layers.9.fc1.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.decoder.layers.0.fc2.bias"] = np.zeros(7, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((GOLDENS / "pre_ln" / "config.json").read_text())
    return tmp_path


def test_one_error_names_every_missing_unexpected_and_mis_shaped_tensor(backend, broken):
    """transformers 5.23 loads a checkpoint without `layers.1.fc1.weight`, with random numbers and a line in the log."""
    with pytest.raises(CheckpointError) as caught:
        backend.load(broken)
    message = str(caught.value)
    assert "missing: model.decoder.layers.1.fc1.weight" in message
    assert "unexpected: model.decoder.layers.9.fc1.weight" in message
    assert "model.decoder.layers.0.fc2.bias is [7], expected [32]" in message


def test_a_pre_norm_checkpoint_without_its_final_norm_tells_the_story(backend, tmp_path):
    """metaseq#164: checkpoints of before June 2022 lack the norm, and once loaded into gibberish."""
    tensors = safetensors.numpy.load_file(GOLDENS / "pre_ln" / "safetensors" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "decoder.final_layer_norm" not in name}
    safetensors.numpy.save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((GOLDENS / "pre_ln" / "config.json").read_text())
    with pytest.raises(
        CheckpointError, match=r"(?s)missing: model\.decoder\.final_layer_norm\.weight.*_remove_final_layer_norm"
    ):
        backend.load(tmp_path)


def test_a_wrong_directory(backend, tmp_path):
    with pytest.raises(CheckpointError, match=r"No config\.json"):
        backend.load(tmp_path)
    with pytest.raises(OPTError, match="no/such/directory"):
        backend.load(tmp_path / "no/such/directory")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="No weights in"):
        backend.load(tmp_path)


def test_another_model_s_directory(backend, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="'gpt2'"):
        backend.load(tmp_path)


def test_a_dtype_no_model_has(backend):
    with pytest.raises(CheckpointError, match="dtype is 'int8'"):
        backend.lm.from_pretrained(GOLDENS / "pre_ln" / "safetensors", dtype="int8")


def test_half_precision_is_not_given_unasked(backend):
    with pytest.warns(UserWarning, match="stored in float16; the model is loaded in float32"):
        model = backend.lm.from_pretrained(GOLDENS / "pre_ln" / "safetensors_fp16")
    assert all(value.dtype == np.float32 for value in backend.parameters(model).values())


def test_auto_is_the_stored_dtype(backend):
    model = backend.lm.from_pretrained(GOLDENS / "pre_ln" / "safetensors_bf16", dtype="auto")
    assert {
        str(backend.parameter(model, parameter).dtype).removeprefix("torch.") for parameter in backend.table(model)
    } == {"bfloat16"}


# Frameworks

MODULES = {"torch": "torch", "tf": "tensorflow", "flax": "jax"}
CLASSES = {"torch": "OPTForCausalLM", "tf": "TFOPTForCausalLM", "flax": "FlaxOPTForCausalLM"}
NAMES = {"torch": "PyTorch", "tf": "TensorFlow", "flax": "JAX"}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_framework_that_is_not_installed(name):
    """Blocked in a process of its own: the sentence says what is missing and how to install it."""
    program = f"""
        import sys
        sys.modules["{MODULES[name]}"] = None
        try:
            from opt_{name} import {CLASSES[name]}
        except ImportError as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("MissingFrameworkError ")
    assert NAMES[name] in done.stdout
    assert f"opt-models[{name}]" in done.stdout
