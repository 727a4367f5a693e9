"""The attention paths of opt_flax: each gives the golden values, and what cannot run here says so in a sentence."""

import dataclasses
import re

import pytest

from opt_common.errors import InputError, MissingFrameworkError
from tests.adapters import BACKENDS
from tests.cases import expected, inputs_of
from tests.paths import GOLDENS
from tests.tolerances import BFLOAT16, FLOAT32, compare

if "flax" not in BACKENDS:
    pytest.skip("Flax is not among the frameworks under test", allow_module_level=True)

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opt_flax import FlaxOPTForCausalLM
from opt_flax.cache import KVCache

ON_GPU = jax.default_backend() == "gpu"


def logits(variant, group, **options):
    arrays = inputs_of(expected(variant)[group])
    model = FlaxOPTForCausalLM.from_pretrained(GOLDENS / variant / "safetensors", **options)
    outputs = model(arrays["input_ids"], attention_mask=arrays["attention_mask"])
    return np.asarray(outputs.logits.astype(jnp.float32)), arrays["attention_mask"]


@pytest.mark.parametrize("group", ["nopad", "leftpad"])
@pytest.mark.parametrize("attention", ["xla", "eager"])
def test_every_path_gives_the_goldens(attention, group):
    found, attended = logits("pre_ln", group, dtype="float32", attn_implementation=attention)
    compare(found, expected("pre_ln")[group]["logits"], FLOAT32, attended=attended)


def test_an_unknown_path_is_refused():
    with pytest.raises(InputError, match="attn_implementation is 'flash', expected one of xla, eager, cudnn"):
        logits("pre_ln", "nopad", dtype="float32", attn_implementation="flash")


@pytest.mark.skipif(ON_GPU, reason="it can run: the test below runs it")
def test_cudnn_without_a_gpu_says_what_to_use():
    with pytest.raises(MissingFrameworkError, match=r"needs an NVIDIA GPU.* Use 'xla'"):
        logits("pre_ln", "nopad", dtype="bfloat16", attn_implementation="cudnn")


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU and JAX_PLATFORMS=cuda")
def test_cudnn_on_a_gpu_gives_the_same_model():
    found, attended = logits("pre_ln", "leftpad", dtype="bfloat16", attn_implementation="cudnn")
    wanted, _ = logits("pre_ln", "leftpad", dtype="bfloat16", attn_implementation="xla")
    compare(found, wanted, BFLOAT16, attended=attended)
    with pytest.raises(InputError, match="computes in float16 or bfloat16"):
        logits("pre_ln", "leftpad", dtype="float32", attn_implementation="cudnn")


@pytest.mark.skipif(ON_GPU, reason="the path of a processor")
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_updates_the_cache_in_place(rows):
    """XLA copied each buffer once or twice for every token when attention read what had just been written."""
    model = FlaxOPTForCausalLM.from_pretrained(GOLDENS / "pre_ln" / "safetensors", dtype="float32")
    graphdef, state = nnx.split(model)
    cache = KVCache.allocate(model.config, rows, 96)

    def step(state, cache, ids):
        outputs = nnx.merge(graphdef, state).model.decoder(ids, past_key_values=cache, use_cache=True)
        return outputs.last_hidden_state, outputs.past_key_values

    cache = dataclasses.replace(cache, length=jnp.int32(5))
    lowered = jax.jit(step, donate_argnames="cache").lower(state, cache, jnp.ones((rows, 1), jnp.int32))
    shape = ",".join(map(str, cache.keys[0].shape))
    program = lowered.compile().as_text()
    assert f"f32[{shape}]" in program
    assert re.findall(rf"= f32\[{shape}\]\S* copy\(.*", program) == []
