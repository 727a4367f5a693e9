"""PyTorch's own ways of training fast: products of oneDNN with gradients, a loss whose slopes come along with it."""

import pytest

from opt_common.config import OPTConfig
from tests.adapters import BACKENDS

if "torch" not in BACKENDS:
    pytest.skip("the PyTorch backend is not under test", allow_module_level=True)

import torch

from opt_torch import OPTForCausalLM, layers, native, training

CONFIG = OPTConfig(
    vocab_size=40,
    hidden_size=8,
    num_hidden_layers=2,
    ffn_dim=12,
    max_position_embeddings=16,
    num_attention_heads=2,
    dropout=0.0,
)
IDS = torch.arange(4)[:, None] + torch.arange(7)[None] + 4
LABELS = IDS.clone()
LABELS[:, 2:4] = -100


def calls(monkeypatch, owner, name):
    """A list that gets an entry for each call of a function."""
    seen = []
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: seen.append(1) or function(*arguments))
    return seen


def gradients(model, **arguments):
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def agree(found, wanted, tolerance):
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=tolerance)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(not native.HAS_ONEDNN, reason="this PyTorch has no oneDNN")
def test_gradients_of_onednn_are_pytorch_s(monkeypatch):
    """With weights frozen too; and the operator is taken in training: three products for each of twelve layers."""
    # Few labels are a few rows, which the library would multiply.
    monkeypatch.setattr(native, "PRODUCT", None)
    model = OPTForCausalLM(CONFIG)
    seen = calls(monkeypatch, layers, "onednn_product")
    found = gradients(model, input_ids=IDS, labels=LABELS)
    assert len(seen) == 3 * 12 + 3
    monkeypatch.setattr(native, "HAS_ONEDNN", False)
    agree(found, gradients(model, input_ids=IDS, labels=LABELS), 1e-6)
    assert len(seen) == 3 * 12 + 3
    monkeypatch.setattr(native, "HAS_ONEDNN", True)
    model.model.decoder.layers[1].fc1.requires_grad_(False)
    model.zero_grad()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert model.model.decoder.layers[1].fc1.weight.grad is None
    gradient = model.model.decoder.layers[0].fc1.weight.grad
    torch.testing.assert_close(gradient, found[1]["model.decoder.layers.0.fc1.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [5, 1000])
def test_slopes_that_come_with_the_loss_are_those_of_logits(monkeypatch, rows):
    """A head that somebody watches is computed by itself; labels that don't count cost nothing."""
    monkeypatch.setattr(training, "CHUNK_LOGITS", rows * CONFIG.vocab_size)
    model = OPTForCausalLM(CONFIG, dtype=torch.float64)
    seen = calls(monkeypatch, training, "product")
    found = gradients(model, input_ids=IDS, labels=LABELS)
    counted = int((LABELS[:, 1:] != -100).sum())
    assert len(seen) == 3 * -(-counted // rows)
    watched = []
    with model.lm_head.register_forward_hook(lambda *_: watched.append(1)):
        agree(found, gradients(model, input_ids=IDS, labels=LABELS), 1e-14)
    assert watched
    assert len(seen) == 3 * -(-counted // rows)


def test_gradients_of_a_loss_are_had_twice():
    """`retain_graph` keeps them, and a loss is scaled as any other."""
    model = OPTForCausalLM(CONFIG, dtype=torch.float64)
    loss = model(input_ids=IDS, labels=LABELS).loss
    first, twice, last = (
        torch.autograd.grad(factor * loss, model.lm_head.weight, retain_graph=True)[0] for factor in (1, 2, 1)
    )
    assert torch.equal(twice, 2 * first)
    assert torch.equal(last, first)


def test_the_loss_of_autocast_is_summed_in_float32():
    """And so is the gradient of the table, whatever the products were rounded to."""
    torch.manual_seed(0)
    model = OPTForCausalLM(CONFIG)
    exact, wanted = gradients(model, input_ids=IDS, labels=LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = gradients(model, input_ids=IDS, labels=LABELS)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 2e-3
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    # By norm: where half precision turns a sign before the ReLU, single elements are others.
    found, wanted = found["model.decoder.embed_tokens.weight"], wanted["model.decoder.embed_tokens.weight"]
    assert (found - wanted).norm() < 0.02 * wanted.norm()
