"""Classifier-free guidance: Hugging Face's texts, the rule's own texts, rows, and the same in three frameworks."""

import contextlib
import importlib
import itertools
import json

import numpy as np
import pytest

from opt_common import guidance
from opt_common.cli_writer import Collector
from opt_common.errors import GenerationError, InputError
from opt_common.generation_config import GenerationConfig
from tests import plain_loops
from tests.cases import SMALL_VARIANTS, config_of
from tests.paths import GOLDENS
from tests.test_generate_bounds import MASK, PROMPTS, tiny
from tests.tolerances import FLOAT32, FLOAT64, compare

__all__ = ["tiny"]

NAMES = ("negative_prompt_ids", "negative_prompt_attention_mask")


def golden_cases(variant):
    if not (file := GOLDENS / variant / "generation_guidance.json").exists():
        return []  # only two of this repository's golden models have these continuations
    return json.loads(file.read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("variant", [variant for variant in SMALL_VARIANTS if golden_cases(variant)])
def test_guidance_goldens(backend, load, variant):
    for case in golden_cases(variant):
        ids, mask, golden = (np.array(case[key]) for key in ("input_ids", "attention_mask", "output_ids"))
        negative = {name: backend.tensor(np.array(case[name])) for name in NAMES if name in case}
        # Compiled as it always is for users, unless running it as it is written is quicker and the other has been seen.
        quick = backend.name == "tf" and (variant, case["name"]) != ("pre_ln", "guidance_2_leftpad_negative")
        with backend.uncompiled() if quick else contextlib.nullcontext():
            found = backend.generate(load(backend, variant), ids, mask, **negative, **case["kwargs"])
        np.testing.assert_array_equal(found, golden, err_msg=case["name"])


NEGATIVE = np.array([[9, 10, 11, 1, 1, 1, 1], [1, 8, 12, 13, 14, 15, 16], [1, 60, 1, 1, 1, 50, 51]])
NEGATIVE_MASK = np.array([[1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 1, 1]])
"""Padding on the right, on the left and in between, and longer than the prompts."""

SETTINGS = {"guidance_scale": 2.5, "repetition_penalty": 1.3, "max_new_tokens": 6, "eos_token_id": []}
ASKED = {"output_scores": True, "output_logits": True}


def away(backend, rows=slice(None), mask=NEGATIVE_MASK):
    """The negative prompts of some rows."""
    return dict(zip(NAMES, (backend.tensor(array[rows]) for array in (NEGATIVE, mask)), strict=True))


def text_of(backend, model, ids, mask=None, **changes):
    """Continue by the programs that most tests run."""
    return backend.generate_output(model, ids, mask, **(SETTINGS | changes), **ASKED).sequences


@pytest.mark.parametrize("negative", [True, False])
def test_texts_and_records_are_those_of_the_rule(backend, backends, tiny, negative):
    """Each row is what a loop over the NumPy reference gives for it alone; logits are the prompt's own."""
    model = tiny[backend.name]
    read = plain_loops.reader(model.config, backends[0].parameters(tiny[backends[0].name]))
    given = away(backend) if negative else {}
    found = backend.generate_output(model, PROMPTS, MASK, **SETTINGS, **ASKED, **given)
    assert int(found.past_key_values.length) == 10
    for row, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
        text = prompt[mask == 1].tolist()
        second = NEGATIVE[row][NEGATIVE_MASK[row] == 1].tolist() if negative else text[-1:]
        loop = plain_loops.guidance(model.config, read, text, second, GenerationConfig(**SETTINGS))
        for step, (token, scores) in enumerate(itertools.islice(loop, 6)):
            assert found.sequences[row, 5 + step] == token
            compare(found.scores[step][row], scores, FLOAT32)
            compare(found.logits[step][row], read(text).logits[0, -1], FLOAT32)
            compare(found.token_logprobs[row, step], scores[token] - np.log(np.exp(scores).sum()), FLOAT32)
            text.append(token)
    longer = np.concatenate([MASK, np.ones((3, 6), int)], axis=1)
    # The cache that comes back is the texts' own: it is continued without guidance as if read without.
    past = {"past_key_values": found.past_key_values, "max_new_tokens": 3, "eos_token_id": []}
    anew = backend.generate(model, found.sequences, longer, max_new_tokens=3, eos_token_id=[])
    np.testing.assert_array_equal(backend.generate(model, found.sequences, longer, **past), anew)


def test_rows_sides_and_other_values(backend, tiny):
    """A row of a batch is the row alone, padding on either side (transformers#17514); the programs are there."""
    model = tiny[backend.name]
    batch = text_of(backend, model, PROMPTS, MASK, **away(backend))
    before = backend.compilations()
    right = np.stack([np.roll(row, -int((mask == 0).sum())) for row, mask in zip(PROMPTS, MASK, strict=True)])
    found = text_of(backend, model, right, MASK[:, ::-1].copy(), **away(backend))
    np.testing.assert_array_equal(found[:, 5:], batch[:, 5:])
    for row in range(3):
        # Alone as three copies, so that one program serves all rows; one negative prompt serves all of them.
        one = away(backend, slice(row, row + 1))
        alone = text_of(backend, model, PROMPTS[[row] * 3], MASK[[row] * 3], **one)
        np.testing.assert_array_equal(alone, batch[[row] * 3])
    text_of(backend, model, PROMPTS[:, 1:], MASK[:, 1:], guidance_scale=-0.7)
    assert backend.compilations() == before
    streamer = Collector()
    backend.generate_output(model, PROMPTS, MASK, streamer=streamer, **SETTINGS, **ASKED, **away(backend))
    np.testing.assert_array_equal(streamer.new_ids(), batch[:, 5:])


FORMS = {
    "greedy": {},
    "drawn": {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "drawn beams": {"num_beams": 3, "do_sample": True, "seed": 5},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    "words": {"num_beams": 3, "force_words_ids": [[20, 21]]},
}


@pytest.mark.parametrize("form", FORMS)
def test_without_a_cache_alone_and_behind_a_past(backends, tiny, form):
    """Every way to read gives one text; what is read, and how often, is opt_common's."""
    (backend,) = (backend for backend in backends if not backend.compiles)
    model, settings = tiny[backend.name], SETTINGS | FORMS[form]
    wanted = backend.generate(model, PROMPTS, MASK, **settings, **away(backend))
    assert (wanted != backend.generate(model, PROMPTS, MASK, **(settings | {"guidance_scale": 1}))).any()
    found = backend.generate(model, PROMPTS, MASK, use_cache=False, **settings, **away(backend))
    np.testing.assert_array_equal(found, wanted)
    copies = len(wanted) // 3
    for row in range(3):
        alone = backend.generate(model, PROMPTS[row : row + 1, MASK[row] == 1], **settings, **away(backend, [row]))
        np.testing.assert_array_equal(alone[:, -6:], wanted[row * copies : (row + 1) * copies, -6:])
    past = backend.forward(model, input_ids=PROMPTS[:, :4], attention_mask=MASK[:, :4], use_cache=True)
    found = backend.generate(model, PROMPTS, MASK, past_key_values=past.cache, **settings, **away(backend))
    np.testing.assert_array_equal(found, wanted)
    short = {"negative_prompt_ids": backend.tensor(np.array([[9, 10]]))}
    wanted = backend.generate(model, PROMPTS, MASK, **settings, **short)
    found = backend.generate(model, PROMPTS, MASK, past_key_values=past.cache, **settings, **short)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scores_are_those_of_the_definition(backend, dtype):
    module = importlib.import_module(f"{backend.package.__name__}.guidance")
    rng = np.random.default_rng(3)
    logits, others = (rng.normal(size=(4, 40)).astype(dtype) * 5 for _ in range(2))
    for scale in (-1.0, 0.0, 0.5, 1.0, 3.0):
        with backend.precision(dtype):
            found = backend.array(module.guided(*map(backend.tensor, (logits, others, np.array(scale)))))
        compare(
            found, guidance.guided(logits, others, np.array(scale, dtype)), FLOAT32 if dtype == "float32" else FLOAT64
        )


def the_other_way_round(logits, others, scale):
    return guidance.guided(others, logits, scale)


def the_difference_alone(logits, others, scale):
    return guidance.guided(logits, others, scale) - others


@pytest.mark.parametrize("mutation", [the_other_way_round, the_difference_alone])
def test_a_wrong_rule_is_noticed(backends, load, mutation, monkeypatch):
    """By the goldens, in PyTorch, whose function takes NumPy's place for it; as it is, the rule passes there."""
    (backend,) = (backend for backend in backends if not backend.compiles)
    module = importlib.import_module(f"{backend.package.__name__}.selection")
    model, cases = load(backend, "pre_ln"), golden_cases("pre_ln")
    negatives = [{name: backend.tensor(np.array(case[name])) for name in NAMES if name in case} for case in cases]

    def texts(rule):
        def replaced(*tensors):
            return backend.tensor(rule(*map(backend.array, tensors)).astype(np.float32))

        monkeypatch.setattr(module, "guided", replaced)
        return [
            backend.generate(
                model, np.array(case["input_ids"]), np.array(case["attention_mask"]), **given, **case["kwargs"]
            ).tolist()
            for case, given in zip(cases, negatives, strict=True)
        ]

    goldens = [case["output_ids"] for case in cases]
    assert texts(guidance.guided) == goldens
    assert texts(mutation) != goldens


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"guidance_scale": "2"}, GenerationError, "guidance_scale is '2', expected a number"),
        ({"guidance_scale": float("inf")}, GenerationError, "guidance_scale is inf"),
        (
            {"guidance_scale": 2, "penalty_alpha": 0.6, "top_k": 4},
            GenerationError,
            "can't be had with contrastive_search",
        ),
        ({"guidance_scale": 2, "dola_layers": "high"}, GenerationError, "can't be had with dola_generation"),
        ({"negative_prompt_ids": [[5]]}, GenerationError, "negative_prompt_ids would change nothing"),
        (
            {"guidance_scale": 1, "negative_prompt_ids": [[5]]},
            GenerationError,
            "negative_prompt_ids would change nothing",
        ),
        ({"guidance_scale": 2, "negative_prompt_attention_mask": [[1]]}, GenerationError, "which are not given"),
        ({"guidance_scale": 2, "negative_prompt_ids": [[5], [6]]}, GenerationError, "has 2 rows, expected 3"),
        (
            {"guidance_scale": 2, "negative_prompt_ids": [[64]]},
            InputError,
            "negative prompt: input_ids has the value 64",
        ),
        (
            {"guidance_scale": 2, "negative_prompt_ids": [[5]], "negative_prompt_attention_mask": [[0]]},
            GenerationError,
            "Negative prompt 0 is empty",
        ),
        ({"guidance_scale": 2, "negative_prompt_ids": [[5] * 125]}, GenerationError, "do not fit"),
        ({"guidance_scale": 2, "inputs_embeds": np.zeros((3, 5, 16), np.float32)}, GenerationError, "inputs_embeds"),
    ],
)
def test_what_cannot_be(backends, tiny, settings, error, message):
    backend = backends[0]
    settings = {
        name: backend.tensor(np.array(value)) if name in (*NAMES, "inputs_embeds") else value
        for name, value in settings.items()
    }
    with pytest.raises(error, match=message):
        backend.generate(tiny[backend.name], PROMPTS, MASK, max_new_tokens=6, **settings)


def test_settings_survive_their_file(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(GenerationConfig(guidance_scale=1.5).to_dict()))
    assert GenerationConfig.from_directory(tmp_path, config_of("pre_ln")).guidance_scale == 1.5
