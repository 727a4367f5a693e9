"""Contrastive search: Hugging Face's texts, the rule's own texts, rows, and the same in three frameworks."""

import collections
import contextlib
import importlib
import itertools
import json

import numpy as np
import pytest

from opt_common import contrastive
from opt_common.cli_writer import Collector
from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from tests import plain_loops
from tests.cases import SMALL_VARIANTS, config_of
from tests.paths import GOLDENS
from tests.test_generate_bounds import MASK, PROMPTS, tiny
from tests.tolerances import FLOAT32, FLOAT64, compare

__all__ = ["tiny"]


def golden_cases():
    """For each variant, width and weight of the penalty: the cases that differ in their prompts alone."""
    groups = collections.defaultdict(list)
    for variant in SMALL_VARIANTS:
        if not (file := GOLDENS / variant / "generation_contrastive.json").exists():
            continue  # only this repository's golden models have these continuations
        for case in json.loads(file.read_text(encoding="utf-8"))["cases"]:
            settings = {name: value for name, value in case["kwargs"].items() if name != "max_new_tokens"}
            groups[variant, json.dumps(settings)].append(case)
    return [pytest.param(variant, cases, id=f"{variant}-{cases[0]['name']}") for (variant, _), cases in groups.items()]


@pytest.mark.parametrize(("variant", "cases"), golden_cases())
def test_contrastive_goldens(backend, load, variant, cases):
    """One by one, and, where programs are compiled, all rows as one batch, whatever the number of their new tokens."""
    model = load(backend, variant)
    if not backend.compiles:
        for case in cases:
            ids, mask, golden = (np.array(case[key]) for key in ("input_ids", "attention_mask", "output_ids"))
            np.testing.assert_array_equal(backend.generate(model, ids, mask, **case["kwargs"]), golden)
        return
    ids, mask = (np.concatenate([case[key] for case in cases]) for key in ("input_ids", "attention_mask"))
    longest = max(case["kwargs"]["max_new_tokens"] for case in cases)
    # Compiled as it always is for users, unless running it as it is written is quicker and the other has been seen.
    with (
        backend.uncompiled()
        if backend.name == "tf" and (variant, len(cases)) != (SMALL_VARIANTS[0], 3)
        else contextlib.nullcontext()
    ):
        found = iter(backend.generate(model, ids, mask, **(cases[0]["kwargs"] | {"max_new_tokens": longest})))
    for golden in itertools.chain.from_iterable(case["output_ids"] for case in cases):
        np.testing.assert_array_equal(next(found)[: len(golden)], golden)


SETTINGS = {"penalty_alpha": 0.6, "top_k": 4, "repetition_penalty": 1.3, "max_new_tokens": 6, "eos_token_id": []}
ASKED = {"output_scores": True, "output_logits": True}


def text_of(backend, model, ids, mask=None, **changes):
    """Continue by the programs that most tests run."""
    return backend.generate_output(model, ids, mask, **(SETTINGS | changes), **ASKED).sequences


def weights_of(backends, model_of):
    """The reference on the weights of a model."""
    model = model_of[backends[0].name]
    return plain_loops.reader(model.config, backends[0].parameters(model))


def test_texts_and_records_are_those_of_the_rule(backend, backends, tiny):
    """Each row is what a loop over the NumPy reference gives for it alone, with processors; scores are those it saw."""
    read, model = weights_of(backends, tiny), tiny[backend.name]
    found = backend.generate_output(model, PROMPTS, MASK, **SETTINGS, **ASKED)
    assert found.past_key_values is None
    assert len(found.scores) == len(found.logits) == 6
    for row, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
        text = prompt[mask == 1].tolist()
        loop = plain_loops.contrastive(model.config, read, text, GenerationConfig(**SETTINGS))
        for step, (token, scores) in enumerate(itertools.islice(loop, 6)):
            assert found.sequences[row, 5 + step] == token
            compare(found.scores[step][row], scores, FLOAT32)
            compare(found.logits[step][row], read(text).logits[0, -1], FLOAT32)
            logprob = scores[token] - np.log(np.exp(scores).sum())
            compare(found.token_logprobs[row, step], logprob, FLOAT32)
            text.append(token)


def test_rows_and_sides(backend, tiny):
    """A row of a batch is the row alone, padding on either side (transformers#17514); finished rows emit padding."""
    model = tiny[backend.name]
    batch = text_of(backend, model, PROMPTS, MASK)
    right = np.stack([np.roll(row, -int((mask == 0).sum())) for row, mask in zip(PROMPTS, MASK, strict=True)])
    found = text_of(backend, model, right, MASK[:, ::-1].copy())
    np.testing.assert_array_equal(found[:, 5:], batch[:, 5:])
    for row in range(3):
        # Alone as three copies, so that one program serves all rows.
        alone = text_of(backend, model, PROMPTS[[row] * 3], MASK[[row] * 3])
        np.testing.assert_array_equal(alone, batch[[row] * 3])
        if not backend.compiles:
            prompt = PROMPTS[row : row + 1, MASK[row] == 1]
            alone = text_of(backend, model, prompt)
            np.testing.assert_array_equal(alone[0, prompt.shape[1] :], batch[row, 5:])
    end = int(batch[1, 6])
    assert end not in batch[0, 5:], "for another row to go on"
    ended = text_of(backend, model, PROMPTS, MASK, eos_token_id=end, pad_token_id=3)
    np.testing.assert_array_equal(ended[0], batch[0])
    stop = 5 + int(np.flatnonzero(batch[1, 5:] == end)[0])
    np.testing.assert_array_equal(ended[1, : stop + 1], batch[1, : stop + 1])
    assert (ended[1, stop + 1 :] == 3).all()


def test_embeddings_no_cache_and_more_candidates_than_tokens(backends, tiny):
    """Every way to read gives one text; with as many candidates as tokens, all of them are tried."""
    for backend in backends:
        if backend.compiles:
            continue  # what is read, and how often, is opt_common's
        model = tiny[backend.name]
        wanted = backend.generate(model, PROMPTS, MASK, **SETTINGS)
        np.testing.assert_array_equal(backend.generate(model, PROMPTS, MASK, use_cache=False, **SETTINGS), wanted)
        embeds = backend.tensor(backend.parameters(model)["model.decoder.embed_tokens.weight"][PROMPTS])
        found = backend.generate(model, None, MASK, inputs_embeds=embeds, **SETTINGS)
        np.testing.assert_array_equal(found, wanted[:, 5:])
        streamer = Collector()
        backend.generate(model, PROMPTS, MASK, streamer=streamer, **SETTINGS)
        np.testing.assert_array_equal(streamer.new_ids(), wanted[:, 5:])
        all_tokens = SETTINGS | {"top_k": 64}
        wanted = backend.generate(model, PROMPTS, MASK, **all_tokens)
        np.testing.assert_array_equal(backend.generate(model, PROMPTS, MASK, **(all_tokens | {"top_k": 500})), wanted)


def test_a_token_that_is_ruled_out_is_no_candidate(backends, tiny):
    """Where fewer tokens than candidates are left, and where none is."""
    for backend in backends:
        if backend.compiles:
            continue
        model = tiny[backend.name]
        settings = SETTINGS | {"suppress_tokens": [token for token in range(64) if token not in (9, 11)]}
        found = backend.generate(model, PROMPTS, MASK, **settings)[:, 5:]
        assert set(found.ravel().tolist()) <= {9, 11}
        with pytest.raises(GenerationError, match="Row 0 cannot go on after 0 new tokens"):
            backend.generate(model, PROMPTS, MASK, **(SETTINGS | {"suppress_tokens": list(range(64))}))


def candidates(dtype):
    """States, context, candidates' states, log-probabilities of three texts with four candidates each."""
    rng = np.random.default_rng(5)
    states, new = rng.normal(size=(12, 7, 16)).astype(dtype), rng.normal(size=(12, 16)).astype(dtype)
    context = rng.random((12, 7)) < 0.7
    context[:, 2] = True
    logprobs = np.log(rng.dirichlet(np.ones(4), 3)).astype(dtype)
    states[1, 2], new[5], new[9] = 0, 0, np.nan
    states[4, 3] = new[4]
    context[4, 3] = False
    logprobs[2, 3], logprobs[0, :2] = -np.inf, logprobs[0, 0]
    states[:2], new[:2], context[:2] = states[0], new[0], context[0]
    return states, context, new, logprobs


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_preferred_candidate_is_that_of_the_definition(backend, dtype):
    """Ties, directions without a length, candidates that are none, and hidden states that are not numbers."""
    module = importlib.import_module(f"{backend.package.__name__}.contrastive")
    arrays = candidates(dtype)
    for alpha in (0.0, 0.3, 0.6, 1.0):
        wanted = contrastive.preferred(*arrays, np.array(alpha))
        with backend.precision(dtype):
            tensors = [backend.tensor(array) for array in (*arrays, np.array(alpha))]
            np.testing.assert_array_equal(backend.array(module.preferred(*tensors)), wanted)
            for vectors in arrays[0], arrays[2][:9]:
                found = backend.array(module.directions(backend.tensor(vectors)))
                compare(found, contrastive.directions(vectors), FLOAT32 if dtype == "float32" else FLOAT64)


def padding_compared(states, context, new, logprobs, alpha):
    return contrastive.preferred(states, np.ones_like(context), new, logprobs, alpha)


def likeness_rewarded(states, context, new, logprobs, alpha):
    return contrastive.preferred(states, context, -new, logprobs, alpha)


def without_a_penalty(states, context, new, logprobs, alpha):
    return contrastive.preferred(states, context, new, logprobs, 0 * alpha)


def lengths_counted(states, context, new, logprobs, alpha):
    penalty = np.where(context, (states * new[:, None]).sum(-1), -np.inf).max(1).reshape(logprobs.shape)
    return ((1 - alpha) * np.exp(logprobs) - alpha * penalty).argmax(1)


@pytest.mark.parametrize("mutation", [padding_compared, likeness_rewarded, without_a_penalty, lengths_counted])
def test_a_wrong_rule_is_noticed(backends, load, mutation, monkeypatch):
    """By the goldens, in PyTorch, whose function takes NumPy's place for it; as it is, the rule passes there."""
    (backend,) = (backend for backend in backends if not backend.compiles)
    module = importlib.import_module(f"{backend.package.__name__}.generation")
    model = load(backend, "post_ln_proj")
    cases = [case for param in golden_cases() for case in param.values[1] if param.values[0] == "post_ln_proj"]

    def texts(rule):
        def replaced(*tensors):
            return backend.tensor(rule(*map(backend.array, tensors)))

        monkeypatch.setattr(module, "preferred", replaced)
        return [
            backend.generate(model, np.array(case["input_ids"]), np.array(case["attention_mask"]), **case["kwargs"])
            for case in cases
        ]

    goldens = [case["output_ids"] for case in cases]
    assert [text.tolist() for text in texts(contrastive.preferred)] == goldens
    assert [text.tolist() for text in texts(mutation)] != goldens


def test_other_prompts_and_penalties_need_no_other_program(backend, tiny):
    """One program for the prompts of a bucket, one that makes rows of candidates, one for all other tokens."""
    if not backend.compiles:
        pytest.skip(f"{backend.name} runs its steps as they are written")
    model = tiny[backend.name]
    text_of(backend, model, PROMPTS, MASK)
    before = backend.compilations()
    text_of(backend, model, PROMPTS[:, 1:], MASK[:, 1:], penalty_alpha=0.2, max_new_tokens=4)
    assert backend.compilations() == before
    text_of(backend, model, PROMPTS, MASK, max_new_tokens=30)
    assert backend.compilations() == before + 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty_alpha": 1.5}, "penalty_alpha is 1.5, expected a number from 0 to 1"),
        ({"penalty_alpha": -0.1}, "penalty_alpha is -0.1"),
        ({"penalty_alpha": float("nan")}, "penalty_alpha is nan"),
        ({"penalty_alpha": 0.0}, "penalty_alpha would change nothing: the strategy is greedy_search"),
        ({"penalty_alpha": 0.6, "do_sample": True}, "penalty_alpha would change nothing: the strategy is sample"),
        ({"penalty_alpha": 0.6, "num_beams": 2}, "penalty_alpha would change nothing: the strategy is beam_search"),
        ({"penalty_alpha": 0.6, "top_k": 1}, "top_k is 1, but penalty_alpha chooses among top_k candidates"),
        ({"penalty_alpha": 0.6, "top_k": 0}, "top_k is 0, but"),
        ({"penalty_alpha": 0.6, "temperature": 0.5}, "temperature would change nothing: the strategy is contrastive"),
        ({"penalty_alpha": 0.6, "num_return_sequences": 2}, "num_return_sequences would change nothing"),
        ({"top_k": 4}, "top_k would change nothing: the strategy is greedy_search"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(GenerationError, match=message):
        GenerationConfig().updated(**settings)


def test_what_there_is_no_room_for_and_what_a_cache_lacks(backends, tiny):
    """Candidates are read, the last token's too, which needs a position; their context is more than a cache has."""
    backend, limit = backends[0], 128
    model = tiny[backend.name]
    ids = np.full((1, limit - 1), 5)
    assert backend.generate(model, ids, **(SETTINGS | {"max_new_tokens": 1})).shape == (1, limit)
    with pytest.raises(GenerationError, match="pass max_new_tokens=1 or less"):
        backend.generate(model, ids, **(SETTINGS | {"max_new_tokens": 2}))
    past = backend.forward(model, input_ids=PROMPTS[:, :3], attention_mask=MASK[:, :3], use_cache=True, checked=True)
    with pytest.raises(GenerationError, match="past_key_values can't be continued by contrastive search"):
        backend.generate(model, PROMPTS, MASK, past_key_values=past.cache, **SETTINGS)


def test_settings_survive_their_file(tmp_path):
    settings = {"penalty_alpha": 0.6, "top_k": 4, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(GenerationConfig(**settings).to_dict()))
    found = GenerationConfig.from_directory(tmp_path, config_of("pre_ln"))
    assert (found.strategy, found.penalty_alpha, found.top_k) == ("contrastive_search", 0.6, 4)
    assert found.updated(do_sample=True).strategy == "sample"
