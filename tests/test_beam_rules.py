"""What beams are chosen from, and what a text must contain: each piece against its definition."""

import importlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_common import DisjunctiveConstraint, GenerationConfig, PhrasalConstraint
from opt_common.beams import Beams, Candidates
from opt_common.constraints import Progress
from opt_common.decoding import Prompt
from opt_common.errors import GenerationError
from opt_common.processors import Processor, processors
from opt_common.selection import best, drawn
from opt_common.stopping import Stopping
from tests.paths import OWN_GOLDENS
from tests.tolerances import PROCESSED, compare


def module(backend):
    return importlib.import_module(f"{backend.package.__name__}.selection")


def test_of_equal_totals_the_lower_place_comes_first(backend):
    rng = np.random.default_rng(0)
    totals = rng.integers(-3, 3, (4, 60)).astype(np.float32)
    totals[1, rng.random(60) < 0.9] = -np.inf
    for size in (1, 7, 60):
        found = backend.array(module(backend).best(backend.tensor(totals), size))
        np.testing.assert_array_equal(found, best(totals, size))
    assert backend.array(module(backend).best(backend.tensor(totals), 99)).shape == (4, 60), "no more than there are"


def test_draws_without_replacement_are_the_definition_s(backend):
    """Peaked rows, rows with less left than is drawn, and a number near 1."""
    rng = np.random.default_rng(1)
    totals = (rng.normal(size=(5, 300)) * [[0.1], [1], [5], [20], [1]]).astype(np.float32)
    totals[4, 3:] = -np.inf
    uniforms = rng.random((5, 6), dtype=np.float32)
    uniforms[0, 2] = 1 - 2**-24
    found, places = (backend.array(part) for part in module(backend).drawn(*map(backend.tensor, (totals, uniforms))))
    expected = drawn(totals, uniforms)
    np.testing.assert_array_equal(places[:4], expected[:4])
    np.testing.assert_array_equal(found[:4], np.take_along_axis(totals, expected, axis=1)[:4])
    np.testing.assert_array_equal(places[4, :3], expected[4, :3])
    assert sorted(places[4, :3]) == [0, 1, 2]
    assert np.isneginf(found[4, 3:]).all(), "nothing is left, and what is drawn from nothing is no continuation"


def test_draws_without_replacement_follow_the_distribution():
    """A chi-square test of 20,000 ordered pairs of four."""
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    uniforms = np.random.default_rng(2).random((20000, 2))
    places = drawn(np.tile(np.log(shares), (20000, 1)), uniforms)
    statistic = 0.0
    for first in range(4):
        for second in range(4):
            if first != second:
                expected = 20000 * shares[first] * shares[second] / (1 - shares[first])
                count = ((places[:, 0] == first) & (places[:, 1] == second)).sum()
                statistic += (count - expected) ** 2 / expected
    assert statistic < 31.3, "the 0.999 quantile of eleven degrees of freedom"


def test_diversity_golden(backend):
    golden = np.load(OWN_GOLDENS / "processors_expected.npz")
    cases = json.loads((OWN_GOLDENS / "processors_cases.json").read_text(encoding="utf-8"))
    params = next(case["params"] for case in cases if case["name"] == "hamming")
    # Of two prompts with four beams in two groups, the first two beams have chosen.
    counts = np.zeros((4, golden["hamming/in"].shape[1]), np.float32)
    for row, tokens in enumerate(golden["hamming/current_tokens"].reshape(2, 4)[:, :2]):
        for token in tokens:
            counts[2 * row : 2 * row + 2, token] += 1
    found = [Processor(name="diversity", arguments=(np.array(params["diversity_penalty"]), counts))]
    ids = np.ones((4, 3), np.int64)
    scores = backend.process(found, ids, ids > 0, golden["hamming/in"], np.ones(1))
    finite = np.isfinite(golden["hamming/out"])
    np.testing.assert_array_equal(np.isfinite(scores), finite)
    compare(scores[finite], golden["hamming/out"][finite], PROCESSED)


def test_beams_are_processed_as_log_probabilities_and_keep_enough():
    settings = {"num_beams": 2, "eos_token_id": [3, 4, 5], "repetition_penalty": 1.5}
    found = processors(GenerationConfig(**settings), vocab_size=50, prompt_length=3, max_length=9)
    assert [processor.name for processor in found] == ["renormalize", "repetition_penalty"]
    found = processors(
        GenerationConfig(do_sample=True, top_p=0.5, top_k=2, **settings), vocab_size=50, prompt_length=3, max_length=9
    )
    assert found[-1].size == 4, "one more than can end a text"
    assert found[-2].arguments[0] == 3


@pytest.mark.parametrize(
    ("stopping", "penalty", "done"),
    [(True, 2.0, True), (False, 2.0, True), ("never", 2.0, False), ("never", 0.0, True), ("never", -1.0, True)],
)
def test_when_beams_are_done(stopping, penalty, done):
    """Two texts have ended with a score of -1 each; beams have -3, which ten tokens could make -0.03."""
    settings = GenerationConfig(num_beams=2, early_stopping=stopping, length_penalty=penalty, eos_token_id=2)
    prompt = Prompt(input_ids=np.array([[5]]), attention_mask=np.array([[1]]), new_tokens=10, stopping=ENDS)
    beams = Beams(settings, prompt, 0)
    totals, tokens = np.array([-1.0, -1.0, -3.0, -4.0, -np.inf]), np.array([2, 3, 7, 8, 9])
    beams.advance(Candidates(totals_C=totals, beams_C=np.zeros(5, np.int64), tokens_C=tokens))
    assert [text.tokens_T.tolist() for text in beams.finished] == [[2], [3]]
    assert [text.tokens_T.tolist() for text in beams.running] == [[7], [8]]
    assert beams.done == done


ENDS = Stopping(eos_token_id=(2, 3))

ids = st.integers(0, 2)
phrases = st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.lists(phrases, min_size=1, max_size=3), st.lists(ids, max_size=12))
def test_a_constraint_is_fulfilled_when_the_text_contains_a_phrase(words, text):
    progress = Progress.of([DisjunctiveConstraint(word) for word in words])
    for token in text:
        assert progress.complete or progress.next_tokens
        progress = progress.after(token)
    for word, counts in zip(words, progress.matched, strict=True):
        contained = any(text[place : place + len(phrase)] == phrase for phrase in word for place in range(len(text)))
        assert (counts is None) == contained


def test_the_tokens_that_lead_on():
    progress = Progress.of([PhrasalConstraint([5, 6, 7]), DisjunctiveConstraint([[8], [5, 9]])])
    assert progress.next_tokens == (5, 8)
    assert progress.bank == 0
    begun = progress.after(5).after(6)
    assert begun.next_tokens == (7,)
    assert begun.bank == 2
    assert begun.after(5).next_tokens == (6, 9), "what breaks one phrase may begin it, or another, again"
    assert begun.after(7).bank == 3
    assert begun.after(7).next_tokens == (8, 5)
    assert begun.after(7).after(8).complete


@pytest.mark.parametrize("wrong", [[], "56", [5, -1], [True], [1.5]])
def test_phrases_that_cannot_be(wrong):
    with pytest.raises(GenerationError):
        PhrasalConstraint(wrong)
    with pytest.raises(GenerationError):
        DisjunctiveConstraint([[5], wrong])
