"""Texts as users ask for them: stopped, streamed, continued from embeddings and from a cache, and interrupted."""

import contextlib
import dataclasses
import itertools
import threading

import numpy as np
import pytest

from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from opt_common.streaming import TextIteratorStreamer, TextStreamer
from opt_common.tokenizer import OPTTokenizer
from tests.test_generate_bounds import TINY

PROMPTS = np.array([[9, 20, 300, 41, 7], [1, 1, 50, 61, 72], [1, 1, 1, 1, 400]])
LEFT = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
NEW = 6


@pytest.fixture(scope="module")
def tokenizer():
    return OPTTokenizer.from_pretrained("opt-tiny")


@pytest.fixture(scope="module")
def model_of(backends):
    """A model of the tokenizer's vocabulary in each framework, which babbles in many bytes; quick to compile."""
    config = TINY.replace(vocab_size=2048, max_position_embeddings=256)
    models = {backend.name: backend.build(config) for backend in backends}
    weights = backends[0].parameters(models[backends[0].name])
    for backend in backends[1:]:
        for parameter in backend.table(models[backend.name]):
            backend.set(models[backend.name], parameter, weights[parameter.name])
    return lambda backend: models[backend.name]


def test_stop_strings_in_every_framework(backend, model_of, tokenizer):
    """A row stops with the token that completes the text, alone; the text ends right before it."""
    model, prompts = model_of(backend), ["One day", "There was a cat"]
    settings = {"max_new_tokens": 12, "eos_token_id": []}
    free = model.generate_text(prompts, tokenizer, **settings)
    stop = free[0][3:6]  # in the middle of tokens, and across some
    assert stop not in free[1], "for the other row to go on"
    found = model.generate_text(prompts, tokenizer, stop_strings=[stop, "nowhere"], **settings)
    assert found == [free[0].partition(stop)[0], free[1]]

    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="np")
    whole = backend.generate(model, inputs["input_ids"], inputs["attention_mask"], **settings)
    ids = backend.generate(
        model, inputs["input_ids"], inputs["attention_mask"], stop_strings=stop, tokenizer=tokenizer, **settings
    )
    width = inputs["input_ids"].shape[1]
    ended = next(at for at in range(1, 13) if stop in tokenizer.decode(whole[0, width : width + at]))
    np.testing.assert_array_equal(ids[0, : width + ended], whole[0, : width + ended])
    assert (ids[0, width + ended :] == model.config.pad_token_id).all()
    np.testing.assert_array_equal(ids[1], whole[1])
    with pytest.raises(GenerationError, match="Pass tokenizer="):
        backend.generate(model, inputs["input_ids"], stop_strings=stop)


def test_a_user_s_rule_and_time(backend, model_of):
    model = model_of(backend)
    free = backend.generate(model, PROMPTS, LEFT, max_new_tokens=NEW, eos_token_id=[])
    seen = []

    def rule(ids):
        seen.append(backend.array(ids).shape)
        return ids[:, -1] == int(free[1, 6])

    found = backend.generate(model, PROMPTS, LEFT, max_new_tokens=NEW, eos_token_id=[], stopping_criteria=rule)
    first = int(np.flatnonzero(free[1, 5:] == free[1, 6])[0])
    np.testing.assert_array_equal(found[1, : 6 + first], free[1, : 6 + first])
    assert (found[1, 6 + first :] == model.config.pad_token_id).all()
    assert seen[:2] == [(3, 6), (3, 7)]
    found = backend.generate(model, PROMPTS, LEFT, max_new_tokens=NEW, eos_token_id=[], max_time=1e-9)
    np.testing.assert_array_equal(found, free[:, :6])


def test_streams_join_to_the_text(backend, model_of, tokenizer, capsys):
    """By iterator, by printing streamer and by a streamer in another thread: the text of the whole result."""
    model = model_of(backend)
    settings = {"max_new_tokens": 40, "eos_token_id": []}
    for prompt in ("One day", "Ein 😀 Tag"):
        whole = model.generate_text(prompt, tokenizer, **settings)
        pieces = list(model.stream(prompt, tokenizer, **settings))
        assert "".join(pieces) == whole
        assert len(pieces) > 10
        ids = backend.array(model.generate(**inputs(backend, tokenizer, prompt), **settings))
        assert whole == tokenizer.decode(ids[0, len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)

        printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**inputs(backend, tokenizer, prompt), streamer=printer, **settings)
        assert capsys.readouterr().out == whole + "\n"
    reader = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    arguments = {**inputs(backend, tokenizer, prompt), **settings, "streamer": reader}
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    assert "".join(reader) == whole
    thread.join()
    stop = whole[5:8]
    assert "".join(model.stream(prompt, tokenizer, stop_strings=stop, **settings)) == whole.partition(stop)[0]
    with pytest.raises(GenerationError, match="takes one text, got 3"):
        backend.generate(model, PROMPTS, LEFT, streamer=TextStreamer(tokenizer))


def inputs(backend, tokenizer, prompt):
    return {name: backend.tensor(array) for name, array in tokenizer([prompt], return_tensors="np").items()}


def test_a_stream_that_is_left_leaves_nothing_behind(backend, model_of, tokenizer):
    """Between two pieces, and after the last one taken, the model is in the mode it was in."""
    model = model_of(backend)
    training = backend.name != "tf"  # Keras is told the mode call by call
    if training:
        model.train()
    before = model.generate_text("One day", tokenizer, max_new_tokens=4)
    for _ in model.stream("One day", tokenizer, max_new_tokens=20):
        assert not training or model.training
        break
    assert not training or model.training
    assert model.generate_text("One day", tokenizer, max_new_tokens=4) == before
    if training:
        model.eval()


def test_streams_in_turns_do_not_meet(backend, model_of, tokenizer):
    """Each run has keys and values of its own, also where a step writes to them in place."""
    model = model_of(backend)
    prompts = ("One day", "Two cats")
    settings = {"max_new_tokens": 12, "eos_token_id": []}
    alone = [list(model.stream(prompt, tokenizer, **settings)) for prompt in prompts]
    assert alone[0] != alone[1]
    streams = [model.stream(prompt, tokenizer, **settings) for prompt in prompts]
    found: list[list[str]] = [[], []]
    for pair in itertools.zip_longest(*streams):
        for pieces, piece in zip(found, pair, strict=True):
            pieces.extend([] if piece is None else [piece])
    assert found == alone


def test_embeddings_in_place_of_ids(backend, model_of):
    """LAVIS#239, transformers#21599: of embeddings alone come the new tokens alone; beside ids, whole texts."""
    model = model_of(backend)
    table = backend.parameters(model)["model.decoder.embed_tokens.weight"]
    wanted = backend.generate(model, PROMPTS, LEFT, max_new_tokens=NEW, repetition_penalty=1.3)
    embeds = backend.tensor(table[PROMPTS])
    found = backend.generate(model, PROMPTS, LEFT, inputs_embeds=embeds, max_new_tokens=NEW, repetition_penalty=1.3)
    np.testing.assert_array_equal(found, wanted)
    free = backend.generate(model, PROMPTS, LEFT, max_new_tokens=NEW)
    alone = backend.generate(model, None, LEFT, inputs_embeds=embeds, max_new_tokens=NEW)
    np.testing.assert_array_equal(alone, free[:, 5:])
    right = np.array([[0, 1, 2, 3, 4], [2, 3, 4, 0, 1], [4, 0, 1, 2, 3]])
    moved = backend.tensor(np.take_along_axis(table[PROMPTS], right[..., None], axis=1))
    alone = backend.generate(model, None, LEFT[:, ::-1].copy(), inputs_embeds=moved, max_new_tokens=NEW)
    np.testing.assert_array_equal(alone, free[:, 5:])
    noise = backend.tensor(np.random.default_rng(0).normal(size=(3, 5, TINY.word_embed_proj_dim)).astype(np.float32))
    drawn = [
        backend.generate(model, ids, LEFT, inputs_embeds=noise, do_sample=True, seed=3, max_new_tokens=NEW)[:, -NEW:]
        for ids in (None, PROMPTS)
    ]
    np.testing.assert_array_equal(*drawn)
    with pytest.raises(GenerationError, match="expected an embedding for each id"):
        backend.generate(model, PROMPTS[:, 1:], LEFT[:, 1:], inputs_embeds=embeds)


def test_beams_from_embeddings_and_from_a_cache(backend, model_of):
    """LAVIS#239, transformers#21599: prompts were given to the wrong beams."""
    model = model_of(backend)
    settings = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2}
    wanted = backend.generate(model, PROMPTS, LEFT, **settings)
    embeds = backend.tensor(backend.parameters(model)["model.decoder.embed_tokens.weight"][PROMPTS])
    np.testing.assert_array_equal(backend.generate(model, None, LEFT, inputs_embeds=embeds, **settings), wanted[:, 5:])
    past = backend.forward(model, input_ids=PROMPTS[:, :3], attention_mask=LEFT[:, :3], use_cache=True, checked=True)
    found = backend.generate(model, PROMPTS, LEFT, past_key_values=past.cache, **settings)
    np.testing.assert_array_equal(found, wanted)


def test_a_cache_is_continued(backend, model_of):
    """In turns, only new columns are read, and the text is that of one run over all of it (transformers#21685)."""
    model = model_of(backend)
    settings = {"max_new_tokens": NEW, "eos_token_id": []}
    turn = np.array([[7, 8, 9], [5, 5, 1], [40, 1, 1]])
    turn_mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    for prompts, mask in ((PROMPTS, LEFT), (PROMPTS[:, ::-1].copy(), LEFT[:, ::-1].copy()), (PROMPTS + 2, None)):
        first = record(backend, model, prompts, mask, **settings)
        ids = np.concatenate([backend.array(first.sequences), turn], axis=1)
        known = np.ones_like(prompts) if mask is None else mask
        whole = np.concatenate([known, np.ones((3, NEW), np.int64), turn_mask], axis=1)
        wanted = backend.generate(model, ids, whole, **settings)
        with read_lengths(backend, model) as lengths:
            second = record(backend, model, ids, whole, past_key_values=first.past_key_values, **settings)
        np.testing.assert_array_equal(backend.array(second.sequences), wanted)
        assert int(first.past_key_values.length) == 5 + NEW - 1
        assert int(second.past_key_values.length) == wanted.shape[1] - 1
        if not backend.compiles:
            assert lengths[0] == 4, "the last new token, and three columns of the turn"
        again = np.concatenate([wanted, turn], axis=1)
        again_mask = np.concatenate([whole, np.ones((3, NEW), np.int64), turn_mask], axis=1)
        third = backend.generate(model, again, again_mask, past_key_values=second.past_key_values, **settings)
        np.testing.assert_array_equal(third, backend.generate(model, again, again_mask, **settings))


@contextlib.contextmanager
def read_lengths(backend, model):
    """A list to which each call of PyTorch's decoder adds how many columns it reads."""
    lengths = []
    if backend.name != "torch":
        yield lengths
        return
    hook = model.model.decoder.register_forward_pre_hook(lambda _, ids: lengths.append(ids[0].shape[1]))
    yield lengths
    hook.remove()


def record(backend, model, ids, mask, **options):
    mask = None if mask is None else backend.tensor(mask)
    return model.generate(backend.tensor(ids), mask, return_dict_in_generate=True, **options)


@pytest.mark.filterwarnings("ignore:A prompt begins or ends with the pad token")
def test_one_prefix_serves_many_prompts(backend, model_of):
    """A cache of one row, from a call of the model; it stays what it was, whatever continues it."""
    model = model_of(backend)
    prefix, rest = np.array([[2, 30, 31, 32]]), np.array([[5, 6], [7, 8], [9, 10]])
    ids = np.concatenate([prefix.repeat(3, axis=0), rest], axis=1)
    cache = backend.forward(model, input_ids=prefix, use_cache=True, checked=True).cache
    keys = backend.cache_arrays(cache)[0]
    for settings in ({}, {"do_sample": True, "seed": 1, "num_return_sequences": 2}):
        wanted = backend.generate(model, ids, max_new_tokens=NEW, **settings)
        for _ in range(2):
            found = backend.generate(model, ids, max_new_tokens=NEW, past_key_values=cache, **settings)
            np.testing.assert_array_equal(found, wanted)
    for before, after in zip(keys, backend.cache_arrays(cache)[0], strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.array([[2, 30]])}, "holds 4 tokens, but the prompts have 2"),
        ({"ids": np.array([[2, 3, 4, 5, 6]] * 3), "rows": 2}, "has 2 rows, expected 3"),
        ({"use_cache": False}, "needs the cache"),
        ({"layers": 2}, "has 2 layers of 2 heads"),
    ],
)
def test_a_cache_of_something_else_is_refused(backend, model_of, change, message):
    model = model_of(backend)
    prefix = np.array([[2, 30, 31, 32]] * change.get("rows", 1))
    cache = backend.forward(model, input_ids=prefix, use_cache=True, checked=True).cache
    if "layers" in change:
        cache = dataclasses.replace(cache, keys=cache.keys * 2, values=cache.values * 2)
    ids = change.get("ids", np.array([[2, 30, 31, 32, 33]]))
    with pytest.raises(GenerationError, match=message):
        backend.generate(model, ids, past_key_values=cache, use_cache=change.get("use_cache"))


def test_an_interruption_leaves_nothing_broken(backend, model_of):
    """As Ctrl-C does, at several places of a run: the mode is restored, and the next text is right."""
    model = model_of(backend)
    settings = {"max_new_tokens": NEW, "eos_token_id": []}
    wanted = backend.generate(model, PROMPTS, LEFT, **settings)
    cache = record(backend, model, PROMPTS, LEFT, **settings).past_key_values
    whole = np.concatenate([LEFT, np.ones((3, NEW), np.int64)], axis=1)
    onward = backend.generate(model, wanted, whole, **settings)
    if backend.name != "tf":
        model.train()
    for step in (1, 4):

        class Interrupting:
            def __init__(self, last=step):
                self.left = last

            def put(self, value):
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt

            def end(self):
                pass

        with pytest.raises(KeyboardInterrupt):
            backend.generate(model, wanted, whole, past_key_values=cache, streamer=Interrupting(), **settings)
        assert backend.name == "tf" or model.training
        np.testing.assert_array_equal(backend.generate(model, PROMPTS, LEFT, **settings), wanted)
        found = backend.generate(model, wanted, whole, past_key_values=cache, **settings)
        np.testing.assert_array_equal(found, onward)
    if backend.name != "tf":
        model.eval()


def test_an_interruption_while_compiling_leaves_nothing_broken(backend, monkeypatch):
    """The first step is left half traced, and the next run compiles it anew."""
    model = backend.build(TINY)
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        raise KeyboardInterrupt

    ids = np.array([[5, 6, 7]])
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.generate(model, ids, max_new_tokens=2)
    assert calls
    found = backend.generate(model, ids, max_new_tokens=2, eos_token_id=[])
    for step in range(2):
        logits = backend.forward(model, input_ids=found[:, : 3 + step]).logits
        assert found[0, 3 + step] == logits[0, -1].argmax()


def test_settings_come_as_a_configuration_too(backend, model_of):
    model = model_of(backend)
    config = GenerationConfig(max_new_tokens=3, repetition_penalty=1.5, pad_token_id=1)
    found = backend.generate(model, PROMPTS, LEFT, generation_config=config)
    np.testing.assert_array_equal(
        found, backend.generate(model, PROMPTS, LEFT, max_new_tokens=3, repetition_penalty=1.5, eos_token_id=[])
    )
