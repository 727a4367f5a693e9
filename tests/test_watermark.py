"""The watermark: one rule in NumPy and three frameworks, and a detector that tells marked text from other text."""

import dataclasses

import numpy as np
import pytest

from opt_common import GenerationConfig, GenerationError, InputError, WatermarkDetector, WatermarkingConfig
from opt_common.processors import History, process, processors, program
from opt_common.watermark import lefthash, selfhash
from tests.tolerances import PROCESSED, compare

V = 512
PROMPTS = np.array([[9, 20, 300, 41, 7], [1, 1, 50, 61, 72], [1, 1, 1, 1, 400]])
PADDED_LEFT = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
CONFIGS = [
    WatermarkingConfig(),
    WatermarkingConfig(seeding_scheme="lefthash", context_width=3, hashing_key=2**32 - 5, greenlist_ratio=0.5),
    WatermarkingConfig(seeding_scheme="selfhash", context_width=2, hashing_key=7, bias=-1.5),
]


def chosen(config):
    settings = GenerationConfig(watermarking_config=config)
    return processors(settings, vocab_size=V, prompt_length=5, max_length=10)


def marked(config, scores):
    """Scores of the reference, for the prompts above."""
    found = chosen(config)
    history = History(tokens_BS=PROMPTS, attended_BS=PADDED_LEFT == 1, length=5)
    return process(scores, history, program(found), [processor.arguments for processor in found], [1.0])


@pytest.mark.parametrize("config", CONFIGS)
def test_the_backends_favour_the_reference_s_tokens(backend, config):
    scores = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32)
    found = backend.process(chosen(config), PROMPTS, PADDED_LEFT == 1, scores, np.ones(1))
    expected = marked(config, scores)
    compare(found, expected, PROCESSED, what=str(config))
    whole = PADDED_LEFT.sum(1) >= config.context_width
    shares = ((expected - scores) * np.sign(config.bias) > 0.5).mean(1)
    assert (shares[~whole] == 0).all(), "a context that is not whole marks nothing"
    # Five standard deviations of a share of 512 tokens.
    assert (np.abs(shares[whole] - config.greenlist_ratio) < 5 * np.sqrt(0.25 / V)).all()


@pytest.mark.parametrize("hashes", [lefthash, selfhash])
def test_green_tokens_are_a_fair_lot(hashes):
    """Hashes are uniform over candidates, contexts and keys, and those of neighbours are unrelated."""
    contexts = np.random.default_rng(0).permutation(800).reshape(400, 2)
    for width in (1, 2):
        secrets = (WatermarkingConfig(hashing_key=key).secret for key in (15485863, 15485862))
        found, other = (hashes(contexts[:, :width], np.arange(1000)[None], secret) / 2**32 for secret in secrets)
        counts = np.histogram(found, bins=64, range=(0, 1))[0]
        expected = found.size / 64
        assert ((counts - expected) ** 2 / expected).sum() < 125, "beyond the 0.99999 quantile of 63 degrees of freedom"
        for shifted in (found[1:, :], found[:, 1:]):
            kept = found[: len(shifted), : shifted.shape[1]]
            assert abs(np.corrcoef(kept.ravel(), shifted.ravel())[0, 1]) < 5 / np.sqrt(kept.size)
        assert abs(np.corrcoef(found.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(found.size)


def test_a_detector_finds_what_generation_marked(backends, load):
    """The same marked text in every framework; the right key finds it, another key and unmarked text do not."""
    config = WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2)
    settings = {"do_sample": True, "top_k": 0, "seed": 3, "max_new_tokens": 40, "eos_token_id": []}
    texts = [
        backend.generate(load(backend, "pre_ln"), PROMPTS, PADDED_LEFT, watermarking_config=config, **settings)[:, 5:]
        for backend in backends
    ]
    for text in texts[1:]:
        np.testing.assert_array_equal(text, texts[0])
    detection = WatermarkDetector(watermarking_config=config)(texts[0])
    assert detection.prediction.all()
    assert (detection.z_score > 5).all()
    assert (detection.num_tokens_scored == 38).all()
    assert (detection.p_value < 1e-6).all()
    other = WatermarkDetector(watermarking_config=dataclasses.replace(config, hashing_key=1))(texts[0])
    plain = backends[0].generate(load(backends[0], "pre_ln"), PROMPTS, PADDED_LEFT, **settings)[:, 5:]
    for found in (other, WatermarkDetector(watermarking_config=config)(plain)):
        assert not found.prediction.any()
        assert (np.abs(found.z_score) < 4).all()


def test_a_detector_counts_text_only():
    config = WatermarkingConfig(context_width=2)
    detector = WatermarkDetector(watermarking_config=config)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, V, (1, 30))
    whole = detector(ids)
    padded = np.concatenate([np.ones((1, 4), np.int64), ids], axis=1)
    masked = detector(padded, np.arange(34)[None] >= 4)
    assert (masked.num_tokens_scored, masked.z_score) == (whole.num_tokens_scored, whole.z_score) == (28, whole.z_score)
    repeated = np.concatenate([ids, ids], axis=1)
    assert detector(repeated).num_tokens_scored == 58
    once = WatermarkDetector(watermarking_config=config, ignore_repeated_ngrams=True)(repeated)
    assert once.num_tokens_scored == 30  # those of the text, and two across the seam
    with pytest.raises(InputError, match="Row 1 has too few tokens: with context_width 2, 3"):
        detector(np.ones((2, 4)), np.array([[1, 1, 1, 1], [0, 0, 1, 1]]))
    with pytest.raises(InputError, match="expected \\(batch, length\\)"):
        detector(np.ones(4))


def test_the_z_score_of_chance_is_standard_normal():
    rng = np.random.default_rng(2)
    found = WatermarkDetector(watermarking_config=WatermarkingConfig())(rng.integers(0, 50272, (400, 101)))
    assert abs(found.z_score.mean()) < 5 / np.sqrt(400)
    assert 0.8 < found.z_score.std() < 1.2
    assert abs(found.green_fraction.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 40000)


def test_configurations_that_cannot_be_and_their_file():
    with pytest.raises(GenerationError, match="3 problems") as error:
        GenerationConfig(watermarking_config={"greenlist_ratio": 1.0, "context_width": 0, "seeding_scheme": "x"})
    assert "greenlist_ratio is 1.0, expected above 0, below 1" in str(error.value)
    with pytest.raises(GenerationError, match="has no gamma; it has greenlist_ratio"):
        GenerationConfig(watermarking_config={"gamma": 0.5})
    with pytest.raises(GenerationError, match="watermarking_config is 3, expected a WatermarkingConfig"):
        GenerationConfig(watermarking_config=3)
    config = GenerationConfig(watermarking_config={"bias": 3.0})
    assert config.watermarking_config == WatermarkingConfig(bias=3.0)
    assert GenerationConfig(**config.to_dict()) == config
