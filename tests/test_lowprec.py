"""float16 and bfloat16: close to Hugging Face's own half-precision results, and finite where they once were not."""

import numpy as np
import pytest

from tests.cases import expected, inputs_of
from tests.tolerances import BFLOAT16, FLOAT16, compare

DTYPES = {"float16": ("fp16", FLOAT16), "bfloat16": ("bf16", BFLOAT16)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_computed_in_half_precision(backend, load, dtype):
    short, tolerance = DTYPES[dtype]
    group = expected("pre_ln", "lowprec_expected.npz")["leftpad"]
    found = backend.forward(load(backend, "pre_ln", dtype=dtype), **inputs_of(group))
    mask = group["attention_mask"]
    compare(found.logits, group[f"{short}_logits"], tolerance, what=dtype, attended=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_proj"])
def test_fully_masked_rows_are_finite(backend, load, variant, dtype):
    """transformers#17433: -inf added at padded rows gave NaN in batched float16 generation."""
    group = expected(variant)["leftpad"]
    mask = group["attention_mask"].copy()
    mask[-1] = 0
    found = backend.forward(
        load(backend, variant, dtype=dtype), input_ids=group["input_ids"], attention_mask=mask, labels=group["labels"]
    )
    assert np.isfinite(found.logits).all()
    assert np.isfinite(found.loss).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_left_padded_generation_in_half_precision_is_that_of_the_row_alone(backend, load, dtype):
    """transformers#17433, the complaint itself: a left-padded batch that is generated in float16."""
    model = load(backend, "pre_ln", dtype=dtype)
    ids, mask = np.array([[9, 8, 7, 6], [1, 1, 1, 40]]), np.array([[1, 1, 1, 1], [0, 0, 0, 1]])
    batch = backend.generate(model, ids, mask, max_new_tokens=4)
    assert (batch[1, 4:] == backend.generate(model, ids[1:, 3:], max_new_tokens=4)[0, 1:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_is_computed_in_float32(backend, load, dtype):
    group = expected("pre_ln")["nopad"]
    found = backend.forward(load(backend, "pre_ln", dtype=dtype), **inputs_of(group, labels=True))
    assert found.loss.dtype == np.float32
    logits, labels = found.logits[:, :-1].astype(np.float64), group["labels"][:, 1:]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = labels != -100
    picked = np.take_along_axis(log_probs, np.where(counted, labels, 0)[..., None], -1)[..., 0]
    # Half-precision logits are exact in float64; but XLA may leave out their rounding on the way to the loss, and the
    # sums of a smaller product may be taken in another order. A loss in half precision would be off by up to 4e-3.
    assert abs(float(found.loss.reshape(())) + picked[counted].mean()) < 2e-3
