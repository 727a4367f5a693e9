"""What generation costs a compiler, and what its draws obey: over many prompts, many rows and many settings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_common.config import OPTConfig
from opt_common.generation import bucket

TINY = OPTConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=1,
    ffn_dim=32,
    num_attention_heads=2,
    max_position_embeddings=128,
    word_embed_proj_dim=16,
    init_std=0.3,  # scores far enough apart to choose between
    dropout=0.0,
)


@pytest.fixture(scope="module")
def tiny(backends):
    """One small model with the same weights in each framework, which compiles quickly."""
    first = backends[0].build(TINY)
    weights = backends[0].parameters(first)
    models = {}
    for backend in backends:
        models[backend.name] = model = backend.build(TINY)
        for parameter in backend.table(model):
            backend.set(model, parameter, weights[parameter.name])
    return models


def test_fifty_prompts_of_mixed_lengths_compile_once_a_bucket(backend):
    """One prefill for each bucket of prompt lengths, and one step for each bucket of room (transformers#20794)."""
    if not backend.compiles:
        pytest.skip(f"{backend.name} runs its steps as they are written, so that there is nothing to compile")
    lengths = np.random.default_rng(0).permutation(np.arange(1, 61))[:50].tolist()
    new = 3
    model = backend.build(TINY.replace(ffn_dim=48))  # no other test has compiled anything for this shape
    before = backend.compilations()
    for length in lengths:
        ids = np.random.default_rng(length).integers(4, 64, (1, length))
        backend.generate(model, ids, max_new_tokens=new, eos_token_id=[])
    prefills = {bucket(length) for length in lengths}
    rooms = {bucket(prefill + new) for prefill in prefills}
    assert len(prefills) == 5
    assert backend.compilations() - before == len(prefills) + len(rooms)


def test_a_hundred_thousand_draws_follow_the_distribution(backend, tiny):
    """A chi-square test of the first token of each copy of a prompt against the softmax of its scores."""
    copies, kept, prompt = 100_000, 8, np.array([[2, 40, 41]])
    model = tiny[backend.name]
    scores = backend.forward(model, input_ids=prompt).logits[0, -1].astype(np.float64) / 2
    best = np.argsort(-scores)[:kept]
    shares = np.exp(scores[best] - scores.max())
    wanted = copies * shares / shares.sum()
    options = {"do_sample": True, "temperature": 2.0, "top_k": kept, "seed": 1, "max_new_tokens": 1}
    found = backend.generate(model, prompt, num_return_sequences=copies, **options)[:, -1]
    counts = np.array([(found == token).sum() for token in best])
    assert counts.sum() == copies
    statistic = ((counts - wanted) ** 2 / wanted).sum()
    assert statistic < 24.3, "the 0.999 quantile of seven degrees of freedom"


PROMPTS = np.array([[2, 20, 30, 41, 7], [1, 1, 50, 61, 12], [1, 1, 1, 1, 40]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])

NUMBERS = {
    "repetition_penalty": st.floats(1.01, 3),
    "no_repeat_ngram_size": st.just(2),
    "bad_words_ids": st.lists(st.lists(st.integers(3, 63), min_size=2, max_size=2), min_size=1, max_size=4),
    "suppress_tokens": st.lists(st.integers(3, 63), min_size=1, max_size=4),
    "min_new_tokens": st.integers(1, 6),
    "temperature": st.floats(0.3, 3).filter(lambda value: value != 1),
    "top_k": st.integers(1, 8),
    "top_p": st.floats(0.05, 0.99),
    "min_p": st.floats(0.001, 0.5),
    "typical_p": st.floats(0.05, 0.99),
    "epsilon_cutoff": st.floats(0.0001, 0.1),
    "eta_cutoff": st.floats(0.0001, 0.1),
    "guidance_scale": st.floats(-1, 4).filter(lambda value: value != 1),
    "length_penalty": st.floats(-1, 2),
    "early_stopping": st.sampled_from([False, True, "never"]),
    "diversity_penalty": st.floats(0.1, 2),
    "force_words_ids": st.lists(st.lists(st.integers(3, 63), min_size=1, max_size=2), min_size=1, max_size=2),
    "penalty_alpha": st.floats(0.1, 0.9),
    "seed": st.integers(0, 2**40),
}
"""Settings whose values are arguments of a compiled program, not part of it."""

RANDOM = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "seed")

PROGRAMS = {
    "greedy, bare": ({}, ()),
    "greedy": ({}, ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens")),
    "sampling, bare": ({"do_sample": True, "top_k": 0}, ("seed",)),
    "contrastive": ({"top_k": 4}, ("penalty_alpha", "repetition_penalty", "min_new_tokens")),
    "layers": ({"do_sample": True, "top_k": 0, "dola_layers": [0]}, ("seed", "temperature")),
    "guided": ({"do_sample": True, "top_k": 0}, ("guidance_scale", "seed", "temperature")),
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, ("length_penalty", "early_stopping")),
    "guided groups": (
        {"num_beams": 4, "num_beam_groups": 2},
        ("guidance_scale", "diversity_penalty", "length_penalty", "early_stopping"),
    ),
    "drawn beams": ({"num_beams": 2, "do_sample": True, "top_k": 0}, ("seed", "temperature")),
    "words": ({"num_beams": 3}, ("force_words_ids", "length_penalty")),
    "sampling": ({"do_sample": True}, (*RANDOM, "repetition_penalty", "suppress_tokens")),
}
"""Few compiled programs, by name: settings that are always the same, and those whose numbers vary."""


@st.composite
def random_settings(draw):
    fixed, varied = PROGRAMS[draw(st.sampled_from(sorted(PROGRAMS)))]
    return {**fixed, **{name: draw(NUMBERS[name]) for name in varied}}


@given(random_settings())
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_two_hundred_random_settings_give_the_same_tokens_everywhere(backends, tiny, chosen):
    texts = [backend.generate(tiny[backend.name], PROMPTS, MASK, max_new_tokens=6, **chosen) for backend in backends]
    for text in texts[1:]:
        np.testing.assert_array_equal(text, texts[0])
