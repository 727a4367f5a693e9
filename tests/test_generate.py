"""Greedy text: token for token what Hugging Face continues with, whatever the padding."""

import importlib

import numpy as np
import pytest

from opt_common.errors import GenerationError
from tests.cases import VARIANTS, config_of, expected, generation_cases
from tests.tolerances import FLOAT32, compare

CASES = [(variant, name) for variant in VARIANTS for name in generation_cases(variant)]

PROMPTS = np.array([[9, 20, 300, 41, 7], [1, 1, 50, 61, 72], [1, 1, 1, 1, 400]])
PADDED_LEFT = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
NEW = 6


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_greedy_goldens(backend, load, variant, name):
    case = generation_cases(variant)[name]
    ids, mask, golden = (np.array(case[key]) for key in ("input_ids", "attention_mask", "output_ids"))
    if backend.compiles:
        # One batch size for all cases, since each is compiled for; rows don't know of each other.
        rows = np.arange(3) % len(ids)
        ids, mask, golden = ids[rows], mask[rows], golden[rows]
    found = backend.generate(load(backend, variant), ids, mask, **case["kwargs"])
    np.testing.assert_array_equal(found, golden)


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_proj"])
def test_a_row_of_a_batch_is_the_row_alone(backend, load, variant):
    """transformers#17514: left-padded batches continued differently from their rows."""
    model = load(backend, variant)
    batch = backend.generate(model, PROMPTS, PADDED_LEFT, max_new_tokens=NEW)
    np.testing.assert_array_equal(batch[:, :5], PROMPTS)
    for row, (prompt, mask) in enumerate(zip(PROMPTS, PADDED_LEFT, strict=True)):
        alone = backend.generate(model, prompt[None, mask == 1], max_new_tokens=NEW)
        np.testing.assert_array_equal(batch[row, 5:], alone[0, mask.sum() :])


def test_right_padding_and_holes_continue_the_last_token_of_each_row(backend, load):
    """The prompt comes back as it was given, and the new tokens after it are those of the same prompt padded left."""
    model = load(backend, "pre_ln")
    wanted = backend.generate(model, PROMPTS, PADDED_LEFT, max_new_tokens=NEW)[:, 5:]
    right = np.array([[9, 20, 300, 41, 7], [50, 61, 72, 1, 1], [400, 1, 1, 1, 1]])
    found = backend.generate(model, right, PADDED_LEFT[:, ::-1].copy(), max_new_tokens=NEW)
    np.testing.assert_array_equal(found, np.concatenate([right, wanted], axis=1))
    holes = np.array([[9, 20, 300, 41, 7], [50, 1, 61, 1, 72], [1, 1, 400, 1, 1]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 1, 0, 0]])
    found = backend.generate(model, holes, mask, max_new_tokens=NEW)
    np.testing.assert_array_equal(found, np.concatenate([holes, wanted], axis=1))


def test_a_finished_row_emits_the_pad_token(backend, load):
    model = load(backend, "pre_ln")
    free = backend.generate(model, PROMPTS, PADDED_LEFT, max_new_tokens=NEW, eos_token_id=[])[:, 5:]
    ends = [int(free[0, 1])]
    found = backend.generate(model, PROMPTS, PADDED_LEFT, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=3)[:, 5:]
    for row, tokens in enumerate(free):
        stop = next((step for step, token in enumerate(tokens) if token in ends), NEW - 1)
        np.testing.assert_array_equal(found[row, : stop + 1], tokens[: stop + 1])
        assert (found[row, stop + 1 :] == 3).all()
    assert (found[0, 2:] == 3).all(), "the end must have been met for this test to say anything"


def test_generation_stops_when_every_row_has_ended(backend, load):
    model = load(backend, "pre_ln")
    free = backend.generate(model, PROMPTS[:1], max_new_tokens=NEW)
    end = int(free[0, 5 + 1])
    first = 1 + int(np.flatnonzero(free[0, 5:] == end)[0])
    found = backend.generate(model, PROMPTS[:1], max_new_tokens=NEW, eos_token_id=end)
    np.testing.assert_array_equal(found, free[:, : 5 + first])


def test_each_token_is_the_likeliest_one_of_a_full_pass(backend, load):
    """Without a cache and without the decoder's own code: what generation means."""
    model = load(backend, "post_ln_proj", dtype="float64")
    found = backend.generate(model, PROMPTS, PADDED_LEFT, max_new_tokens=NEW, eos_token_id=[])
    mask = np.concatenate([PADDED_LEFT, np.ones((3, NEW), np.int64)], axis=1)
    logits = backend.forward(model, input_ids=found, attention_mask=mask).logits
    np.testing.assert_array_equal(logits[:, 4:-1].argmax(-1), found[:, 5:])


def test_the_last_position_may_be_used(backend, load):
    """The last new token is never read, so a model of P positions takes a prompt of P tokens and one new one."""
    model = load(backend, "pre_ln")
    limit = config_of("pre_ln").max_position_embeddings
    ids = np.full((1, limit), 5)
    found = backend.generate(model, ids, max_new_tokens=1)
    assert found[0, -1] == backend.forward(model, input_ids=ids).logits[0, -1].argmax()
    with pytest.raises(GenerationError, match="do not fit"):
        backend.generate(model, ids, max_new_tokens=2)


def test_generating_leaves_the_model_as_it_was(backend, load):
    model = load(backend, "pre_ln")
    group = expected("pre_ln")["nopad"]
    backend.generate(model, PROMPTS, PADDED_LEFT, max_new_tokens=2)
    found = backend.forward(model, input_ids=group["input_ids"])
    compare(found.logits, group["logits"], FLOAT32)


def test_compiled_and_uncompiled_are_the_same(backend, load):
    """transformers#17935, #20794: generation is compiled unless one says otherwise, and says what eager code says."""
    model = load(backend, "post_ln_proj")
    compiled = backend.generate(model, PROMPTS, PADDED_LEFT, max_new_tokens=3)
    before = backend.compilations()
    with backend.uncompiled():
        eager = backend.generate(model, PROMPTS, PADDED_LEFT, max_new_tokens=3)
    assert backend.compilations() == before
    assert bool(before) == backend.compiles
    np.testing.assert_array_equal(eager, compiled)


def test_one_compiled_step_serves_all_tokens_and_all_prompts_of_a_bucket(backend, load, monkeypatch):
    """Python code of the model runs only while it is compiled: a second text of the same bucket must run none of it."""
    if not backend.compiles:
        pytest.skip(f"{backend.name} runs its steps as they are written")
    model = load(backend, "gelu")
    backend.generate(model, PROMPTS, PADDED_LEFT, max_new_tokens=NEW)
    modeling = importlib.import_module(f"{backend.package.__name__}.modeling")
    attend, calls = modeling.attend, []
    monkeypatch.setattr(modeling, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    backend.generate(model, PROMPTS[:, ::-1].copy(), PADDED_LEFT[:, ::-1].copy(), max_new_tokens=NEW)
    backend.generate(model, np.where(PADDED_LEFT == 1, 33, 1), PADDED_LEFT, max_new_tokens=NEW - 2)
    assert not calls
    backend.forward(model, input_ids=PROMPTS)
    assert calls, "the patched function must be the one the model calls"
