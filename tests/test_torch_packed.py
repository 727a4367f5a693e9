"""Matrices in oneDNN's order: the same numbers, and the same model to whatever moves, copies, saves or loads it."""

import copy
import io

import pytest

from opt_common import ConfigError, LoraConfig
from tests.adapters import BACKENDS
from tests.paths import GOLDENS
from tests.tolerances import FLOAT32

if "torch" not in BACKENDS:
    pytest.skip("the PyTorch backend is not under test", allow_module_level=True)

import torch

from opt_torch import OPTForCausalLM, native
from opt_torch.native import HAS_ONEDNN
from opt_torch.packed import PackedLinear, pack

if not HAS_ONEDNN:
    pytest.skip("this PyTorch is built without oneDNN", allow_module_level=True)

IDS = torch.arange(4, 11)[None]
CASES = ("pre_ln", "post_ln_proj", "no_bias_no_affine", "untied")


def load(case="pre_ln", dtype=torch.float32):
    return OPTForCausalLM.from_pretrained(GOLDENS / case / "safetensors", dtype=dtype)


def packed(case="pre_ln", dtype=torch.float32):
    model = load(case, dtype)
    pack(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=FLOAT32.relative, atol=FLOAT32.absolute)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_same(case):
    model = packed(case)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    config = model.config
    assert len(layers) == 6 * config.num_hidden_layers + 2 * config.has_projection + 1
    assert all(layer.matrix.is_mkldnn for layer in layers)
    assert_same(logits(model), logits(load(case)))


def test_half_precision_is_as_near_to_the_truth_as_before():
    truth = logits(load())
    models = (load(dtype=torch.bfloat16), packed(dtype=torch.bfloat16))
    before, after = ((logits(model) - truth).abs().max() for model in models)
    assert 0 < after <= 2 * before


def test_what_was_packed_is_what_is_read():
    """The checks above can fail."""
    model = packed()
    layer = model.model.decoder.layers[0].fc1
    layer.matrix = torch.ops.mkldnn._reorder_linear_weight(layer.weight + 1)
    assert not torch.allclose(logits(model), logits(load()), atol=1e-2)


def test_text_is_the_same():
    batch = torch.arange(4, 24).view(4, 5)
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    before, after = (model.generate(batch, mask, max_new_tokens=12) for model in (load(), packed()))
    assert torch.equal(before, after)


def test_it_trains_no_more():
    model = packed()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(IDS, labels=IDS).loss.requires_grad


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_goes_in_and_out(case, monkeypatch):
    # Both are to add up in one order.
    monkeypatch.setattr(native, "PRODUCT", None)
    model, plain = packed(case), load(case)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(plain.state_dict())
    assert_same(logits(model), logits(plain))


def test_a_state_dict_that_does_not_fit_is_refused():
    model = packed()
    tensors = model.state_dict()
    name = "model.decoder.layers.0.fc1.weight"
    with pytest.raises(RuntimeError, match=f"{name} has the shape .*, expected"):
        model.load_state_dict({**tensors, name: tensors[name][:-1]})
    del tensors[name]
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        model.load_state_dict(tensors)


def test_it_is_saved_as_it_was_loaded(tmp_path):
    packed().save_pretrained(tmp_path / "packed")
    load().save_pretrained(tmp_path / "plain")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "plain")]
    assert written[0] == written[1]


def test_copies_and_pickles_are_the_same():
    model = packed()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert all(module.matrix.is_mkldnn for module in other.modules() if isinstance(module, PackedLinear))
        assert_same(logits(other), logits(model))


def test_casts_keep_it_packed_where_that_gains():
    model = packed().to(torch.float64)
    assert not any(module.matrix.is_mkldnn for module in model.modules() if isinstance(module, PackedLinear))
    assert_same(logits(model), logits(load()))
    model.to(torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert model.lm_head.weight.dtype is torch.bfloat16


def test_layers_that_gain_nothing_stay():
    for dtype in (torch.float64, torch.float16):
        model = packed(dtype=dtype)
        assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_an_adapter_trains_on_it_and_is_not_merged():
    losses = []
    for model in (packed(), load()):
        torch.manual_seed(0)
        model.add_lora(LoraConfig(r=2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append({name: parameter.grad for name, parameter in model.named_parameters() if "lora" in name})
    assert losses[0].keys() == losses[1].keys()
    for name, gradient in losses[0].items():
        assert_same(gradient, losses[1][name])
    model = packed()
    model.add_lora(LoraConfig(r=2))
    with pytest.raises(ConfigError, match="packed base weights can't take an adapter"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="adapter"):
        pack(model)


def test_a_compiler_goes_around_it():
    model = packed()
    compiled = torch.compile(model, backend="eager")
    assert_same(logits(compiled), logits(model))


def test_keys_and_values_are_kept_in_float32_on_a_cpu():
    """Attention of one token is several times as fast then, and no less exact."""
    model = load(dtype=torch.bfloat16)
    result = model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, use_cache=True)
    assert {part.dtype for part in result.past_key_values.keys} == {torch.float32}
    assert model(IDS).past_key_values.keys[0].dtype is torch.bfloat16
