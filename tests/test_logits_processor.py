"""The hook for a user's own function of scores: what it is given, when it is compiled, and what it may not return."""

import numpy as np
import pytest

from opt_common import GenerationConfig
from opt_common.errors import GenerationError
from opt_common.processors import History, process, processors, program

PROMPTS = np.array([[9, 20, 300, 41, 7], [1, 1, 50, 61, 72], [1, 1, 1, 1, 400]])
PADDED_LEFT = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
NEW = 4
VARIANT = "gelu"


def test_a_function_of_one_s_own_is_what_the_same_setting_does(backend, load):
    """A bias on two tokens, by hand and as `sequence_bias`."""
    bias = np.zeros((1, 512), np.float32)
    bias[0, [40, 41]] = 9.0, 9.5
    bias = backend.tensor(bias)
    arguments = (load(backend, VARIANT), PROMPTS, PADDED_LEFT)
    found = backend.generate(*arguments, logits_processor=[lambda input_ids, scores: scores + bias], max_new_tokens=NEW)
    expected = backend.generate(*arguments, sequence_bias=[[[40], 9.0], [[41], 9.5]], max_new_tokens=NEW)
    np.testing.assert_array_equal(found, expected)
    assert np.isin(found[:, 5:], [40, 41]).any(), "the bias must matter for this test to say anything"


def test_a_function_sees_each_row_s_text(backend, load):
    """The newest token is last. One function counts on from it; the next one outbids it by the token before, plus 7."""
    ids = backend.tensor(np.arange(512, dtype=backend.id_dtype)[None])

    def count_on(input_ids, scores):
        return scores + 1e4 * backend.floats(ids == input_ids[:, -1:] + 1)

    def outbid(input_ids, scores):
        return scores + 1e5 * backend.floats((ids == input_ids[:, -2:-1] + 7) & (input_ids[:, -2:-1] > 50))

    settings = {"logits_processor": [count_on, outbid], "max_new_tokens": 3, "pad_token_id": 60, "eos_token_id": []}
    found = backend.generate(load(backend, VARIANT), PROMPTS, PADDED_LEFT, **settings)[:, 5:]
    # Row 2 has one token: what stands before it is the pad token.
    np.testing.assert_array_equal(found, [[8, 9, 10], [68, 79, 75], [67, 407, 74]])


def test_a_function_is_compiled_once(backend, load):
    if not backend.compiles:
        pytest.skip(f"{backend.name} runs its steps as they are written")
    calls = []

    def note(input_ids, scores):
        calls.append(1)
        return scores

    settings = {"logits_processor": [note], "max_new_tokens": NEW}
    backend.generate(load(backend, VARIANT), PROMPTS, PADDED_LEFT, **settings)
    traced = len(calls)
    assert 1 <= traced <= 4, "one prefill, one step"
    backend.generate(load(backend, VARIANT), PROMPTS[:, ::-1].copy(), PADDED_LEFT[:, ::-1].copy(), **settings)
    assert len(calls) == traced


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda input_ids, scores: scores[:, :-1],
            r"logits_processor\[0\] \(<lambda>\) returned shape \(3, 511\), expected",
        ),
        (lambda input_ids, scores: None, r"returned NoneType, expected scores of shape \(3, 512\)"),
        (7, r"logits_processor\[0\] is 7, expected a function"),
    ],
)
def test_functions_that_are_none(backend, load, function, message):
    with pytest.raises(GenerationError, match=message):
        backend.generate(load(backend, VARIANT), PROMPTS, PADDED_LEFT, logits_processor=[function], max_new_tokens=NEW)


def test_a_function_acts_before_sampling(backend, load):
    """A token far above the rest, and top_k=1 behind it: nothing else is left to draw."""
    if backend.compiles:
        pytest.skip("the order is opt_common's")
    bias = np.zeros((1, 512), np.float32)
    bias[0, 77] = 50.0
    bias = backend.tensor(bias)
    settings = {"do_sample": True, "top_k": 1, "seed": 1, "max_new_tokens": 2}
    functions = [lambda input_ids, scores: scores + bias]
    found = backend.generate(load(backend, VARIANT), PROMPTS, PADDED_LEFT, logits_processor=functions, **settings)
    assert (found[:, 5:] == 77).all()


def test_the_reference_gives_and_demands_the_same():
    history = History(tokens_BS=PROMPTS, attended_BS=PADDED_LEFT == 1, length=5)
    seen = []

    def run(function):
        settings = GenerationConfig(pad_token_id=60)
        found = processors(settings, vocab_size=9, prompt_length=5, max_length=6, functions=[function])
        arguments = [processor.arguments for processor in found]
        return process(np.zeros((3, 9), np.float32), history, program(found), arguments, [1.0])

    assert (run(lambda input_ids, scores: seen.append(input_ids) or scores + 2) == 2).all()
    np.testing.assert_array_equal(seen[0], np.where(PADDED_LEFT == 1, PROMPTS, 60))
    with pytest.raises(GenerationError, match=r"returned shape \(3,\), expected"):
        run(lambda input_ids, scores: scores[:, 0])
