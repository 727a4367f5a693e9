"""Beam search in all its forms: Hugging Face's texts, the best text there is, and the same in three frameworks."""

import contextlib
import itertools
import json

import numpy as np
import pytest

from opt_common.config import OPTConfig
from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from tests.cases import SMALL_VARIANTS
from tests.paths import GOLDENS
from tests.tolerances import BEAM_SCORE, FLOAT32, FLOAT64, compare

AT_ONCE = ("group_beam_6x3_div1.0_leftpad", "forced_both_ends")
"""Cases, of the first variant, of forms that no other test compiles; the others take a minute a framework."""


def golden_cases():
    for variant in SMALL_VARIANTS:
        file = GOLDENS / variant / "generation_beams.json"
        for case in json.loads(file.read_text(encoding="utf-8"))["cases"]:
            at_once = variant == SMALL_VARIANTS[0] and case["name"] in AT_ONCE
            marks = () if at_once else (pytest.mark.slow,)
            yield pytest.param(variant, case, id=f"{variant}-{case['name']}", marks=marks)


@pytest.mark.parametrize(("variant", "case"), list(golden_cases()))
def test_beam_goldens(backend, load, variant, case):
    """transformers#46612, transformers#17935: beams that went on from other beams' caches."""
    ids, mask, golden = (np.array(case[key]) for key in ("input_ids", "attention_mask", "output_ids"))
    # Compiled where it is run at once, as it always is for users; to compile for every case would take long.
    at_once = variant == SMALL_VARIANTS[0] and case["name"] in AT_ONCE
    with contextlib.nullcontext() if at_once else backend.uncompiled():
        found = backend.generate_output(load(backend, variant), ids, mask, output_scores=True, **case["kwargs"])
    np.testing.assert_array_equal(found.sequences, golden)
    compare(found.sequences_scores, np.array(case["sequences_scores"]), BEAM_SCORE)
    check_details(found, ids.shape[1], case["kwargs"])


def check_details(found, prompt, settings):
    """A text's log-probabilities are where its beam indices say, and make up its score."""
    lengths = (found.beam_indices >= 0).sum(1)
    assert len(found.scores) >= lengths.max()
    for row, length in enumerate(lengths):
        tokens = found.sequences[row, prompt : prompt + length]
        places = range(length - 1) if settings.get("num_beam_groups", 1) > 1 else range(length)
        for step in places:  # the end that groups emit may be another than the one they chose
            expected = found.scores[step][found.beam_indices[row, step], tokens[step]]
            compare(found.token_logprobs[row, step], expected, FLOAT32)
        score = found.token_logprobs[row].sum() / length ** settings.get("length_penalty", 1.0)
        compare(found.sequences_scores[row], score, FLOAT32)
        assert (found.token_logprobs[row, length:] == 0).all()


TINY = OPTConfig(
    vocab_size=4,
    hidden_size=16,
    ffn_dim=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    init_std=0.4,
)
"""Ids 0 to 3, of which 2 ends a text."""


def every_text(backend, model, prompt, length, penalty):
    """All texts of at most `length` new tokens, best first, with their scores."""
    complete = np.array(list(itertools.product(range(4), repeat=length)))
    ids = np.concatenate([np.tile(prompt, (len(complete), 1)), complete], axis=1)
    logits = backend.forward(model, input_ids=ids).logits[:, prompt.shape[1] - 1 : -1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    sums = np.take_along_axis(logprobs, complete[..., None], axis=-1)[..., 0].cumsum(1)
    scores = {}
    for text, totals in zip(complete.tolist(), sums, strict=True):
        new = text.index(2) + 1 if 2 in text else length
        scores[tuple(text[:new])] = totals[new - 1] / new**penalty
    return sorted(scores.items(), key=lambda item: -item[1])


def test_enough_beams_find_the_best_of_all_texts(backend):
    """transformers#46612: what exhaustive search finds, for every length up to 5, whatever the length penalty."""
    model = backend.build(TINY, dtype="float64")
    prompt = np.array([[0, 1, 3]])
    for length, penalty in itertools.product(range(1, 6), (0.0, 0.7, -0.5)):
        # Enough beams for every continuation; so many texts that long ones, which have changed rows, are among them.
        expected = every_text(backend, model, prompt, length, penalty)[:60]
        settings = {"num_beams": 324, "early_stopping": "never", "length_penalty": penalty}
        settings["num_return_sequences"] = len(expected)
        found = backend.generate_output(model, prompt, max_new_tokens=length, **settings)
        texts = [
            tuple(row[: (indices >= 0).sum()])
            for row, indices in zip(found.sequences[:, 3:].tolist(), found.beam_indices, strict=True)
        ]
        assert texts == [text for text, _ in expected]
        compare(found.sequences_scores, np.array([score for _, score in expected]), FLOAT64)


PROMPTS = np.array([[9, 20, 300, 41, 7], [1, 1, 50, 61, 72], [1, 1, 1, 1, 400]])
PADDED_LEFT = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
DRAWN = {
    "max_new_tokens": 6,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 1.5,
    "top_k": 40,
    "seed": 4,
    "num_return_sequences": 2,
    "eos_token_id": [2, 435],
}
FORMS = {
    "drawn": DRAWN,
    "beams": {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
    "groups": {"max_new_tokens": 6, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    "forced": {"max_new_tokens": 6, "num_beams": 3, "force_words_ids": [[5, 6], [[7], [8, 9]]]},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_a_batch_is_the_row_alone(backend, load, form):
    """Padding on either side, too. transformers#17514."""
    if backend.compiles and form != "drawn":
        pytest.skip("four more programs to compile, with nothing new about rows")
    model, settings = load(backend, "post_ln_proj"), FORMS[form]
    batch = backend.generate(model, PROMPTS, PADDED_LEFT, **settings)
    right = np.array([[9, 20, 300, 41, 7], [50, 61, 72, 1, 1], [400, 1, 1, 1, 1]])
    found = backend.generate(model, right, PADDED_LEFT[:, ::-1].copy(), **settings)
    np.testing.assert_array_equal(found[:, 5:], batch[:, 5:])
    copies = settings.get("num_return_sequences", 1)
    for row in range(3):
        # Alone as the first of three copies, so that one program serves all rows.
        alone = backend.generate(model, PROMPTS[[row] * 3], PADDED_LEFT[[row] * 3], **settings)
        width = min(alone.shape[1], batch.shape[1])
        np.testing.assert_array_equal(alone[:copies, 5:width], batch[row * copies : (row + 1) * copies, 5:width])
        if not backend.compiles:
            prompt = PROMPTS[row : row + 1, PADDED_LEFT[row] == 1]
            indeed = backend.generate(model, prompt, **settings)[:, prompt.shape[1] :]
            np.testing.assert_array_equal(indeed, alone[:copies, 5:][:, : indeed.shape[1]])


def test_one_seed_one_text_with_beams(backends, load):
    texts = {}
    for seed in (4, 5):
        settings = DRAWN | {"seed": seed}
        texts[seed] = [
            backend.generate(load(backend, "post_ln_proj"), PROMPTS, PADDED_LEFT, **settings) for backend in backends
        ]
        for text in texts[seed][1:]:
            np.testing.assert_array_equal(text, texts[seed][0])
    assert texts[4][0].shape != texts[5][0].shape or (texts[4][0] != texts[5][0]).any()


@pytest.mark.parametrize("form", FORMS)
def test_without_a_cache_the_same(backends, load, form):
    for backend in backends:
        if backend.compiles:
            continue  # the reader that does without is opt_common's; tests/test_decoding.py has it in every framework
        model = load(backend, "post_ln_proj")
        with_cache = backend.generate(model, PROMPTS, PADDED_LEFT, **FORMS[form])
        np.testing.assert_array_equal(
            backend.generate(model, PROMPTS, PADDED_LEFT, use_cache=False, **FORMS[form]), with_cache
        )


def test_beams_end_by_any_rule(backends, load):
    """A criterion that names a token ends what that end-of-text id does."""
    for backend in backends:
        if backend.compiles:
            continue  # the rules are opt_common's
        model, settings = load(backend, "post_ln_proj"), FORMS["beams"] | {"early_stopping": True, "pad_token_id": 1}
        expected = backend.generate(model, PROMPTS, PADDED_LEFT, **settings, eos_token_id=335)
        found = backend.generate(
            model, PROMPTS, PADDED_LEFT, **settings, eos_token_id=[], stopping_criteria=lambda ids: ids[:, -1] == 335
        )
        np.testing.assert_array_equal(found, expected)
        assert (expected == 335).any(), "an end must have been met for this test to say anything"


def test_what_is_forced_is_there(backends, load):
    """Phrases and choices, also where Hugging Face returns likelier texts without them."""
    settings = {"max_new_tokens": 8, "num_beams": 6, "num_return_sequences": 2, "force_words_ids": [[5, 6]]}
    for backend in backends:
        if backend.compiles:
            continue
        model = load(backend, "pre_ln")
        found = backend.generate(model, PROMPTS, PADDED_LEFT, **settings)
        for row in found[::2, 5:].tolist():
            assert any(row[place : place + 2] == [5, 6] for place in range(7)), row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length_penalty": 0.5}, "length_penalty would change nothing: the strategy is greedy_search"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature would change nothing: the strategy is beam_search"),
        ({"num_beams": 2, "diversity_penalty": 0.5}, "diversity_penalty would change nothing"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3, more than the 2 of num_beams"),
        ({"num_beams": 3, "num_beam_groups": 2, "diversity_penalty": 1.0}, "a multiple of num_beam_groups"),
        ({"num_beams": 4, "num_beam_groups": 2}, "all groups are the same"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
            "do_sample would change nothing: the strategy is group_beam_search",
        ),
        ({"force_words_ids": [[5]]}, "need beams to choose from"),
        ({"num_beams": 2, "force_words_ids": [[]]}, "force_words_ids is"),
        ({"num_beams": 2, "early_stopping": "always"}, 'early_stopping is .*, expected True, False or "never"'),
        (
            {"num_beams": 2, "bad_words_ids": [[token] for token in range(512)], "min_new_tokens": 1},
            "Row 0 cannot go on after 0 new tokens",
        ),
    ],
)
def test_settings_that_cannot_be(backends, load, settings, message):
    for backend in backends:
        if not backend.compiles:
            with pytest.raises(GenerationError, match=message):
                backend.generate(load(backend, "pre_ln"), PROMPTS, PADDED_LEFT, max_new_tokens=2, **settings)


def test_more_texts_than_there_are(backends):
    for backend in backends:
        if not backend.compiles:
            settings = {"num_beams": 8, "num_return_sequences": 5, "max_new_tokens": 1}
            with pytest.raises(GenerationError, match="num_return_sequences is 5, but prompt 0 has 4 continuations"):
                backend.generate(backend.build(TINY), np.array([[0, 3]]), **settings)


def test_settings_of_beams_survive_their_file():
    config = GenerationConfig(num_beams=4, force_words_ids=[[5, 6], [[7], [8, 9]]], early_stopping="never")
    values = json.loads(json.dumps(config.to_dict()))
    assert values["force_words_ids"] == [[5, 6], [[7], [8, 9]]]
    assert GenerationConfig(**values) == config
