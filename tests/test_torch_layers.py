"""How PyTorch multiplies, and where its weights lie: three projections together, the rest in their file."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters import BACKENDS
from tests.paths import GOLDENS, ROOT

if "torch" not in BACKENDS:
    pytest.skip("the PyTorch backend is not under test", allow_module_level=True)

import torch
from torch import Tensor
from torch.nn import functional

from opt_torch import OPTForCausalLM, layers, native, quantized
from opt_torch.layers import Together

IDS = torch.arange(4, 11)[None]


@pytest.fixture
def loaded():
    return OPTForCausalLM.from_pretrained(GOLDENS / "pre_ln" / "safetensors", dtype=torch.float32)


@pytest.fixture
def model(loaded):
    """One that has decoded a token."""
    with torch.no_grad():
        loaded(IDS[:, :1])
    return loaded


def projections(model):
    attention = model.model.decoder.layers[0].self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


def are_together(model):
    return model.model.decoder.layers[0].self_attn.together.holds(*projections(model))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def apart(model):
    for layer in model.model.decoder.layers:
        layer.self_attn.together = Together()
    return model


def test_they_are_one_product(model, monkeypatch):
    products = []
    original = torch.nn.Linear.forward
    monkeypatch.setattr("opt_torch.layers.Linear.forward", lambda self, x: products.append(1) or original(self, x))
    together = logits(model)
    count = len(products)
    torch.testing.assert_close(together, logits(apart(model)), rtol=0, atol=1e-5)
    assert len(products) - count == count + 3 * len(model.model.decoder.layers)


def test_they_lie_apart_until_a_token_is_decoded(loaded):
    logits(loaded)
    loaded(IDS[:, :1])
    assert not are_together(loaded)
    loaded.generate(IDS, max_new_tokens=1)
    assert not are_together(loaded)
    loaded.generate(IDS, max_new_tokens=2)
    assert are_together(loaded)


@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_few_bits_are_one_product(quantization, dtype, monkeypatch):
    model = OPTForCausalLM.from_pretrained("opt-tiny", dtype=dtype, quantization=quantization)
    layers = model.model.decoder.layers
    rows = []
    original = native.product

    def recorded(kind, inputs, matrix, *scales, bias_F=None):
        rows.append(len(matrix))
        return original(kind, inputs, matrix, *scales, bias_F=bias_F)

    monkeypatch.setattr(native, "product", recorded)
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        together = model(IDS[:, :1]).logits
        assert are_together(model) == (quantization != "int4" or native.PRODUCT is not None)
        if native.PRODUCT is not None and are_together(model):
            assert rows.count(3 * model.config.hidden_size) == len(layers)
        apart_logits = apart(model)(IDS[:, :1]).logits
    torch.testing.assert_close(together, apart_logits, rtol=0, atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name])


def test_one_is_noticed_to_be_wrong(model):
    """The check above can fail: the product reads the matrix that the three are parts of."""
    before = logits(model)
    with torch.no_grad():
        projections(model)[1].weight[0] += 1
    changed = logits(model)
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(changed, logits(apart(model)), rtol=0, atol=1e-5)


def test_a_cast_keeps_them_together(model):
    assert are_together(model)
    assert are_together(model.to(torch.bfloat16))
    assert {layer.weight.dtype for layer in projections(model)} == {torch.bfloat16}


def test_new_weights_are_read(model):
    other = copy.deepcopy(model)
    assert not are_together(other)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-5)
    for parameter in other.parameters():
        parameter.data = parameter.data * 1.5
    wanted = logits(other)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert are_together(model) is not assign
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


def test_a_new_bias_is_read(model):
    layer = projections(model)[1]
    layer.bias = torch.nn.Parameter(layer.bias.detach() + 1)
    assert not are_together(model)
    torch.testing.assert_close(logits(model), logits(apart(model)), rtol=0, atol=0)


def test_a_forward_of_its_own_is_called(model):
    layer = projections(model)[2]
    forward, called = layer.forward, []
    layer.forward = lambda inputs: called.append(1) or forward(inputs)
    logits(model)
    assert called == [1]


def test_hooks_hear_of_their_calls(model):
    heard = []
    projections(model)[2].register_forward_hook(lambda *_: heard.append(1))
    logits(model)
    assert heard == [1]


def test_gradients_go_to_each(model):
    model(IDS, labels=IDS).loss.backward()
    wanted = [layer.weight.grad for layer in projections(model)]
    apart(model).zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for layer, gradient in zip(projections(model), wanted, strict=True):
        assert gradient is not None
        torch.testing.assert_close(layer.weight.grad, gradient)


def test_a_state_dict_is_saved_as_ever(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux where memory comes from")
def test_weights_stay_in_the_file_which_stays_as_it_is(tmp_path):
    """Nothing is copied where nothing is cast; training writes to pages of its own."""
    shutil.copytree(GOLDENS / "pre_ln" / "safetensors", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    before = file.read_bytes()
    model = OPTForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    weight = model.model.decoder.layers[0].fc1.weight
    place = next(line for line in Path("/proc/self/maps").read_text().splitlines() if contains(line, weight.data_ptr()))
    assert place.endswith("model.safetensors")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    assert file.read_bytes() == before
    model.save_pretrained(tmp_path / "other")
    again = OPTForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
    torch.testing.assert_close(again.model.decoder.layers[0].fc1.weight, kept + 1, rtol=0, atol=0)
    # Replaced as this package replaces files, the old one lives on for those who have it.
    (tmp_path / "new").write_bytes(bytes(len(before)))
    (tmp_path / "new").replace(file)
    torch.testing.assert_close(weight, kept + 1, rtol=0, atol=0)


def contains(line, address):
    start, end = line.split()[0].split("-")
    return int(start, 16) <= address < int(end, 16)


def test_loading_and_generating_imports_no_compiler():
    """PyTorch's takes most of a second to import, and fills tensors on the meta device."""
    program = """
import sys
import torch
from torch import Tensor
from torch.nn import functional
from opt_torch import OPTForCausalLM
from opt_torch.packed import pack
model = OPTForCausalLM.from_pretrained(sys.argv[1])
pack(model)
model.generate(torch.tensor([[4, 5]]), max_new_tokens=20)
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(GOLDENS / "pre_ln" / "safetensors")], check=True, cwd=ROOT)


@pytest.mark.skipif(not native.HAS_ONEDNN, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_bfloat16_with_and_without_instructions_for_it(monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool) -> None:
    """In float32 where the processor has none, forwards and backwards, and rounded once."""
    torch.manual_seed(0)
    dtypes = (torch.float32,) if has_bfloat16 else (torch.float32, torch.bfloat16)
    monkeypatch.setattr(layers, "ONEDNN_DTYPES", dtypes)
    monkeypatch.setattr(native, "HAS_BFLOAT16", has_bfloat16)
    seen: list[Tensor] = []

    def counted(*arguments: Tensor) -> Tensor:
        seen.append(arguments[0])
        return native.onednn_product(*arguments)

    monkeypatch.setattr(layers, "onednn_product", counted)
    layer = layers.Linear(64, 32, dtype=torch.bfloat16)
    inputs = torch.randn(40, 64).bfloat16().requires_grad_()
    outputs = layer(inputs)
    outputs.float().square().sum().backward()
    with torch.no_grad():
        assert torch.equal(layer(inputs), outputs)
    assert len(seen) == (0 if has_bfloat16 else 4)
    wide = functional.linear(inputs.detach().double(), layer.weight.detach().double(), layer.bias.detach().double())
    slopes = 2 * outputs.detach().double()
    for found, wanted in (
        (outputs, wide),
        (inputs.grad, slopes @ layer.weight.detach().double()),
        (layer.weight.grad, slopes.T @ inputs.detach().double()),
        (layer.bias.grad, slopes.sum(0)),
    ):
        assert found is not None
        assert found.dtype == torch.bfloat16
        assert (found.detach().double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()


@pytest.mark.parametrize("dynamic", [False, True])
def test_8_bits_of_a_prompt_with_and_without_instructions_for_them(
    monkeypatch: pytest.MonkeyPatch, dynamic: bool
) -> None:
    layer = quantized.Int8Linear(96, 32, use_bias=False, dynamic=dynamic, device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    layer.assign_rounded(torch.randn(32, 96).numpy(), "cpu", torch.float32)
    inputs = torch.randn(40, 96)
    found = {}
    for has in (False, True):
        monkeypatch.setattr(native, "HAS_INT8", has)
        monkeypatch.setattr(native, "HAS_BFLOAT16", has)
        found[has] = layer(inputs)
    wanted = inputs.double() @ layer.weight.double().T
    assert (found[False] - wanted).abs().max() <= (2e-2 if dynamic else 1e-6) * wanted.abs().max()
    assert (found[True] - found[False]).abs().max() <= (1e-6 if dynamic else 2**-7) * wanted.abs().max()
