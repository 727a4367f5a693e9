"""The frame of every strategy: a decoder's rows, its cache, and what it brings to the host beside tokens."""

import numpy as np
import pytest

from opt_common.decoding import Choice, Prompt, Reader, Selection
from opt_common.errors import GenerationError
from tests.tolerances import FLOAT32, compare

IDS = np.array([[9, 20, 300, 41, 7], [1, 1, 50, 61, 72]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
PROMPT = Prompt(input_ids=IDS, attention_mask=MASK, new_tokens=6)
LOGITS = Selection(details=("logits",))


def choice(rows=None):
    return Choice(gates_P=np.zeros(0), selection=LOGITS, rows_B=None if rows is None else np.array(rows))


def plain(backend, model, texts):
    """The logits after each of some texts, by a plain call, which always has the same shape."""
    ids = np.array([[1] * (12 - len(text)) + text for text in texts + [[5]] * (3 - len(texts))])
    mask = np.array([[0] * (12 - len(text)) + [1] * len(text) for text in texts + [[5]] * (3 - len(texts))])
    return backend.forward(model, input_ids=ids, attention_mask=mask).logits[: len(texts), -1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_are_continued_as_they_are_named(backend, load, use_cache):
    """transformers#46612: beams went on from rows of the cache that were not theirs.

    Two rows become three, change places, read several tokens at once, forget some, and become one.
    """
    model = load(backend, "post_ln_proj")
    reader = Reader(backend.decoder(model, PROMPT), PROMPT, use_cache=use_cache)
    texts = [[9, 20, 300, 41, 7], [50, 61, 72]]
    steps = [
        ([1, 0, 1], [[4], [5], [6]], 0),
        ([2, 1, 0], [[7], [8], [9]], 0),
        (None, [[10, 11], [12, 13], [14, 15]], 1),
        ([0, 0, 1], [[16], [17], [18]], 0),
        ([2], [[19]], 0),
    ]
    results = []
    with backend.uncompiled(), backend.scope(model):
        results.append((reader.start(choice())["logits"], texts))
        for rows, tokens, forgotten in steps:
            texts = [texts[row] + new for row, new in zip(rows or range(len(texts)), tokens, strict=True)]
            results.append((reader.read(np.array(tokens), choice(rows))["logits"], texts))
            reader.forget(forgotten)
            texts = [text[: len(text) - forgotten] for text in texts]
    for logits, texts in results:
        compare(logits, plain(backend, model, texts), FLOAT32, what=str(texts))


def test_details_are_those_of_a_full_pass(backend, load):
    """Log-probabilities of the tokens chosen, scores and logits, also after the end of a row."""
    model = load(backend, "pre_ln")
    settings = {"max_new_tokens": 5, "temperature": 0.5, "do_sample": True, "top_k": 0, "seed": 3}
    asked = {"output_scores": True, "output_logits": True}
    free = backend.generate_output(model, IDS, MASK, eos_token_id=[], **settings, **asked)
    end = int(free.sequences[0, 6])
    found = backend.generate_output(model, IDS, MASK, eos_token_id=end, **settings, **asked)
    if not backend.compiles:
        ids = backend.generate(model, IDS, MASK, eos_token_id=end, **settings)
        np.testing.assert_array_equal(found.sequences, ids)
    assert found.sequences_scores is None
    assert found.beam_indices is None
    new = found.sequences.shape[1] - 5
    assert len(found.scores) == len(found.logits) == found.token_logprobs.shape[1] == new
    mask = np.concatenate([MASK, np.ones((2, new), np.int64)], axis=1)
    logits = backend.forward(model, input_ids=found.sequences, attention_mask=mask).logits[:, 4:-1]
    live = np.cumsum(np.pad(found.sequences[:, 5:-1] == end, ((0, 0), (1, 0))), axis=1) == 0
    assert live[0].sum() < new, "the first row must have ended before the last step"
    compare(np.stack(found.logits, 1)[live], logits[live], FLOAT32)
    compare(np.stack(found.scores, 1)[live], logits[live] / 0.5, FLOAT32)
    scores = logits.astype(np.float64) / 0.5
    logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logprobs, found.sequences[:, 5:, None], axis=-1)[..., 0]
    compare(found.token_logprobs[live], chosen[live], FLOAT32)
    assert (found.token_logprobs[~live] == 0).all()


def test_scores_need_a_record(backend, load):
    with pytest.raises(GenerationError, match="output_scores would change nothing"):
        backend.generate(load(backend, "pre_ln"), IDS, MASK, max_new_tokens=2, output_scores=True)
