"""The attention paths of opt_flax: each gives the golden values, and what cannot run here says so in a sentence."""

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

from opt_flax import FlaxOPTForCausalLM

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
