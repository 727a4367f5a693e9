"""PyTorch's four attention paths: one answer, or one clear sentence why a path cannot run here."""

import importlib.util

import numpy as np
import pytest

from opt_common.errors import InputError, MissingFrameworkError
from tests.adapters import BACKENDS
from tests.cases import THOROUGH, batches, expected, inputs_of
from tests.conftest import adapter
from tests.paths import GOLDENS
from tests.tolerances import CACHE_FLOAT64, FLOAT16, FLOAT32, compare

if "torch" not in BACKENDS:
    pytest.skip("PyTorch is not among the frameworks under test", allow_module_level=True)


def flash_can_run():
    """Whether there is a GPU and the package."""
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


FLASH_CAN_RUN = flash_can_run()


@pytest.fixture(scope="module")
def torch_backend():
    return adapter("torch")


def with_attention(backend, variant, implementation, dtype="float32"):
    return backend.load(GOLDENS / variant / "safetensors", dtype=dtype, attn_implementation=implementation)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("variant", THOROUGH)
def test_every_path_gives_the_goldens(torch_backend, variant, implementation):
    model = with_attention(torch_backend, variant, implementation)
    for name in batches(variant):
        group = expected(variant)[name]
        found = torch_backend.forward(model, **inputs_of(group))
        compare(
            found.logits, group["logits"], FLOAT32, what=f"{implementation} {name}", attended=group["attention_mask"]
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_every_path_decodes_with_a_cache(torch_backend, implementation):
    model = with_attention(torch_backend, "pre_ln", implementation, dtype="float64")
    group = expected("pre_ln")["leftpad"]
    ids, mask = group["input_ids"], group["attention_mask"]
    whole = torch_backend.forward(model, input_ids=ids, attention_mask=mask).logits
    cache = torch_backend.forward(model, input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True).cache
    rest = torch_backend.forward(model, input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache).logits
    compare(rest, whole[:, 4:], CACHE_FLOAT64, attended=mask[:, 4:])


def test_the_default_is_sdpa(torch_backend):
    model = torch_backend.load(GOLDENS / "pre_ln" / "safetensors")
    assert model.model.decoder.layers[0].self_attn.attn_implementation == "sdpa"


def test_flash_attention_says_why_it_cannot_run(torch_backend):
    if FLASH_CAN_RUN:
        pytest.skip("it can: the test below runs it")
    with pytest.raises(MissingFrameworkError, match=r"flash_attention_2.*(NVIDIA GPU|flash-attn).*'sdpa'"):
        with_attention(torch_backend, "pre_ln", "flash_attention_2", dtype="float16")


@pytest.mark.skipif(not FLASH_CAN_RUN, reason="needs an NVIDIA GPU and the package flash-attn")
def test_flash_attention_gives_the_half_precision_goldens(torch_backend):
    group = expected("pre_ln", "lowprec_expected.npz")["leftpad"]
    model = with_attention(torch_backend, "pre_ln", "flash_attention_2", dtype="float16").cuda()
    inputs = {name: torch_backend.tensor(value).cuda() for name, value in inputs_of(group).items()}
    found = torch_backend.array(model(**inputs).logits.cpu())
    compare(found, group["fp16_logits"], FLOAT16, attended=group["attention_mask"])


def test_an_unknown_path_is_refused(torch_backend):
    with pytest.raises(InputError, match=r"'paged'.*sdpa, eager, flash_attention_2, flex_attention"):
        with_attention(torch_backend, "pre_ln", "paged")


@pytest.mark.parametrize("training", [False, True])
def test_without_a_mask_no_mask_tensor_is_built(torch_backend, load, monkeypatch, training):
    """transformers#48924: an all-ones mask kept PyTorch from its flash kernel; None stays None down to the kernel."""
    import torch

    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        calls.append((attn_mask, is_causal))
        return kernel(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    # The library computes it otherwise, which knows no masks.
    monkeypatch.setattr("opt_torch.native.PROMPT_ATTENTION", None)
    model = load(torch_backend, "pre_ln")
    torch_backend.forward(model, training=training, input_ids=np.array([[5, 6, 7]]))
    assert calls == [(None, True)] * 3
    calls.clear()
    torch_backend.forward(model, input_ids=np.array([[5, 6, 7]]), attention_mask=np.array([[0, 1, 1]]))
    assert all(mask is not None and not causal for mask, causal in calls)
    assert len(calls) == 3


def test_a_step_with_a_cache_and_no_mask_builds_none_either(torch_backend, load, monkeypatch):
    import torch

    from opt_torch import native

    monkeypatch.setattr(native, "ATTENTION", None)
    model = load(torch_backend, "pre_ln")
    cache = torch_backend.forward(model, input_ids=np.array([[5, 6, 7]]), use_cache=True).cache
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(kwargs["attn_mask"]) or kernel(*args, **kwargs),
    )
    torch_backend.forward(model, input_ids=np.array([[8]]), past_key_values=cache)
    assert calls == [None] * 3
