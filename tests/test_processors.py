"""What is done to scores before a token is chosen: each processor against Hugging Face's, in NumPy and the backends."""

import importlib
import json

import numpy as np
import pytest

from opt_common.generation_config import GenerationConfig
from opt_common.processors import History, choose, process, processors, program
from tests.paths import OWN_GOLDENS
from tests.tolerances import PROCESSED, compare

GOLDEN = np.load(OWN_GOLDENS / "processors_expected.npz")
IDS, SCORES = GOLDEN["input_ids"], GOLDEN["scores"]

NOT_OURS = ("encoder_repetition_2.0", "encoder_no_repeat_ngram_2", "hamming")
"""Goldens of processors that this package does not have, and of one that needs beams: see tests/test_beam_rules.py."""

CASES = {
    case["name"]: case["params"]
    for case in json.loads((OWN_GOLDENS / "processors_cases.json").read_text(encoding="utf-8"))
    if case["name"] not in NOT_OURS
}

OURS = {"prompt_length", "max_length", "min_tokens_to_keep", "begin_index", "order"}
"""Parameters of cases that are no settings. The order of the chains is the one that `processors` gives."""

SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


def chosen(params):
    settings = {name: value for name, value in params.items() if name not in OURS}
    if sampling := SAMPLING & settings.keys():
        settings = {"do_sample": True, "top_k": 0, **settings}
    if "log_softmax" in params.get("order", ""):
        settings["renormalize_logits"] = True
    config = GenerationConfig(**settings)
    found = processors(
        config,
        vocab_size=SCORES.shape[1],
        prompt_length=params.get("begin_index", params.get("prompt_length", IDS.shape[1])),
        max_length=params.get("max_length", 100),
        min_tokens_to_keep=params.get("min_tokens_to_keep", 1),
    )
    expected = len(sampling) or 1
    if params.get("top_k", 0) >= SCORES.shape[1]:
        expected -= 1  # keeping more than there are changes nothing
    assert len(found) >= expected
    return found


def gates(found, length):
    return np.array([processor.gate(length) for processor in found])


@pytest.mark.parametrize("name", CASES)
def test_reference_goldens(name):
    found = chosen(CASES[name])
    scores = reference(found, IDS, np.ones_like(IDS, dtype=bool), SCORES)
    check(scores, GOLDEN[f"out/{name}"], name)


@pytest.mark.parametrize("name", CASES)
def test_backend_goldens(backend, name):
    found = chosen(CASES[name])
    attended = np.ones_like(IDS, dtype=bool)
    scores = backend.process(found, IDS, attended, SCORES, gates(found, IDS.shape[1]))
    check(scores, GOLDEN[f"out/{name}"], name)
    # And the reference's own choice among equals, which no golden has.
    np.testing.assert_array_equal(np.isneginf(scores), np.isneginf(reference(found, IDS, attended, SCORES)))


def test_padding_is_no_part_of_a_row(backend):
    """A row with padding on its left is processed as the row alone."""
    found = chosen({"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "sequence_bias": [[[5, 6, 7], 3.0]]})
    row = np.array([[5, 6, 7, 8, 5, 6]])
    alone = reference(found, row, np.ones((1, 6), bool), SCORES[:1])
    padded = np.concatenate([[[5, 6, 9, 5]], row], axis=1)
    attended = np.arange(10)[None] >= 4
    assert alone[0, 7] == -np.inf
    for scores in (
        reference(found, padded, attended, SCORES[:1]),
        backend.process(found, padded, attended, SCORES[:1], gates(found, 10)),
    ):
        np.testing.assert_allclose(scores, alone, rtol=1e-6)


def test_a_row_shorter_than_a_prefix_matches_nothing(backend):
    found = chosen({"sequence_bias": [[[5, 6, 7, 8, 9], 3.0]], "no_repeat_ngram_size": 4})
    row = np.array([[7, 8]])
    np.testing.assert_array_equal(backend.process(found, row, row > 0, SCORES[:1], gates(found, 2)), SCORES[:1])


DRAWN = np.array([[-np.inf, 0.0, -np.inf, 1.0, -np.inf]], np.float32)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.26, 1), (0.28, 3), (1 - 2**-24, 3)])
def test_a_draw_inverts_the_distribution(backend, uniform, token):
    """Shares are 0.269 and 0.731; a token that is ruled out is never drawn, whatever the number."""
    uniforms = np.array([uniform], np.float32)
    assert choose(DRAWN, uniforms) == backend.choose(DRAWN, uniforms) == token


def test_equal_scores_and_none_at_all(backend):
    scores = np.array([[1, 3, 3], [-np.inf] * 3], np.float32)
    for uniforms in (None, np.array([0.5, 0.5], np.float32)):
        expected = [1, -1] if uniforms is None else choose(scores, uniforms)
        np.testing.assert_array_equal(backend.choose(scores, uniforms), expected)
        assert expected[1] == -1


def test_a_draw_s_sums_are_rounded_once(backend):
    """Summed in float32, 50,272 shares would be off by many roundings, each framework's its own."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 50272)).astype(np.float32)
    uniforms = rng.random(4, dtype=np.float32)
    np.testing.assert_array_equal(backend.choose(scores, uniforms), choose(scores, uniforms))
    module = importlib.import_module(f"{backend.package.__name__}.processors")
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    found = backend.array(module.running_sum(backend.tensor(shares)))
    np.testing.assert_allclose(found, shares.cumsum(1, dtype=np.float64), rtol=1.2e-7)


def reference(found, tokens, attended, scores):
    history = History(tokens_BS=tokens, attended_BS=attended, length=tokens.shape[1])
    arguments = [processor.arguments for processor in found]
    return process(scores, history, program(found), arguments, gates(found, tokens.shape[1]))


def check(found, expected, name):
    """Positions must agree, but for equal scores at a cut: which of those stay is the sort's whim, how many is not."""
    np.testing.assert_array_equal(np.isneginf(found).sum(1), np.isneginf(expected).sum(1), err_msg=name)
    for row, scores in enumerate(SCORES):
        for score in np.unique(scores):
            equal = scores == score
            values = [np.sort(array[row, equal]) for array in (found, expected)]
            finite = np.isfinite(values[1])
            np.testing.assert_array_equal(np.isfinite(values[0]), finite, err_msg=f"{name}, row {row}, score {score}")
            if finite.any():
                compare(values[0][finite], values[1][finite], PROCESSED, what=name)
