"""The bundled model's greedy text is one text in all frameworks, by the paths that `generate` takes.

Those are compiled steps, products laid together, and a cache that is written in place: not what a single call of the
model takes. In float32 all tokens are equal, and are those of the reference. In bfloat16 they are equal up to the first
near tie, after which each framework goes on with its own text. So every text is held to the reference along itself:
where it has another token than the reference's best, the two are a near tie.
"""

import functools

import ml_dtypes
import numpy as np
import pytest

from opt_common import reference
from opt_common.hub import resolve
from opt_common.tokenizer import OPTTokenizer
from tests.test_mutation import exchange
from tests.test_opt_tiny import SAFE_LEAD, weights

PROMPTS = (
    "Once upon a time",
    "One day, Tom",
    "The little girl was sad because",
    "Lily",
    "There was a dog named Max. He liked to run in the park, and",
)
NEW = 96
LAYER = "model.decoder.layers.1."

NEAR_TIE_STEPS = 2
"""How many steps of bfloat16 may lie between two logits that are a near tie: one for the rounding of the two, one for
all that is rounded before."""


@functools.cache
def prompts():
    """Ids and mask (B, T) of all prompts, padded on the left."""
    batch = OPTTokenizer.from_pretrained("opt-tiny")(list(PROMPTS), padding=True, padding_side="left")
    return np.array(batch["input_ids"]), np.array(batch["attention_mask"])


@functools.cache
def bundled(backend, dtype):
    return backend.load(resolve("opt-tiny"), dtype=dtype)


def texts(backend, model):
    """New tokens (B, NEW) of the prompts in one batch."""
    ids_BT, mask_BT = prompts()
    return backend.generate(model, ids_BT, mask_BT, max_new_tokens=NEW)[:, ids_BT.shape[1] :]


@functools.cache
def bundled_texts(backend, dtype):
    return texts(backend, bundled(backend, dtype))


def judged(tokens_BT, dtype):
    """For each new token, by the reference along the same text: how far its logit lies below the best, how far the
    second does, and the step of bfloat16 at the best; (B, NEW) each."""
    config, params = weights()
    if dtype == "bfloat16":
        params = {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in params.items()}
    ids_BT, mask_BT = prompts()
    mask_BT = np.concatenate([mask_BT, np.ones_like(tokens_BT)], axis=1)
    whole_BT = np.concatenate([ids_BT, tokens_BT], axis=1)
    logits_BTV = reference.forward(config, params, whole_BT, mask_BT).logits[:, ids_BT.shape[1] - 1 : -1]
    own_BT = np.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]
    second_BT, best_BT = np.moveaxis(np.partition(logits_BTV, -2)[..., -2:], -1, 0)
    return best_BT - own_BT, best_BT - second_BT, np.spacing(best_BT.astype(ml_dtypes.bfloat16)).astype(float)


def refused(tokens_BT, dtype):
    """Places (row, token) of tokens that this dtype doesn't allow."""
    below_BT, _, step_BT = judged(tokens_BT, dtype)
    return np.argwhere(below_BT > (NEAR_TIE_STEPS * step_BT if dtype == "bfloat16" else 0)).tolist()


def test_float32_texts_are_equal(backends):
    found = [bundled_texts(backend, "float32") for backend in backends]
    for tokens_BT in found:
        np.testing.assert_array_equal(tokens_BT, found[0])
        assert refused(tokens_BT, "float32") == []
    assert found[0].shape == (len(PROMPTS), NEW)
    assert judged(found[0], "float32")[1].min() > SAFE_LEAD, "equal by luck"


def test_bfloat16_texts_are_equal_up_to_a_near_tie(backends):
    found = [bundled_texts(backend, "bfloat16") for backend in backends]
    _, lead_BT, step_BT = judged(found[0], "bfloat16")
    near_BT = lead_BT <= NEAR_TIE_STEPS * step_BT
    assert near_BT.mean() < 0.1, "few tokens are left to fortune"
    for tokens_BT in found:
        assert refused(tokens_BT, "bfloat16") == []
        for row, other, near in zip(tokens_BT, found[0], near_BT, strict=True):
            split = np.flatnonzero(row != other)
            assert not split.size or near[split[0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_alone_is_continued_as_in_the_batch(backend, dtype):
    """Up to a near tie in bfloat16, again."""
    ids_BT, mask_BT = prompts()
    row = 3
    prompt = ids_BT[row : row + 1, mask_BT[row] == 1]
    alone = backend.generate(bundled(backend, dtype), prompt, max_new_tokens=NEW)[:, prompt.shape[1] :]
    batch = bundled_texts(backend, dtype).copy()
    if dtype == "float32":
        np.testing.assert_array_equal(alone[0], batch[row])
    batch[row] = alone[0]
    assert refused(batch, dtype) == []


def shift_positions(params):
    name = "model.decoder.embed_positions.weight"
    params[name] = np.roll(params[name], 1, axis=0)


@pytest.mark.parametrize(
    ("mutate", "dtype"),
    [
        (exchange(LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"), "float32"),
        (exchange(LAYER + "self_attn.q_proj.bias", LAYER + "self_attn.k_proj.bias"), "bfloat16"),
        (shift_positions, "bfloat16"),
    ],
    ids=["k and v swapped", "biases of q and k swapped", "positions shifted by one"],
)
def test_another_model_is_noticed(backend, mutate, dtype):
    params = dict(weights()[1])
    mutate(params)
    model = backend.load(resolve("opt-tiny"), dtype=dtype)
    for parameter in backend.table(model):
        backend.set(model, parameter, params[parameter.name])
    assert refused(texts(backend, model), dtype)
