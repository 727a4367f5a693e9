"""Recorded steps: the same tokens as without, and no recording of what a recording can't know.

A CUDA graph runs the same kernels on the same memory again. Where there is no such device, a tape of PyTorch's
operations stands in for it: whatever a step leaves to Python would be missing there, too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.adapters import BACKENDS
from tests.cases import SMALL_VARIANTS
from tests.paths import GOLDENS

if "torch" not in BACKENDS:
    pytest.skip("PyTorch is not among the frameworks under test", allow_module_level=True)

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opt_torch import KVCache, OPTForCausalLM, cuda_graph
from opt_torch.cuda_graph import LEAST_TOKENS, RecordedStep, is_plain

NEW_TOKENS = LEAST_TOKENS + 4


class Tape(TorchDispatchMode):
    """Operations in their order, with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a step that waits for a number"
        outputs = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, outputs))
        return outputs

    def replay(self) -> None:
        """Run them again: what they gave is overwritten."""
        for func, args, kwargs, outputs in self.calls:
            found = func(*args, **kwargs)
            if any(each.alias_info for each in func._schema.returns):
                continue  # a part of what it was given, or that itself
            both = (each if isinstance(each, tuple) else (each,) for each in (outputs, found))
            for old, new in zip(*both, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The recordings that are made, whatever the device is."""
    made: list[Tape] = []

    def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        assert device.type == "cpu"
        step()
        with Tape() as tape:
            result = step()
        made.append(tape)
        return tape.replay, result

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(cuda_graph, "suits", lambda decoder, tokens: tokens >= LEAST_TOKENS and is_plain(decoder))
    return made


def loaded(variant: str = "pre_ln", **options: Any) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(GOLDENS / variant / "safetensors", **{"dtype": "float32", **options})


PROMPTS = {
    "one row": ([[2, 11, 12, 13]], None),
    "rows": ([[2, 11, 12], [2, 21, 22]], None),
    "padding on the left": ([[1, 2, 11], [2, 21, 22]], [[0, 1, 1], [1, 1, 1]]),
}


def generated(model: OPTForCausalLM, prompt: str, **options: Any) -> np.ndarray:
    ids, mask = (None if each is None else torch.tensor(each) for each in PROMPTS[prompt])
    found = model.generate(ids, mask, max_new_tokens=NEW_TOKENS, eos_token_id=None, **options)
    assert isinstance(found, Tensor)
    return found.numpy()


def same(model: OPTForCausalLM, recordings: list[Tape], prompt: str, **options: Any) -> int:
    """How many recordings were made for tokens that are those of steps that are not recorded."""
    found = generated(model, prompt, **options)
    count = len(recordings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "suits", lambda decoder, tokens: False)
        np.testing.assert_array_equal(generated(model, prompt, **options), found)
    assert len(recordings) == count
    return count


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("variant", [variant for variant in SMALL_VARIANTS if variant != "sharded"])
def test_every_variant_gives_the_same_tokens(variant: str, prompt: str, recordings: list[Tape]) -> None:
    assert same(loaded(variant), recordings, prompt) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
        {"attn_implementation": "eager"},
        {"quantization": "int8"},
        {"quantization": "int4"},
    ],
    ids=str,
)
def test_every_kind_of_layer_gives_the_same_tokens(options: dict[str, Any], recordings: list[Tape]) -> None:
    few_bits = "quantization" in options
    model = OPTForCausalLM.from_pretrained("opt-tiny", **options) if few_bits else loaded(**options)
    assert same(model, recordings, "padding on the left") == 1


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, {"do_sample": True, "seed": 3}),
        (1, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
        (1, {"guidance_scale": 1.5}),
        (0, {"num_beams": 3}),
        (0, {"penalty_alpha": 0.6, "top_k": 3}),
        (0, {"dola_layers": "low"}),
    ],
    ids=str,
)
def test_every_strategy_gives_the_same_tokens(count: int, options: dict[str, Any], recordings: list[Tape]) -> None:
    """Rows that continue others, and layers that are looked at on their way, are not recorded."""
    assert same(loaded(), recordings, "rows", **options) == count


def test_a_draft_is_recorded_and_what_checks_it_is_not(recordings: list[Tape]) -> None:
    assert same(loaded(), recordings, "one row", assistant_model=loaded("gelu")) == 1


def test_a_recording_is_of_one_cache(recordings: list[Tape]) -> None:
    model = loaded()
    decoder = model.model.decoder
    ids = torch.tensor([[2, 11, 12, 13]])
    with torch.no_grad():
        cache, other = (KVCache.allocate(model.config, 1, 12) for _ in range(2))
        cache = decoder(ids[:, :2], past_key_values=cache, use_cache=True).past_key_values
        step = RecordedStep(decoder, cache, None)
        assert step.writes_to(cache)
        assert not step.writes_to(other)
        for column in (2, 3):
            outputs = step(ids[:, column : column + 1], cache)
            cache = outputs.past_key_values
            assert cache.length == column + 1
        wanted = decoder(ids).last_hidden_state[:, -1:]
    assert torch.allclose(outputs.last_hidden_state, wanted, atol=1e-6)
    assert len(recordings) == 1


def test_what_asks_for_python_at_each_token_is_not_recorded() -> None:
    decoder: Any = loaded().model.decoder
    assert is_plain(decoder)
    handle = decoder.layers[1].fc1.register_forward_hook(lambda *arguments: None)
    assert not is_plain(decoder)
    handle.remove()
    assert is_plain(decoder)
    decoder.layers[0].fc2.forward = decoder.layers[0].fc2.forward
    assert not is_plain(decoder)
    decoder = loaded(attn_implementation="flex_attention").model.decoder
    assert not is_plain(decoder)

    class Own(torch.nn.Linear):
        pass

    decoder = loaded().model.decoder
    decoder.layers[0].fc1 = Own(4, 4)
    assert not is_plain(decoder)


def test_other_devices_are_not_recorded() -> None:
    decoder = loaded().model.decoder
    assert not cuda_graph.suits(decoder, 1000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"quantization": "int8-dynamic"}], ids=str)
def test_a_cuda_graph_gives_the_same_tokens(
    prompt: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OPTForCausalLM.from_pretrained("opt-tiny", device="cuda", **options)
    assert cuda_graph.suits(model.model.decoder, LEAST_TOKENS)
    assert not cuda_graph.suits(model.model.decoder, LEAST_TOKENS - 1)
    found = generated(model, prompt)
    monkeypatch.setattr(cuda_graph, "suits", lambda decoder, tokens: False)
    np.testing.assert_array_equal(generated(model, prompt), found)
