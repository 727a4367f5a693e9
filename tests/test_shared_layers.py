"""Layers that are alike are traced once for a compiled step, and none is taken for another."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from opt_common import LoraConfig
from tests.adapters import BACKENDS
from tests.paths import GOLDENS

FRAMEWORKS = [name for name in ("tf", "flax") if name in BACKENDS]
if not FRAMEWORKS:
    pytest.skip("neither TensorFlow nor JAX is among the frameworks under test", allow_module_level=True)

IDS = np.array([[2, 11, 12, 13], [2, 21, 22, 23]])


def load(framework: str, **options: Any) -> Any:
    if framework == "tf":
        from opt_tf import TFOPTForCausalLM as Model
    else:
        from opt_flax import FlaxOPTForCausalLM as Model
    return Model.from_pretrained(GOLDENS / "pre_ln" / "safetensors", dtype="float32", **options)


def layer_class(framework: str) -> tuple[type, str]:
    """The class of layers, and the name of the method that computes."""
    if framework == "tf":
        from opt_tf.modeling import TFOPTDecoderLayer

        return TFOPTDecoderLayer, "call"
    from opt_flax.modeling import FlaxOPTDecoderLayer

    return FlaxOPTDecoderLayer, "__call__"


def forget(framework: str, model: Any = None) -> None:
    """Have what was compiled compiled anew."""
    if framework == "tf":
        from opt_tf.generation import forget_compiled

        if model is not None:
            forget_compiled(model)
    else:
        from opt_flax import generation, shared_layer

        generation._step.clear_cache()
        shared_layer._call.clear_cache()


@pytest.fixture
def traces(framework: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that are called, as often as they are."""
    forget(framework)
    called: list[Any] = []
    layer, name = layer_class(framework)
    real: Callable[..., Any] = getattr(layer, name)

    @functools.wraps(real)
    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        called.append(self)
        return real(self, *arguments, **options)

    monkeypatch.setattr(layer, name, counted)
    return called


def logits(model: Any, **options: Any) -> np.ndarray:
    found = model.generate(
        IDS, max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True, output_logits=True, **options
    )
    return np.stack([np.asarray(each) for each in found.logits])


def unshared(framework: str, patch: pytest.MonkeyPatch) -> None:
    """Have layers called one by one from now on."""
    if framework == "tf":
        patch.setattr("opt_tf.shared_layer.is_plain", lambda layer: False)
    else:
        patch.setattr("opt_flax.generation.call_layer", None)


def double_fc1(framework: str, layer: Any) -> None:
    """Put something of one's own in a layer."""
    fc1 = layer.fc1
    if framework == "tf":
        own = type(fc1).call
        fc1.call = lambda inputs, **options: 2 * own(fc1, inputs)
        return
    from flax import nnx

    class Doubled(nnx.Module):
        def __init__(self) -> None:
            self.fc1 = fc1

        def __call__(self, inputs: Any) -> Any:
            return 2 * self.fc1(inputs)

    layer.fc1 = Doubled()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("changed", ["nothing", "method", "adapter"])
def test_each_layer_gives_what_it_gives_by_itself(
    framework: str, changed: str, traces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(framework)
    if changed == "method":
        double_fc1(framework, model.model.decoder.layers[1])
    elif changed == "adapter":
        model.add_lora(LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
        lora_B = model.model.decoder.layers[1].self_attn.q_proj.lora_B.kernel
        change = np.full(lora_B.shape, 0.1, np.float32)
        lora_B.assign(change) if framework == "tf" else lora_B.set_value(change)
    found = logits(model)
    # The prompt's step and a token's, each with the first layer, and the one that differs.
    assert len(traces) == (2 if changed == "nothing" else 4)
    unshared(framework, monkeypatch)
    forget(framework, model)
    np.testing.assert_allclose(logits(model), found, rtol=1e-5, atol=1e-5)
    assert len(traces) == (2 if changed == "nothing" else 4) + 2 * model.config.num_hidden_layers
    if changed != "nothing":
        assert not np.allclose(logits(load(framework)), found, atol=1e-3)


def test_parts_and_their_dtypes_tell_layers_apart() -> None:
    if "tf" not in FRAMEWORKS:
        pytest.skip("JAX compares graphs by itself")
    import keras

    from opt_tf.shared_layer import alike

    first, other, *_ = load("tf").model.decoder.layers
    assert alike(first, other)
    other.fc1.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    assert not alike(first, other)
