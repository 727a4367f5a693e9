"""The KV cache: decoding in pieces is decoding at once, and a cache is a value."""

import numpy as np
import pytest

from opt_common.errors import InputError
from tests.cases import THOROUGH, config_of, expected, numbered
from tests.tolerances import CACHE_FLOAT64, FLOAT32, compare

LENGTH = 6
IDS = np.random.default_rng(5).integers(4, 512, (3, LENGTH))
MASKS = {
    "no padding": None,
    "left padding": np.arange(LENGTH)[None] >= np.array([0, 2, 4])[:, None],
    "right padding": np.arange(LENGTH)[None] < np.array([6, 4, 2])[:, None],
    "padding inside": np.array([[1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1], [0, 1, 1, 0, 1, 0]]) == 1,
}


def in_pieces(backend, model, pieces, mask=None, cache=None):
    """Logits of IDS fed in pieces of these lengths, and the last cache."""
    logits, start = [], 0
    for piece in pieces:
        end = start + piece
        visible = {} if mask is None else {"attention_mask": mask[:, :end]}
        output = backend.forward(
            model,
            input_ids=IDS[:, start:end],
            **visible,
            **({} if cache is None else {"past_key_values": cache}),
            use_cache=True,
        )
        logits.append(output.logits)
        cache, start = output.cache, end
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("variant", THOROUGH)
def test_every_split_gives_the_full_pass(backend, load, variant, padding):
    model = load(backend, variant, dtype="float64")
    mask = None if MASKS[padding] is None else MASKS[padding].astype(np.int64)
    whole, _ = in_pieces(backend, model, (LENGTH,), mask)
    for split in range(1, LENGTH):
        pieces, _ = in_pieces(backend, model, (split, LENGTH - split), mask)
        compare(pieces, whole, CACHE_FLOAT64, what=f"split at {split}", attended=mask)


@pytest.mark.parametrize("variant", THOROUGH)
def test_one_token_at_a_time_leaves_the_golden_keys_and_values(backend, load, variant):
    model = load(backend, variant)
    group, golden = expected(variant)["nopad"], expected(variant)["kv_nopad_steps"]
    cache, logits = None, []
    for token in group["input_ids"].T:
        past = {} if cache is None else {"past_key_values": cache}
        output = backend.forward(model, input_ids=token[:, None], **past, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    compare(np.concatenate(logits, axis=1), group["logits"], FLOAT32)
    for name, found in zip(("key", "value"), backend.cache_arrays(cache), strict=True):
        for index, part_BNSH in enumerate(numbered(golden, name)):
            compare(found[index].transpose(0, 2, 1, 3), part_BNSH, FLOAT32, what=f"{name} of layer {index}")


def test_a_cache_is_a_value(backend, load):
    """Two continuations of one prefix, and then the first again: each as if the others had not been."""
    model = load(backend, "pre_ln", dtype="float64")
    prefix = backend.forward(model, input_ids=IDS[:, :3], use_cache=True).cache
    before = [part.copy() for parts in backend.cache_arrays(prefix) for part in parts]
    rng = np.random.default_rng(1)
    branches = [rng.integers(4, 512, (3, 3)) for _ in range(2)]
    for branch in (*branches, branches[0]):
        cache = prefix
        for token in branch.T:
            output = backend.forward(model, input_ids=token[:, None], past_key_values=cache, use_cache=True)
            cache = output.cache
        whole = backend.forward(model, input_ids=np.concatenate([IDS[:, :3], branch], axis=1))
        compare(output.logits[:, -1], whole.logits[:, -1], CACHE_FLOAT64)
    after = [part for parts in backend.cache_arrays(prefix) for part in parts]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_branches_in_lockstep_do_not_overwrite_each_other(backend, load):
    """Steps of two continuations taken in turn: beam search's pattern, where writing in place would show."""
    model = load(backend, "pre_ln", dtype="float64")
    prefix = backend.forward(model, input_ids=IDS[:, :2], use_cache=True).cache
    branches = [IDS[:, 2:5], IDS[::-1, 2:5].copy()]
    caches = [prefix, prefix]
    for step in range(3):
        for index, branch in enumerate(branches):
            output = backend.forward(
                model, input_ids=branch[:, step : step + 1], past_key_values=caches[index], use_cache=True
            )
            caches[index] = output.cache
            whole = backend.forward(model, input_ids=np.concatenate([IDS[:, :2], branch[:, : step + 1]], axis=1))
            compare(output.logits[:, -1], whole.logits[:, -1], CACHE_FLOAT64, what=f"branch {index}, step {step}")


def test_a_past_without_a_mask_is_all_attended(backend, load):
    """transformers#21685: this raised an unhelpful error."""
    model = load(backend, "post_ln_proj", dtype="float64")
    cache = backend.forward(model, input_ids=IDS[:, :4], use_cache=True).cache
    found = backend.forward(model, input_ids=IDS[:, 4:], past_key_values=cache)
    masked = backend.forward(
        model, input_ids=IDS[:, 4:], past_key_values=cache, attention_mask=np.ones((3, LENGTH), np.int64)
    )
    whole = backend.forward(model, input_ids=IDS)
    compare(found.logits, whole.logits[:, 4:], CACHE_FLOAT64)
    compare(masked.logits, whole.logits[:, 4:], CACHE_FLOAT64)


@pytest.mark.parametrize("padding", ["no padding", "left padding"])
def test_an_allocated_cache_holds_all_steps(backend, load, padding):
    model = load(backend, "pre_ln", dtype="float64")
    mask = None if MASKS[padding] is None else MASKS[padding].astype(np.int64)
    whole, _ = in_pieces(backend, model, (LENGTH,), mask)
    empty = backend.allocate_cache(model, 3, LENGTH + 2, dtype="float64")
    pieces, cache = in_pieces(backend, model, (3, 1, 1, 1), mask, cache=empty)
    compare(pieces, whole, CACHE_FLOAT64, attended=mask)
    assert cache.capacity == LENGTH + 2
    assert int(cache.length) == LENGTH
    assert int(empty.length) == 0


def test_a_mask_as_wide_as_the_capacity_is_taken_too(backend, load):
    """One compiled step can keep one mask for all its steps."""
    model = load(backend, "pre_ln", dtype="float64")
    mask = np.ones((3, LENGTH + 2), np.int64)
    mask[1, 0] = 0
    empty = backend.allocate_cache(model, 3, LENGTH + 2, dtype="float64")
    first = backend.forward(model, input_ids=IDS[:, :4], attention_mask=mask, past_key_values=empty, use_cache=True)
    second = backend.forward(model, input_ids=IDS[:, 4:], attention_mask=mask, past_key_values=first.cache)
    whole = backend.forward(model, input_ids=IDS, attention_mask=mask[:, :LENGTH])
    found = np.concatenate([first.logits, second.logits], axis=1)
    compare(found, whole.logits, CACHE_FLOAT64, attended=mask[:, :LENGTH])


def test_explicit_positions_with_a_past(backend, load):
    model = load(backend, "pre_ln", dtype="float64")
    positions = np.array([[3, 4, 9, 10, 20, 21]] * 3)
    whole = backend.forward(model, input_ids=IDS, position_ids=positions)
    cache = backend.forward(model, input_ids=IDS[:, :4], position_ids=positions[:, :4], use_cache=True).cache
    rest = backend.forward(model, input_ids=IDS[:, 4:], position_ids=positions[:, 4:], past_key_values=cache)
    compare(rest.logits, whole.logits[:, 4:], CACHE_FLOAT64)


def test_probabilities_over_past_and_new_keys(backend, load):
    model = load(backend, "pre_ln", dtype="float64")
    whole = backend.forward(model, input_ids=IDS, output_attentions=True)
    cache = backend.forward(model, input_ids=IDS[:, :4], use_cache=True).cache
    rest = backend.forward(model, input_ids=IDS[:, 4:], past_key_values=cache, output_attentions=True)
    for index, probs in enumerate(rest.attentions):
        compare(probs, whole.attentions[index][:, :, 4:], CACHE_FLOAT64, what=f"layer {index}")


def test_a_cache_is_returned_when_it_is_wanted(backend, load):
    model = load(backend, "pre_ln")
    assert config_of("pre_ln").use_cache
    assert backend.forward(model, input_ids=IDS).cache is not None
    assert backend.forward(model, input_ids=IDS, use_cache=False).cache is None


def test_past_and_new_tokens_together_must_have_positions(backend, load):
    model = load(backend, "pre_ln")
    limit = config_of("pre_ln").max_position_embeddings
    ids = np.full((1, limit), 5)
    cache = backend.forward(model, checked=True, input_ids=ids, use_cache=True).cache
    with pytest.raises(InputError, match=f"{limit + 1} tokens long.*positions for {limit}"):
        backend.forward(model, checked=True, input_ids=ids[:, :1], past_key_values=cache)
