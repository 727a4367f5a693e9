"""The bundled model: what its files promise, what it has learned, and that its script would learn it again."""

import dataclasses
import functools
import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from conversion import open_checkpoint
from opt_common import reference
from opt_common.config import OPTConfig
from opt_common.hub import resolve
from opt_common.params import count_parameters
from opt_common.tokenizer import OPTTokenizer
from tests.adapters import BACKENDS

EXAMPLE = Path(__file__).parents[1] / "examples" / "opt_tiny"
CORPUS_DIGEST = "dadbf8c1eb9073b778e7a9d9540160cbe030aac57bb4896f1627e5964b36a326"
UNSEEN_SEED = 77
"""Neither the seed of the training stories nor that of the script's own held-out ones."""

LOSS_BAR = 0.3
"""Nats a token. The grammar itself cannot be guessed much better than that, and a unigram model is above 4."""

SAFE_LEAD = 1e-3
"""Smallest lead of the best logit over the second that no framework's float32 rounding can turn round."""


@pytest.fixture(scope="module")
def corpus() -> Iterator[ModuleType]:
    """`corpus.py` of the example; its directory is on the path, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        for name in ("corpus", "train"):
            patch.delitem(sys.modules, name, raising=False)
        import corpus

        yield corpus


@pytest.fixture(scope="module")
def train(corpus: ModuleType) -> ModuleType:
    """`train.py` of the example, which needs PyTorch."""
    del corpus
    if "torch" not in BACKENDS:
        pytest.skip("the training script needs PyTorch, which is not under test")
    import train

    return train


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained("opt-tiny")


@functools.cache
def weights() -> tuple[OPTConfig, dict[str, np.ndarray]]:
    with open_checkpoint(resolve("opt-tiny")) as checkpoint:
        return checkpoint.config, {name: np.array(checkpoint.read(name)) for name in checkpoint.names}


def reference_logits(ids: list[int]) -> np.ndarray:
    """Logits (T, V) of the bundled model by the NumPy reference."""
    return reference.forward(*weights(), np.array([ids])).logits[0]


def log_likelihood(ids: list[int]) -> float:
    """Log-probability of all ids but the first."""
    logits_TV = reference_logits(ids)[:-1]
    top_T = logits_TV.max(-1)
    normaliser_T = top_T + np.log(np.exp(logits_TV - top_T[:, None]).sum(-1))
    return float((logits_TV[np.arange(len(ids) - 1), ids[1:]] - normaliser_T).sum())


def story_ids(tokenizer: OPTTokenizer, text: str) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


# The corpus


def test_the_corpus_is_the_same_everywhere(corpus):
    text = "\n".join(corpus.stories(200, seed=0))
    assert hashlib.sha256(text.encode()).hexdigest() == CORPUS_DIGEST


def test_a_story_depends_on_seed_and_number_only(corpus):
    assert list(corpus.stories(3, seed=4)) == list(corpus.stories(20, seed=4))[:3]
    assert set(corpus.stories(20, seed=4)).isdisjoint(corpus.stories(20, seed=5))


def test_every_template_is_filled_in(corpus):
    for text in corpus.stories(1000, seed=UNSEEN_SEED):
        assert not re.search(r"[{}\[\]|\n]|  | [.,!?]|\b[Aa] [aeiou]|[.!?]\"?[A-Z]|^[a-z]|[^.!?\"]$", text), text
        assert text.count('"') % 2 == 0, text


def test_every_plot_names_only_what_it_binds(corpus):
    """`stories` draws at random; this visits each plot, with every alternative left in."""
    import random

    for name, plot in corpus.PLOTS.items():
        rng = random.Random(name)
        bound = corpus._cast(rng) | corpus._scene(rng, plot)
        text = corpus._fill("".join((*corpus.OPENINGS, corpus.FRIENDS, *plot.lines)), bound)
        assert "{" not in text, name


def test_apples_given_and_apples_left_make_all_apples(corpus):
    numbers = {word: value for value, word in enumerate(corpus.NUMBERS)}
    gathering = r"found (\w+) \w+ .*? gave \w+ (\w+) \w+\. Now \w+ had (\w+) \w+ and"
    shopping = r"gave \w+ (\w+) coins\. .*? gave (?:her|him) (\w+) coins?\. .* had only (\w+) coins? left"
    texts = list(corpus.stories(1500, seed=UNSEEN_SEED))
    found = [match for pattern in (gathering, shopping) for text in texts if (match := re.search(pattern, text))]
    assert len(found) > 50
    for match in found:
        whole, given, rest = (numbers[word] for word in match.groups())
        assert whole == given + rest, match[0]


# The files


def test_size_and_shape():
    config, params = weights()
    directory = resolve("opt-tiny")
    assert (directory / "model.safetensors").stat().st_size <= 6_000_000
    assert 1_000_000 <= count_parameters(config) <= 3_000_000
    assert {array.dtype.name for array in params.values()} == {"float32"}
    assert config.tie_word_embeddings
    assert "lm_head.weight" not in params


def test_config_survives_writing_and_reading(tmp_path):
    config = OPTConfig.from_json_file(resolve("opt-tiny") / "config.json")
    copy = tmp_path / "config.json"
    copy.write_text(config.to_json())
    assert OPTConfig.from_json_file(copy) == config
    assert OPTConfig.from_json_file(copy).extra == config.extra


def test_the_files_agree_with_each_other(tokenizer):
    config, _ = weights()
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.model_max_length == config.max_position_embeddings
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 2)


def test_the_tokenizer_takes_any_text(tokenizer):
    text = "Größe: 12 µm, 東京 🙂 <s>\n\tOnce"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_both_forms_of_the_tokenizer_are_one(tokenizer, corpus, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        (tmp_path / name).write_bytes((resolve("opt-tiny") / name).read_bytes())
    texts = list(corpus.stories(50, seed=UNSEEN_SEED))
    assert OPTTokenizer.from_pretrained(tmp_path)(texts) == tokenizer(texts)


# The model


def test_unseen_stories_are_likely(corpus, tokenizer):
    rows = [story_ids(tokenizer, text) for text in corpus.stories(12, seed=UNSEEN_SEED)]
    tokens = sum(len(row) - 1 for row in rows)
    loss = -sum(map(log_likelihood, rows)) / tokens
    assert loss < LOSS_BAR

    # What a model scores that knows how common each token is and nothing else: the bar is one that it fails by far.
    counts = Counter(token for text in corpus.stories(1000, seed=0) for token in story_ids(tokenizer, text)[1:])
    total = sum(counts.values()) + len(tokenizer)
    unigram = -sum(math.log((counts[token] + 1) / total) for row in rows for token in row[1:]) / tokens
    assert unigram > 10 * LOSS_BAR


def test_the_card_shows_what_the_model_writes(tokenizer):
    """Greedy by the reference, in one pass: at each step the story's token leads, and by more than rounding."""
    card = (resolve("opt-tiny") / "README.md").read_text(encoding="utf-8")
    quoted = [line.removeprefix("> ") for line in card.splitlines() if line.startswith("> ")]
    assert len(quoted) >= 3
    for line in quoted:
        prompt, text = re.fullmatch(r"\*\*(.*)\*\*(.*)", line).groups()
        ids = story_ids(tokenizer, prompt + text)
        start = len(tokenizer(prompt)["input_ids"])
        assert ids[:start] == tokenizer(prompt)["input_ids"]
        logits_TV = reference_logits(ids)[start - 1 : -1]
        np.testing.assert_array_equal(logits_TV.argmax(-1), ids[start:])
        second_T, best_T = np.sort(logits_TV, axis=-1)[:, -2:].T
        assert (best_T - second_T).min() > SAFE_LEAD


def test_it_ends_its_story_in_every_framework(backend, tokenizer):
    prompt = np.array([tokenizer("Once upon a time")["input_ids"]])
    room = weights()[0].max_position_embeddings - prompt.shape[1]
    ids = backend.generate(backend.load(resolve("opt-tiny")), prompt, max_new_tokens=room)[0].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert ids[-1] == tokenizer.eos_token_id
    assert text.endswith((".", '."'))
    assert (
        f"**Once upon a time**{text.removeprefix('Once upon a time')}\n"
        in (resolve("opt-tiny") / "README.md").read_text()
    )


# The script


def test_the_script_learns(train, tmp_path):
    recipe = train.Recipe(
        stories=60, vocab_size=400, hidden_size=16, layers=1, heads=2, block=64, batch=4, steps=30, warmup=3
    )
    first = run(train, recipe)
    assert np.mean(first["losses"][-5:]) < first["losses"][0] - 0.3
    assert first["losses"] == run(train, recipe)["losses"], "the same seed, the same numbers"
    assert first["losses"] != run(train, dataclasses.replace(recipe, seed=1))["losses"]

    first["model"].save_pretrained(tmp_path)
    first["tokenizer"].save_pretrained(tmp_path)
    again = type(first["model"]).from_pretrained(tmp_path)
    texts = first["texts"][:3]
    loss = train.held_out_loss(again, OPTTokenizer.from_pretrained(tmp_path, model_max_length=10_000), texts)
    assert loss == pytest.approx(train.held_out_loss(first["model"], first["tokenizer"], texts), abs=1e-6)


def run(train: ModuleType, recipe: Any) -> dict[str, Any]:
    """What `train.py` does before it saves."""
    # A line of a story instead of all of it, so that the held-out texts fit into a short block.
    texts = [text[:120] for text in train.stories(recipe.stories, seed=recipe.seed)]
    tokenizer = train.train_tokenizer(texts, recipe.vocab_size, recipe.block)
    model = train.new_model(recipe)
    losses = train.train(model, recipe, *train.encode(tokenizer, texts, recipe.block))
    return {"texts": texts, "tokenizer": tokenizer, "model": model, "losses": losses}


def test_blocks_begin_with_a_story(train, corpus):
    recipe = train.Recipe(stories=40, vocab_size=400, block=64, batch=4)
    texts = list(corpus.stories(recipe.stories, seed=0))
    tokenizer = train.train_tokenizer(texts, recipe.vocab_size, recipe.block)
    stream, starts = train.encode(tokenizer, texts, recipe.block)
    assert tokenizer.decode(stream, skip_special_tokens=True) == "".join(texts)
    batch = next(train.batches(stream, starts, recipe))
    assert batch.shape == (4, 64)
    assert (batch[:, 0] == tokenizer.bos_token_id).all()


def test_the_script_refuses_a_directory_in_use_before_it_trains(train, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["train.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        train.parse_arguments()
    assert "is not empty" in capsys.readouterr().err
