"""Recorded steps: the same tokens as without, and no recording of what a recording can't know.

A CUDA graph runs the same kernels on the same memory again. Where there is no such device, PyTorch's operations, each
called again, stand in for it: whatever a step leaves to Python would be missing there, too. A CPU's tape is itself.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.adapters import BACKENDS
from tests.cases import SMALL_VARIANTS
from tests.paths import GOLDENS, ROOT

if "torch" not in BACKENDS:
    pytest.skip("PyTorch is not among the frameworks under test", allow_module_level=True)

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opt_common.native import Task
from opt_torch import KVCache, OPTForCausalLM, native, recorded_step, tape
from opt_torch.recorded_step import LEAST_TOKENS, RecordedStep, is_plain, suits
from opt_torch.tape import NotRecordedError, Tape

NEW_TOKENS = LEAST_TOKENS + 4


HAS_LIBRARY = native.PRODUCT is not None


class StandIn(TorchDispatchMode):
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


Replays = list[Callable[[], None]]
Record = Callable[[Callable[[], Tensor], KVCache, list[Tensor]], tuple[Callable[[], None], Tensor]]


def as_graph(step: Callable[[], Tensor], cache: KVCache, fixed: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
    with StandIn() as tape:
        result = step()
    return tape.replay, result


@pytest.fixture(params=["graph", pytest.param("tape", marks=pytest.mark.skipif(not HAS_LIBRARY, reason="no library"))])
def kind(request: pytest.FixtureRequest) -> str:
    """How steps are recorded."""
    return request.param


@pytest.fixture
def recordings(kind: str, monkeypatch: pytest.MonkeyPatch) -> Replays:
    """The recordings that are made."""
    made: Replays = []
    real: Record = as_graph if kind == "graph" else recorded_step.record_tape

    def record(step: Callable[[], Tensor], cache: KVCache, fixed: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
        replay, result = real(step, cache, fixed)
        made.append(replay)
        return replay, result

    monkeypatch.setattr(recorded_step, "record_tape", record)
    if kind == "graph":
        monkeypatch.setattr(
            recorded_step, "suits", lambda decoder, cache, tokens: tokens >= LEAST_TOKENS and is_plain(decoder)
        )
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


def same(model: OPTForCausalLM, recordings: Replays, prompt: str, **options: Any) -> int:
    """How many recordings were made for tokens that are those of steps that are not recorded."""
    found = generated(model, prompt, **options)
    count = len(recordings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded_step, "suits", lambda decoder, cache, tokens: False)
        np.testing.assert_array_equal(generated(model, prompt, **options), found)
    assert len(recordings) == count
    return count


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("variant", [variant for variant in SMALL_VARIANTS if variant != "sharded"])
def test_every_variant_gives_the_same_tokens(variant: str, prompt: str, recordings: Replays) -> None:
    assert same(loaded(variant), recordings, prompt) == 1


@pytest.mark.parametrize(
    ("on_tape", "options"),
    [
        (True, {"dtype": "bfloat16"}),
        (False, {"dtype": "float64"}),
        (False, {"attn_implementation": "eager"}),
        (True, {"quantization": "int8"}),
        (True, {"quantization": "int4"}),
        (True, {"quantization": "int8-dynamic"}),
    ],
    ids=str,
)
def test_every_kind_of_layer_gives_the_same_tokens(
    on_tape: bool, options: dict[str, Any], kind: str, recordings: Replays
) -> None:
    if kind == "graph" and options.get("quantization") == "int8-dynamic":
        pytest.skip("on a CPU, PyTorch's own product looks for large inputs and waits for what it finds")
    few_bits = "quantization" in options
    model = OPTForCausalLM.from_pretrained("opt-tiny", **options) if few_bits else loaded(**options)
    assert same(model, recordings, "padding on the left") == (on_tape or kind == "graph")


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
def test_every_strategy_gives_the_same_tokens(count: int, options: dict[str, Any], recordings: Replays) -> None:
    """Rows that continue others, and layers that are looked at on their way, are not recorded."""
    assert same(loaded(), recordings, "rows", **options) == count


def test_a_draft_is_recorded_and_what_checks_it_is_not(recordings: Replays) -> None:
    assert same(loaded(), recordings, "one row", assistant_model=loaded("gelu")) == 1


def test_a_recording_is_of_one_cache(recordings: Replays) -> None:
    model = loaded()
    decoder = model.model.decoder
    ids = torch.tensor([[2, 11, 12, 13]])
    with torch.no_grad():
        cache, other = (KVCache.allocate(model.config, 1, 12) for _ in range(2))
        cache = decoder(ids[:, :2], past_key_values=cache, use_cache=True).past_key_values
        step = RecordedStep(decoder, cache, None, ids[:, 2:3])
        assert step.serves(cache)
        assert not step.serves(other)
        cache = step.outputs(cache).past_key_values
        assert cache.length == 3
        outputs = step(ids[:, 3:4], cache)
        assert outputs.past_key_values.length == 4
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
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    assert not is_plain(decoder)
    handle.remove()
    decoder.layers[0].fc2.forward = decoder.layers[0].fc2.forward
    assert not is_plain(decoder)

    class Own(torch.nn.Linear):
        pass

    decoder = loaded().model.decoder
    decoder.layers[0].fc1 = Own(4, 4)
    assert not is_plain(decoder)


@pytest.mark.skipif(not HAS_LIBRARY, reason="no library")
def test_what_the_library_does_not_compute_is_not_recorded() -> None:
    model = loaded()
    decoder = model.model.decoder
    cache = KVCache.allocate(model.config, 16, 12)
    assert suits(decoder, cache, LEAST_TOKENS)
    assert not suits(decoder, cache, LEAST_TOKENS - 1)
    assert not suits(decoder, KVCache.allocate(model.config, 17, 12), LEAST_TOKENS)
    assert not suits(decoder, KVCache.allocate(model.config, 1, 12, dtype=torch.bfloat16), LEAST_TOKENS)
    for options in ({"dtype": "float64"}, {"dtype": "float16"}, {"attn_implementation": "flex_attention"}):
        assert not suits(loaded(**options).model.decoder, cache, LEAST_TOKENS)
    with StandIn():
        assert not suits(decoder, cache, LEAST_TOKENS)


@pytest.mark.skipif(not HAS_LIBRARY, reason="no library")
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", [variant for variant in SMALL_VARIANTS if variant != "sharded"])
def test_a_tape_gives_the_numbers_of_the_step(variant: str, padded: bool, rows: int) -> None:
    model = loaded(variant)
    decoder, config = model.model.decoder, model.config
    ids = torch.randint(4, config.vocab_size, (rows, 7), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones((rows, 12), dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    given = mask if padded else None

    def prompt() -> KVCache:
        cache = KVCache.allocate(config, rows, 12)
        return decoder(ids[:, :4], given, past_key_values=cache, use_cache=True).past_key_values

    with torch.no_grad():
        cache, other = prompt(), prompt()
        step = RecordedStep(decoder, cache, given, ids[:, 4:5])
        outputs = step.outputs(cache)
        for column in (4, 5, 6):
            if column > 4:
                outputs = step(ids[:, column : column + 1], cache)
            wanted = decoder(ids[:, column : column + 1], given, past_key_values=other, use_cache=True)
            found = outputs.last_hidden_state
            torch.testing.assert_close(found, wanted.last_hidden_state, atol=1e-5, rtol=1e-5)
            cache, other = outputs.past_key_values, wanted.past_key_values
    for found, keys in zip(cache.keys + cache.values, other.keys + other.values, strict=True):
        torch.testing.assert_close(found, keys, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not HAS_LIBRARY, reason="no library")
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantization": "int4"}], ids=str)
def test_all_between_the_embeddings_and_the_head_is_one_call(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(tape, "runner", lambda operations: counts.append(len(operations)))
    model = OPTForCausalLM.from_pretrained("opt-tiny", **options)
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        cache = KVCache.allocate(model.config, 1, 12)
        RecordedStep(model.model.decoder, cache, None, torch.tensor([[5]]))
    # A sum of embeddings; in each layer four products, attention, two norms, two sums, a scaling and relu; a last norm.
    assert counts[-1] == 1 + layers * 11 + 1


@pytest.mark.skipif(not HAS_LIBRARY, reason="no library")
def test_a_model_that_was_cast_is_recorded_anew(recordings: Replays, kind: str) -> None:
    model = loaded()
    with torch.no_grad():
        cache = KVCache.allocate(model.config, 1, 12)
        step = RecordedStep(model.model.decoder, cache, None, torch.tensor([[5]]))
        assert step.serves(cache)
        model.bfloat16().float()
        assert not step.serves(cache)
        # Nobody else has the memory any more that the recording reads.
        step(torch.tensor([[5]]), step.outputs(cache).past_key_values)
    assert torch.isfinite(step.hidden_B1E).all()


@pytest.mark.skipif(not HAS_LIBRARY, reason="no library")
def test_more_threads_than_processors() -> None:
    """Threads that wait for a part give way to those that compute."""
    script = """
import sys
import torch
from opt_torch import OPTForCausalLM
torch.set_num_threads(int(sys.argv[1]))
model = OPTForCausalLM.from_pretrained("opt-tiny")
ids = model.generate(torch.tensor([[4, 5]]), max_new_tokens=64, eos_token_id=[])
print(ids.tolist())
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", script, str(count)], cwd=ROOT, check=True, timeout=120, capture_output=True
        )
        for count in (1, 4 * (os.cpu_count() or 1))
    ]
    assert found[0].stdout == found[1].stdout


def test_a_tape_runs_what_its_results_depend_on() -> None:
    inputs, mask = torch.tensor([1.0, 2.0]), torch.tensor([0, 1])
    calls: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    with Tape(fixed=[mask]) as recorded:
        places = mask.cumsum(0)  # depends on what is fixed
        zeros = torch.zeros(2)  # made anew, for it is changed
        zeros += inputs
        torch.exp(inputs)  # nobody asks for it
        result = torch.relu(zeros[:, None] - 2 + places[:, None])
    replay = recorded.replay([result])
    assert result.tolist() == [[0.0], [1.0]]
    for numbers, wanted in (([5.0, 6.0], [[3.0], [5.0]]), ([0.0, 1.0], [[0.0], [0.0]])):
        inputs.copy_(torch.tensor(numbers))
        with Counting():
            replay()
        assert result.tolist() == wanted
    assert "cumsum" not in calls
    assert "exp" not in calls
    assert "zeros" in calls


@pytest.mark.skipif(not HAS_LIBRARY, reason="no library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("width", [7, 64, 600])
def test_what_the_library_computes_between_products(
    width: int, affine: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(width)
    tasks: list[int] = []
    real = tape.runner
    monkeypatch.setattr(
        tape, "runner", lambda operations: tasks.extend(each.task for each in operations) or real(operations)
    )
    # Of so little variance that epsilon counts; and parts of longer rows.
    inputs = (torch.randn(3, 1, 2 * width) * 1e-2 + 0.1).to(dtype)
    weight, bias = torch.randn(2, width).to(dtype) if affine else (None, None)

    def results() -> list[Tensor]:
        dense = inputs[..., :width].contiguous()
        normed = torch.nn.functional.layer_norm(dense, (width,), weight, bias, 1e-5)
        scaled = inputs[..., width:] * 0.125
        return [normed, scaled, normed + scaled, torch.relu(normed)]

    with torch.no_grad():
        with Tape() as recorded:
            found = results()
        replay = recorded.replay(found)
        assert sorted(tasks[-4:]) == [Task.LAYER_NORM, Task.ADD, Task.SCALE, Task.RELU]
        inputs.copy_((torch.randn(3, 1, 2 * width) * 1e-2 - 0.1).to(dtype))
        replay()
        tolerance = 1e-5 if dtype is torch.float32 else 2**-7
        for one, wanted in zip(found, results(), strict=True):
            torch.testing.assert_close(one, wanted, atol=tolerance, rtol=tolerance)


def test_a_tape_draws_anew() -> None:
    with Tape() as recorded:
        drawn = torch.rand(8)
    before = drawn.clone()
    recorded.replay([drawn])()
    assert (drawn != before).any()


def test_a_step_that_waits_for_a_number_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    number = torch.tensor(3)
    with pytest.raises(NotRecordedError), Tape():
        number.item()
    with pytest.raises(NotRecordedError), Tape():
        torch.equal(number, number)
    assert native.recording.tape is None
    model = loaded()
    wanted = generated(model, "one row")
    tried: list[int] = []

    def record(step: Callable[[], Tensor], cache: KVCache, fixed: list[Tensor]) -> Any:
        tried.append(1)
        raise NotRecordedError

    monkeypatch.setattr(recorded_step, "record_tape", record)
    np.testing.assert_array_equal(generated(model, "one row"), wanted)
    assert len(tried) == HAS_LIBRARY


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"quantization": "int8-dynamic"}], ids=str)
def test_a_cuda_graph_gives_the_same_tokens(
    prompt: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OPTForCausalLM.from_pretrained("opt-tiny", device="cuda", **options)
    cache = KVCache.allocate(model.config, 1, 12, device="cuda")
    assert suits(model.model.decoder, cache, LEAST_TOKENS)
    assert not suits(model.model.decoder, cache, LEAST_TOKENS - 1)
    found = generated(model, prompt)
    monkeypatch.setattr(recorded_step, "suits", lambda decoder, cache, tokens: False)
    np.testing.assert_array_equal(generated(model, prompt), found)
