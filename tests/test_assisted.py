"""Assisted generation: the text that there is without guesses, the distribution that there is, and sooner."""

import contextlib
import importlib
import itertools
import json

import numpy as np
import pytest

from opt_common import assisted
from opt_common.decoding import Prompt, Reader, Selection
from opt_common.errors import GenerationError
from opt_common.generation import bucket, draw_uniforms
from opt_common.generation_config import GenerationConfig
from opt_common.processors import choose, softmax
from opt_common.streaming import TextStreamer
from opt_common.tokenizer import OPTTokenizer
from tests import plain_loops
from tests.test_generate_bounds import TINY
from tests.tolerances import FLOAT32, compare

NEW = 5
GUESSES = 3
LOOKUP = {"prompt_lookup_num_tokens": GUESSES}
PENALTIES = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[20, 30], [9]],
    "min_new_tokens": 4,
    "begin_suppress_tokens": [5],
    "suppress_tokens": [7],
    "forced_eos_token_id": 9,
    "exponential_decay_length_penalty": (2, 1.5),
    "eos_token_id": [3, 4],
}
"""Settings that look at the text, and at how long it is."""

DRAWN = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95}


@pytest.fixture(scope="module")
def pairs(backends):
    """A model and one that guesses well, but not always right, with the same weights in each framework."""
    config = TINY.replace(ffn_dim=40)
    rng = np.random.default_rng(0)
    weights = backends[0].parameters(backends[0].build(config))
    near = {
        name: (value + rng.normal(0, 0.03, value.shape)).astype(np.float32) if value.ndim == 2 else value
        for name, value in weights.items()
    }
    found = {}
    for backend in backends:
        found[backend.name] = tuple(backend.build(config) for _ in range(2))
        for model, values in zip(found[backend.name], (weights, near), strict=True):
            for parameter in backend.table(model):
                backend.set(model, parameter, values[parameter.name])
    return found, (weights, near)


def helped(draft):
    """Settings of guesses by a model."""
    return {"assistant_model": draft, "num_assistant_tokens": GUESSES}


def prompts(count, longest, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 64, (1, rng.integers(1, longest + 1))) for _ in range(count)]


@contextlib.contextmanager
def rounds(backend, model):
    """How many guesses each step of a model had to drop, while its runs go on."""
    module = importlib.import_module(f"{backend.package.__name__}.generation")
    dropped, forget = [], module.Decoder.forget

    def counted(self, count):
        if self.model is model:
            dropped.append(count)
        forget(self, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Decoder, "forget", counted)
        yield dropped


def test_a_thousand_greedy_texts_are_those_without_guesses(backend, pairs):
    """By guesses of a model for one half, of the text for the other: token for token, whether guesses hold or not."""
    model, draft = pairs[0][backend.name]
    texts = prompts(300 if backend.compiles else 1000, 12, seed=1)
    ids = np.array([[1] * (12 - text.shape[1]) + text[0].tolist() for text in texts])
    mask = np.array([[0] * (12 - text.shape[1]) + [1] * text.shape[1] for text in texts])
    wanted = backend.generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=[])[:, 12:]
    for first, settings in enumerate((helped(draft), LOOKUP)):
        with rounds(backend, model) as dropped:
            for text, new in list(zip(texts, wanted, strict=True))[first::2]:
                found = backend.generate(model, text, max_new_tokens=NEW, eos_token_id=[], **settings)
                np.testing.assert_array_equal(found[0, text.shape[1] :], new)
        assert 0 in dropped, "some guesses must all have held"
        assert GUESSES in dropped, "some must all have been wrong"


BOTH = PENALTIES | DRAWN
LONG = {"max_new_tokens": 12}


@pytest.mark.parametrize("settings", [PENALTIES, DRAWN, BOTH], ids=["greedy", "drawn", "both"])
def test_processors_act_on_each_guess_as_on_any_token(backend, pairs, settings):
    """Greedy, and drawn with guesses from the text: the very text that there is without, by the same seed."""
    model, draft = pairs[0][backend.name]
    if backend.compiles and settings is not BOTH:
        pytest.skip("each needs programs of its own")
    ways = [LOOKUP] if "do_sample" in settings else [LOOKUP, helped(draft)]
    for seed, text in enumerate(prompts(8, 12, seed=2)):
        seeded = {"seed": seed} if "do_sample" in settings else {}
        wanted = backend.generate(model, text, **LONG, **settings, **seeded)
        for way in ways:
            found = backend.generate(model, text, **LONG, **settings, **seeded, **way)
            np.testing.assert_array_equal(found, wanted)


def test_drawn_guesses_follow_the_rule(backend, pairs):
    """The text of a loop over the NumPy reference, with the same numbers; so it is the same in each framework."""
    (model, draft), weights = pairs[0][backend.name], pairs[1]
    read, guess = (plain_loops.reader(model.config, values) for values in weights)
    settings = {"repetition_penalty": 1.3, "eos_token_id": [], **DRAWN}
    kept = []
    for seed, text in enumerate(prompts(6, 12, seed=3)):
        loop_settings = GenerationConfig(num_assistant_tokens=GUESSES, **settings)
        numbers = draw_uniforms(text, np.ones_like(text), 12 + GUESSES, seed, draws=assisted.DRAWS)[0]
        loop = plain_loops.assisted(model.config, read, guess, text[0].tolist(), loop_settings, numbers)
        wanted = list(itertools.islice(loop, 12))
        found = backend.generate(model, text, seed=seed, **LONG, **settings, **helped(draft))
        np.testing.assert_array_equal(found[0, text.shape[1] :], [token for token, _ in wanted])
        kept += [guessed for _, guessed in wanted]
    assert 0.3 < np.mean(kept) < 0.9, "guesses must have held and failed"


def test_records_and_caches_are_those_without_guesses(backend, pairs):
    """Scores, logits, log-probabilities; an end among the guesses; the cache, which is gone on with."""
    model, draft = pairs[0][backend.name]
    text = prompts(1, 12, seed=4)[0]
    free = backend.generate(model, text, eos_token_id=[], **LONG)[0, text.shape[1] :]
    end = int(free[6])
    asked = {"output_scores": True, "output_logits": True, "eos_token_id": [end], "repetition_penalty": 1.01}
    wanted = backend.generate_output(model, text, **asked, **LONG)
    for settings in (helped(draft), LOOKUP)[: 1 if backend.compiles else 2]:
        found = backend.generate_output(model, text, **asked, **LONG, **settings)
        np.testing.assert_array_equal(found.sequences, wanted.sequences)
        assert len(found.scores) == len(found.logits) == len(wanted.scores)
        for name in ("scores", "logits"):
            compare(np.stack(getattr(found, name)), np.stack(getattr(wanted, name)), FLOAT32, what=name)
        compare(found.token_logprobs, wanted.token_logprobs, FLOAT32)
        assert int(found.past_key_values.length) == int(wanted.past_key_values.length) == found.sequences.shape[1] - 1
        if backend.compiles:
            continue
        more = {"past_key_values": found.past_key_values, "max_new_tokens": 4, "eos_token_id": []}
        whole = backend.generate(model, found.sequences, max_new_tokens=4, eos_token_id=[])
        np.testing.assert_array_equal(backend.generate(model, found.sequences, **more), whole)
        np.testing.assert_array_equal(backend.generate(model, found.sequences, **more, **settings), whole)


def test_padding_embeddings_and_no_cache(backend, pairs):
    """Padding on either side is no part of the text (transformers#17514), and embeddings are read as given."""
    if backend.compiles:
        pytest.skip("what is read, and how, is the same code in each framework; compiling it takes long")
    model, draft = pairs[0][backend.name]
    text = prompts(1, 9, seed=5)[0]
    settings = {"eos_token_id": [], **LONG}
    new = backend.generate(model, text, **settings)[:, text.shape[1] :]
    pads = np.ones((1, 3), np.int64)
    embeds = backend.tensor(pairs[1][0]["model.decoder.embed_tokens.weight"][text])
    for way in (LOOKUP, helped(draft)):
        for ids, mask in (
            (np.concatenate([pads, text], axis=1), np.concatenate([0 * pads, text > 0], axis=1)),
            (np.concatenate([text, pads], axis=1), np.concatenate([text > 0, 0 * pads], axis=1)),
        ):
            np.testing.assert_array_equal(
                backend.generate(model, ids, mask, **settings, **way), np.concatenate([ids, new], axis=1)
            )
        for other in ({"use_cache": False}, {"inputs_embeds": embeds}):
            found = backend.generate(model, text, **settings, **way, **other)
            np.testing.assert_array_equal(found[:, text.shape[1] :], new)
    np.testing.assert_array_equal(backend.generate(model, None, inputs_embeds=embeds, **settings, **LOOKUP), new)


def test_the_last_position_may_be_used(backend):
    """Behind it there is nothing to guess for, in the model or in the one that guesses."""
    model = backend.build(TINY.replace(ffn_dim=44, max_position_embeddings=24))
    small = backend.build(TINY.replace(ffn_dim=44, max_position_embeddings=20))
    for length in (14,) if backend.compiles else (14, 10):
        text = np.arange(4, 4 + length)[None]
        wanted = backend.generate(model, text, max_new_tokens=25 - length, eos_token_id=[])
        ways = (LOOKUP, helped(model), helped(small), {**helped(model), "do_sample": True, "top_k": 1, "seed": 0})
        for way in ways[: 1 if backend.compiles else 4]:
            found = backend.generate(model, text, max_new_tokens=25 - length, eos_token_id=[], **way)
            np.testing.assert_array_equal(found, wanted)


def test_programs_are_few(backend):
    """Prompts of all lengths: one program for a bucket and one to check guesses, as many guesses as there may be."""
    if not backend.compiles:
        pytest.skip(f"{backend.name} runs its steps as they are written, so that there is nothing to compile")
    model, draft = (backend.build(TINY.replace(ffn_dim=width)) for width in (52, 56))
    lengths = [1, 15, 16]
    before = backend.compilations()
    for length in lengths:
        text = np.random.default_rng(length).integers(4, 64, (1, length))
        for new in (6, 8):
            backend.generate(model, text, max_new_tokens=new, eos_token_id=[], **helped(draft))
            backend.generate(model, text, max_new_tokens=new, eos_token_id=[], **LOOKUP)
    prefills = {(bucket(length), bucket(bucket(length) + new + GUESSES)) for length in lengths for new in (6, 8)}
    drafts = {(bucket(length + 1), bucket(bucket(length + 1) + new + GUESSES)) for length in lengths for new in (6, 8)}
    rooms, draft_rooms = ({room for _, room in shapes} for shapes in (prefills, drafts))
    # The model reads a prompt and checks guesses; the one that guesses reads a prompt, and one token or two.
    most = len(prefills) + len(rooms) + len(drafts) + 2 * len(draft_rooms)
    assert most - len(draft_rooms) <= backend.compilations() - before <= most


COPIES = 100_000
QUANTILE = 24.3
"""The 0.999 quantile of chi-square with seven degrees of freedom."""


def distributions():
    """Scores of a model and of one that guesses, of eight tokens; one token is ruled out by one of them only."""
    rng = np.random.default_rng(6)
    scores, own = rng.normal(0, 1, (2, 8)).astype(np.float32)
    own[2], own[5] = -np.inf, scores[5] + 2
    return scores, own


def statistic(found, scores):
    wanted = softmax(scores[None].astype(np.float64))[0] * COPIES
    counts = np.bincount(found, minlength=8)
    assert counts.sum() == COPIES
    return ((counts - wanted) ** 2 / wanted).sum()


def test_a_hundred_thousand_checked_guesses_have_the_distribution(backend):
    """A chi-square test of what the compiled steps select: a token, a guess, and what becomes of the guess."""
    module = importlib.import_module(f"{backend.package.__name__}.selection")
    history = importlib.import_module(f"{backend.package.__name__}.processors").History
    scores, own = distributions()
    uniforms = np.random.default_rng(7).random((4, COPIES), dtype=np.float32)

    def select(logits, name, *arguments):
        arrays = [np.repeat(logits[None], COPIES, axis=0), np.zeros((COPIES, 1), backend.id_dtype)]
        logits_BV, tokens_BS = map(backend.tensor, arrays)
        step = module.Step(
            logits_BV=logits_BV,
            history=history(tokens_BS=tokens_BS, attended_BS=tokens_BS, length=1),
            program=(),
            arguments=(),
            gates_P=backend.tensor(np.zeros(0)),
        )
        return module.select(step, Selection(name), tuple(map(backend.tensor, arguments)))

    plain = backend.array(select(scores, "token", uniforms[0])["tokens"])
    drafted = select(own, "draft", uniforms[1])
    guesses = backend.array(drafted["tokens"])
    found = backend.array(
        select(scores, "checked", guesses.astype(np.int32), uniforms[2], uniforms[3], drafted["shares"])["tokens"]
    )
    assert statistic(plain, scores) < QUANTILE
    assert statistic(found, scores) < QUANTILE
    assert statistic(guesses, scores) > 100 * QUANTILE, "the guesses themselves are far off"
    both = np.minimum(softmax(scores[None]), softmax(own[None])).sum()
    assert abs((found == guesses).mean() - both) < 4 * np.sqrt(both * (1 - both) / COPIES)
    shares = np.repeat(softmax(own[None]), COPIES, axis=0)
    logits = np.repeat(scores[None], COPIES, axis=0)
    wanted = assisted.checked(logits, shares, guesses, uniforms[2], uniforms[3])
    assert (found != wanted).sum() <= 2, "but for rounding, the definition"


def test_checks_meet_what_is_not_a_distribution(backend):
    """No guess, nothing possible, no numbers, and equal distributions."""
    module = importlib.import_module(f"{backend.package.__name__}.assisted")
    scores = np.zeros((5, 4), np.float32)
    scores[1], scores[2, 0], scores[4] = -np.inf, np.nan, [0, -np.inf, 0, 0]
    shares = softmax(np.zeros((5, 4), np.float32))
    guessed = np.array([-1, 1, 1, 1, 1], np.int32)
    numbers = np.full(5, 0.3, np.float32), np.full(5, 0.9999999, np.float32)
    wanted = assisted.checked(scores, shares, guessed, *numbers)
    found = backend.array(module.checked(*map(backend.tensor, (scores, shares, guessed, *numbers))))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found[:4], [1, -1, -1, 1])
    assert found[4] != 1


def always_kept(scores, shares, guessed, uniforms, chances):
    del shares, chances
    return np.where(guessed < 0, choose(scores, uniforms), guessed)


def other_drawn_by_scores(scores, shares, guessed, uniforms, chances):
    found = assisted.checked(scores, shares, guessed, uniforms, chances)
    return np.where(found == guessed, found, choose(scores, uniforms))


def kept_by_its_probability(scores, shares, guessed, uniforms, chances):
    own = np.take_along_axis(softmax(scores), guessed.clip(0)[:, None], axis=1)[:, 0]
    others = assisted.checked(scores, shares, guessed, uniforms, np.ones_like(chances))
    return np.where((guessed >= 0) & (chances < own), guessed, others)


@pytest.mark.parametrize("rule", [always_kept, other_drawn_by_scores, kept_by_its_probability])
def test_a_wrong_rule_is_noticed(rule):
    scores, own = distributions()
    uniforms = np.random.default_rng(7).random((3, COPIES), dtype=np.float32)
    logits, others = (np.repeat(row[None], COPIES, axis=0) for row in (scores, own))
    guesses = choose(others, uniforms[0])
    assert statistic(assisted.checked(logits, softmax(others), guesses, *uniforms[1:]), scores) < QUANTILE
    assert statistic(rule(logits, softmax(others), guesses, *uniforms[1:]), scores) > 10 * QUANTILE


class Chain:
    """A decoder whose next token depends on the last one alone, by a table of scores."""

    def __init__(self, table, others):
        self.table, self.others = table, others

    def prefill(self, input_ids_BT, attention_mask_BT, choice):
        del attention_mask_BT
        return self.decode(input_ids_BT, choice)

    def decode(self, ids_BT, choice):
        scores = self.table[ids_BT[0, -choice.selection.reach :]]
        if choice.selection.name != "checked":
            return {"tokens": choose(scores, choice.arguments[0]), "shares": softmax(scores)}
        guessed, *numbers = choice.arguments[:3]
        return {"tokens": assisted.checked(scores, np.concatenate(choice.arguments[3:]), guessed, *numbers)}

    def forget(self, count):
        assert count >= 0

    def other(self, model, prompt):
        del prompt
        return Chain(model.table, None)


class Guesser:
    """What guesses for a chain."""

    def __init__(self, table):
        self.table = table
        self.config = TINY


def test_whole_texts_have_the_distribution():
    """Texts of three tokens out of three, guessed two at a time: each of the 27 as often as plain sampling has it.

    It is the rule of steps that is tested: which number decides what, when guesses are dropped and made anew.
    """
    rng = np.random.default_rng(8)
    table, own = rng.normal(0, 1, (2, 3, 3)).astype(np.float32)
    count = 5_000
    settings = GenerationConfig(do_sample=True, assistant_model=Guesser(own), num_assistant_tokens=2)
    numbers = rng.random((count, 1, 5, assisted.DRAWS), dtype=np.float32)
    counts = np.zeros((3, 3, 3))
    ids = np.array([[0]])
    for uniforms in numbers:
        prompt = Prompt(input_ids=ids, attention_mask=ids + 1, new_tokens=3, uniforms=uniforms, guesses=2, positions=99)
        reader = Reader(Chain(table, own), prompt, use_cache=True)
        counts[tuple(int(found["tokens"][0]) for found in assisted.assisted(reader, prompt, settings))] += 1
    step = softmax(table.astype(np.float64))
    wanted = count * step[0][:, None, None] * step[:, :, None] * step[None]
    assert ((counts - wanted) ** 2 / wanted).sum() < 54.1, "the 0.999 quantile of 26 degrees of freedom"


@pytest.mark.parametrize(
    ("ids", "longest", "count", "wanted"),
    [
        ([1, 2, 3, 1, 2], 2, 2, [3, 1]),
        ([1, 2, 3, 1, 2], 2, 5, [3, 1, 2, 3, 1]),  # what was copied is copied on
        ([1, 2, 3, 9, 2, 4, 1, 2], 2, 1, [3]),  # the longer ending before the later one
        ([1, 2, 3, 9, 2, 4, 1, 2], 1, 1, [4]),
        ([7, 2, 3, 7, 2, 4, 7, 2], 2, 1, [4]),  # of equally long ones, the later
        ([5, 6], 3, 3, [6, 6, 6]),  # nothing to copy
        ([5], 2, 2, [5, 5]),
        ([5, 5, 5], 2, 2, [5, 5]),
    ],
)
def test_what_is_looked_up(ids, longest, count, wanted):
    assert assisted.copied(np.array(ids), longest, count).tolist() == wanted


def test_streams_stop_strings_and_modes(backends, capsys):
    """The text of `generate_text` without guesses, in pieces, up to a stop string; both models' modes come back.

    In PyTorch: what the others have of it is the same code, and takes long to compile.
    """
    (backend,) = (backend for backend in backends if not backend.compiles)
    tokenizer = OPTTokenizer.from_pretrained("opt-tiny")
    model, draft = (backend.build(TINY.replace(vocab_size=2048, ffn_dim=width)) for width in (32, 64))
    settings = {"max_new_tokens": 24, "eos_token_id": []}
    whole = model.generate_text("One day", tokenizer, **settings)
    stop = whole[9:12]
    draft.train()
    for way in (LOOKUP, helped(draft)):
        assert "".join(model.stream("One day", tokenizer, **settings, **way)) == whole
        found = model.generate_text("One day", tokenizer, stop_strings=stop, **settings, **way)
        assert found == whole.partition(stop)[0]
        printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = backend.tensor(np.array(tokenizer(["One day"])["input_ids"]))
        model.generate(ids, streamer=printer, **settings, **way)
        assert capsys.readouterr().out == whole + "\n"
        short = model.generate(ids, max_length=ids.shape[1] + 4, eos_token_id=[], **way)
        assert short.shape[1] == ids.shape[1] + 4
        timed = model.generate(ids, max_time=1e-9, **settings, **way)
        assert timed.shape[1] == ids.shape[1] + 1
    assert draft.training
    assert not model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "would change nothing: the strategy is beam_search"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "would change nothing: the strategy is contrastive_search"),
        ({"dola_layers": "low"}, "dola_layers would change nothing: the strategy is assisted_generation"),
        ({"temperature": 0.5}, "temperature would change nothing: the strategy is assisted_generation"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences is 2, but assisted generation"),
        ({"prompt_lookup_num_tokens": 2, "assistant_model": "draft"}, "both guess tokens"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens is 0, expected a positive integer"),
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens is -1, expected an integer from 0 on"),
        ({"max_matching_ngram_size": 2}, "max_matching_ngram_size would change nothing without prompt_lookup"),
        ({"assistant_model": "facebook/opt-125m"}, "assistant_model is str, expected "),
    ],
)
def test_settings_that_cannot_be(backend, pairs, settings, message):
    model, draft = pairs[0][backend.name]
    with pytest.raises(GenerationError, match=message):
        backend.generate(model, np.array([[5, 6]]), **{"assistant_model": draft, **settings})


def test_prompts_and_models_that_cannot_be(backend, pairs):
    model, draft = pairs[0][backend.name]
    for settings in (LOOKUP, {"assistant_model": draft}):
        with pytest.raises(GenerationError, match="continues one prompt at a time, got 2"):
            backend.generate(model, np.array([[5, 6], [7, 8]]), **settings)
    other = backend.build(TINY.replace(vocab_size=80))
    with pytest.raises(GenerationError, match="a vocabulary of 80 tokens and the model one of 64"):
        backend.generate(model, np.array([[5, 6]]), assistant_model=other)
    embeds = backend.tensor(np.zeros((1, 2, 16), np.float32))
    with pytest.raises(GenerationError, match="assistant_model reads ids, but got inputs_embeds alone"):
        backend.generate(model, None, inputs_embeds=embeds, assistant_model=draft)
    for name, needed in (("num_assistant_tokens", "assistant_model"), ("max_matching_ngram_size", "prompt_lookup")):
        with pytest.raises(GenerationError, match=f"{name} would change nothing.*{needed}"):
            backend.generate(model, np.array([[5, 6]]), **{name: 2})
    with pytest.raises(GenerationError, match="num_assistant_tokens would change nothing without assistant_model"):
        backend.generate(model, np.array([[5, 6]]), num_assistant_tokens=2, **LOOKUP)


def test_a_row_that_cannot_go_on_is_an_error(backends, pairs):
    backend = backends[0]
    model, draft = pairs[0][backend.name]
    words = [[token] for token in range(64)]
    for way in (LOOKUP, helped(draft)):
        with pytest.raises(GenerationError, match="Row 0 cannot go on after 0 new tokens"):
            backend.generate(model, np.array([[5, 6]]), bad_words_ids=words, eos_token_id=[], **LONG, **way)


def test_settings_survive_their_file_and_models_stay_out(tmp_path, backends, pairs):
    draft = pairs[0][backends[0].name][1]
    settings = GenerationConfig(assistant_model=draft, num_assistant_tokens=4, eos_token_id=2)
    assert settings.strategy == "assisted_generation"
    (tmp_path / "generation_config.json").write_text(json.dumps(settings.to_dict()))
    found = GenerationConfig.from_directory(tmp_path, TINY)
    assert (found.strategy, found.num_assistant_tokens, found.assistant_model) == ("greedy_search", 4, None)
    assert found.updated(assistant_model=draft).guesses == 4
    values = {**settings.to_dict(), "prompt_lookup_num_tokens": 6, "assistant_model": "elsewhere"}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    found = GenerationConfig.from_directory(tmp_path, TINY)
    assert (found.strategy, found.guesses, found.assistant_model) == ("assisted_generation", 6, None)
    assert found.updated(prompt_lookup_num_tokens=0).strategy == "greedy_search"
    assert found.updated(num_beams=2).strategy == "beam_search"
    assert found.updated(do_sample=True).strategy == "assisted_sample"
