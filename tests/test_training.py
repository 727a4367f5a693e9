"""Training in three frameworks: the lean loss, accumulation, gradient checkpointing, rates of dropout, AdamW."""

import importlib
import itertools

import numpy as np
import pytest

from opt_common import reference
from opt_common.lora import LoraConfig
from tests.cases import THOROUGH, expected, inputs_of
from tests.test_config_effects import BASE, IDS, seeded_model
from tests.tolerances import FLOAT32, FLOAT64, FLOAT64_GRADIENT, compare

ENDS = ("start_positions", "end_positions")
LONG = np.random.default_rng(4).integers(4, 500, (4, 16))


@pytest.fixture
def chunked(backend, monkeypatch):
    """The loss takes this many rows of logits at a time."""

    def patch(model, rows):
        module = importlib.import_module(f"{backend.package.__name__}.training")
        monkeypatch.setattr(module, "CHUNK_LOGITS", rows * model.config.vocab_size)
        backend.retrace()

    yield patch
    backend.retrace()


# Loss


@pytest.mark.parametrize("variant", ["post_ln_proj", "untied"])
def test_a_loss_in_chunks_is_the_loss(backend, load, chunked, variant):
    """Of the reference in value, and of the whole in its gradients; the last chunk is shorter than the others."""
    model = load(backend, variant, dtype="float64")
    arguments = inputs_of(expected(variant)["leftpad"], labels=True)
    whole = backend.gradients(model, **arguments)
    rows = 4
    assert (arguments["labels"][:, 1:].size % rows, arguments["labels"][:, 1:].size > 2 * rows) == (3, True)
    chunked(model, rows)
    wanted = reference.forward(model.config, backend.parameters(model), **arguments).loss
    compare(backend.forward(model, checked=True, **arguments).loss, wanted, FLOAT64)
    for name, gradient in backend.gradients(model, **arguments).items():
        compare(gradient, whole[name], FLOAT64_GRADIENT, what=name)


def test_an_adapted_head_is_trained_whole(backend):
    """Its loss is that of the logits, adapter and all."""
    model = backend.build(BASE.replace(tie_word_embeddings=False))
    model.add_lora(LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    found = backend.forward(model, input_ids=IDS, labels=IDS)
    logits = found.logits[:, :-1].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(log_probs, IDS[:, 1:, None], -1).mean()
    compare(found.loss.reshape(()), wanted, FLOAT32)


def test_no_array_is_as_large_as_the_logits(backend, chunked):
    config = BASE.replace(vocab_size=512)
    model = backend.build(config)
    arguments = {"input_ids": LONG, "labels": LONG}
    logits, table = LONG.size * 512, 512 * 8
    assert backend.largest_array(model, **arguments) >= logits - 512 * len(LONG), "the measure sees nothing"
    chunked(model, 4)
    assert backend.largest_array(model, **arguments) <= table < logits / 7


def test_logits_come_unless_training_wants_the_loss_alone(backend):
    model = backend.build(BASE)
    for training, labels, asked, given in (
        (False, None, None, True),
        (False, IDS, None, True),
        (True, None, None, True),
        (True, IDS, None, False),
        (True, IDS, True, True),
        (False, IDS, False, False),
    ):
        targets = {} if labels is None else {"labels": labels}
        found = backend.forward(model, training=training, checked=True, input_ids=IDS, output_logits=asked, **targets)
        assert (found.logits is not None, found.loss is not None) == (given, labels is not None)
        assert (found.cache is None) == (training or labels is not None)


@pytest.mark.parametrize("variant", THOROUGH)
def test_the_sum_over_labels_is_divided_by_the_number_that_is_given(backend, load, variant):
    group = expected(variant)["rightpad"]
    found = backend.forward(load(backend, variant), **inputs_of(group, labels=True), num_items_in_batch=np.int64(7))
    compare(found.loss, group["loss_num_items_7"][0], FLOAT32)


def test_accumulated_gradients_are_those_of_the_whole_batch(backend, load):
    """Rows with different numbers of labels, in two unequal batches."""
    model = load(backend, "pre_ln", dtype="float64")
    arguments = inputs_of(expected("pre_ln")["rightpad"], labels=True)
    whole = backend.gradients(model, **arguments)
    count = np.int64((arguments["labels"][:, 1:] != -100).sum())
    parts = [{name: array[rows] for name, array in arguments.items()} for rows in (slice(0, 1), slice(1, None))]
    assert len({float((part["labels"][:, 1:] != -100).mean()) for part in parts}) == 2, "means of means would do"
    found = [backend.gradients(model, **part, num_items_in_batch=count) for part in parts]
    for name, gradient in whole.items():
        compare(sum(part[name] for part in found), gradient, FLOAT64_GRADIENT, what=name)


# Gradient checkpointing

DROPPING = BASE.replace(num_hidden_layers=2, dropout=0.3, attention_dropout=0.2, layerdrop=0.2)
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def checkpointed_and_not(backend, model, function):
    """What a function returns with all activations kept and without, from the same random numbers."""
    results = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        backend.reseed(model, 3)
        results.append(function())
    assert model.is_gradient_checkpointing
    return results


def test_checkpointing_changes_no_output_and_no_gradient(backend):
    """transformers#23366, #23367: swapped arguments lost the attentions. Dropout and layerdrop are on, of course."""
    model = seeded_model(backend, DROPPING.replace(do_layer_norm_before=False, word_embed_proj_dim=6))
    arguments = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    asked = {"output_hidden_states": True, "output_attentions": True, "output_logits": True}
    kept, again = checkpointed_and_not(
        backend, model, lambda: backend.forward(model, training=True, **arguments, **asked)
    )
    assert np.abs(kept.logits - backend.forward(model, **arguments).logits).max() > 1e-3, "nothing was dropped"
    compare(again.loss, kept.loss, FLOAT64)
    compare(again.logits, kept.logits, FLOAT64)
    for found, wanted in zip(again.hidden_states, kept.hidden_states, strict=True):
        compare(found, wanted, FLOAT64)
    assert len(again.attentions) == 2
    for found, wanted in zip(again.attentions, kept.attentions, strict=True):
        compare(found, wanted, FLOAT64)
    kept, again = checkpointed_and_not(backend, model, lambda: backend.gradients(model, training=True, **arguments))
    for name, gradient in kept.items():
        compare(again[name], gradient, FLOAT64_GRADIENT, what=name)


def test_checkpointing_computes_every_layer_again_in_training_only(backend):
    model = backend.build(BASE.replace(num_hidden_layers=3))
    arguments = {"input_ids": IDS, "labels": IDS}
    assert backend.recomputed_layers(model, **arguments) == 0
    model.gradient_checkpointing_enable()
    assert backend.recomputed_layers(model, **arguments) == 3
    assert backend.recomputed_layers(model, **arguments, use_cache=True) == 0
    model.gradient_checkpointing_enable(every_n_layers=2)
    assert backend.recomputed_layers(model, **arguments) == 2
    model.gradient_checkpointing_disable()
    assert backend.recomputed_layers(model, **arguments) == 0


@pytest.mark.parametrize("head", ["sequence_classification", "question_answering"])
def test_heads_checkpoint_too(backend, head):
    model = backend.build(BASE.replace(num_hidden_layers=2), head=head)
    target = np.array([1, 0])
    targets = {"labels": target} if head == "sequence_classification" else dict.fromkeys(ENDS, target)
    model.gradient_checkpointing_enable()
    assert backend.recomputed_layers(model, input_ids=IDS, **targets) == 2


def test_generation_goes_on_while_checkpointing(backend):
    """transformers#21737, #21943: generate broke, and caches were lost."""
    model = backend.build(BASE)
    wanted = backend.generate(model, IDS, max_new_tokens=4)
    model.gradient_checkpointing_enable()
    np.testing.assert_array_equal(backend.generate(model, IDS, max_new_tokens=4), wanted)
    cache = backend.forward(model, training=True, input_ids=IDS, use_cache=True).cache
    assert int(cache.length) == IDS.shape[1]


# Rates


def within(found, rate, draws):
    """Whether a share of so many independent draws lies within five standard deviations of its rate."""
    return abs(found - rate) < 5 * np.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_dropout_has_the_rate_of_the_configuration(backend, rate):
    """Both branches of a layer, each with the other one silenced."""
    config = BASE.replace(dropout=rate, hidden_size=64, word_embed_proj_dim=64, _remove_final_layer_norm=True)
    for silenced in ("self_attn.out_proj", "fc2"):
        model = seeded_model(backend, config)
        for parameter in backend.table(model):
            if f".{silenced}." in parameter.name:
                backend.set(model, parameter, np.zeros(parameter.shape))
        backend.reseed(model, 11)
        before, after = backend.forward(
            model, training=True, input_ids=LONG % 40, output_hidden_states=True
        ).hidden_states
        assert within((np.abs(after - before) < 1e-9).mean(), rate, after.size)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_attention_dropout_has_the_rate_of_the_configuration(backend, rate):
    """A lone token attends to itself with probability one: dropped or not, for each head."""
    config = BASE.replace(attention_dropout=rate, num_attention_heads=8)
    model = backend.build(config)
    backend.reseed(model, 12)
    lone = np.full((500, 1), 9)
    (probs,) = backend.forward(model, training=True, input_ids=lone, output_attentions=True).attentions
    assert set(np.unique(probs.round(4))) == {0, np.float32(round(1 / (1 - rate), 4))}
    assert within((probs == 0).mean(), rate, probs.size)


def test_layerdrop_has_the_rate_of_the_configuration(backend):
    """One draw for a layer and a call: its rows share it, its layers do not."""
    rate, layers, calls = 0.3, 25, 8
    model = backend.build(BASE.replace(layerdrop=rate, num_hidden_layers=layers, init_std=0.2))
    backend.reseed(model, 13)
    drawn = []
    for _ in range(calls):
        states = backend.forward(model, training=True, input_ids=IDS, output_hidden_states=True).hidden_states
        rows = [(a == b).all(axis=(1, 2)) for a, b in itertools.pairwise(states[:-1])]
        assert all(len(set(row)) == 1 for row in rows)
        drawn.append([row[0] for row in rows])
    assert within(np.mean(drawn), rate, np.size(drawn))
    assert len({tuple(row) for row in drawn}) == calls


# Mixed precision

MIXED = [
    ("float16", "question_answering"),
    ("bfloat16", "question_answering"),
    ("bfloat16", "sequence_classification"),
    ("float16", None),
]


@pytest.mark.parametrize(("dtype", "head"), MIXED)
def test_mixed_precision_trains_on_finite_float32_numbers(backend, dtype, head):
    """transformers#31162, peft#236, #350, #1522: NaN, or a loss of 0, of question answering in half precision.

    Rows are padded on the left, and one is nothing but padding.
    """
    model = backend.mixed(DROPPING.replace(num_labels=3), dtype, head)
    model.gradient_checkpointing_enable()
    mask = np.concatenate([MASK, np.zeros_like(MASK[:1])])
    ids, target = np.concatenate([IDS, IDS[:1]]), np.array([2, 4, 1])
    targets = {
        None: {"labels": ids},
        "sequence_classification": {"labels": target % 3},
        "question_answering": dict.fromkeys(ENDS, target),
    }[head]
    arguments = {"input_ids": ids, "attention_mask": mask, **targets}
    with backend.autocast(dtype):
        loss = backend.forward(model, training=True, **arguments).loss
        gradients = backend.gradients(model, training=True, **arguments)
    assert loss.dtype == np.float32
    assert np.isfinite(loss)
    assert loss > 0.1
    for parameter in backend.table(model):
        assert "float32" in str(backend.parameter(model, parameter).dtype)
        gradient = gradients[parameter.name]
        assert gradient.dtype == np.float32, parameter.name
        assert np.isfinite(gradient).all(), parameter.name
    assert max(np.abs(gradient).max() for gradient in gradients.values()) > 1e-3


def test_the_dtype_of_a_loaded_model_is_float32_unless_told(backend, checkpoint):
    """peft#3053, transformers#21681, #34692: a checkpoint in float16 became a model in float16, which overflowed."""
    path = checkpoint("pre_ln", "safetensors_fp16")
    model = backend.load(path)
    assert all(value.dtype == np.float32 for value in backend.parameters(model).values())
    group = expected("pre_ln")["rightpad"]
    arguments = inputs_of(group, labels=True)
    gradients = backend.gradients(model, training=True, **arguments)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    for dtype in ("float16", "auto"):
        half = (backend.lm).from_pretrained(path, dtype=dtype)
        assert "float16" in str(backend.parameter(half, backend.table(half)[0]).dtype)
        assert np.isfinite(backend.forward(half, **arguments).loss), "float16 on a CPU"


def test_a_350m_like_model_is_fine_tuned_saved_and_loaded(backend, checkpoint, tmp_path):
    """transformers#17225, #17389: the head of 350m was saved 512 wide and expected 1024 wide."""
    model = without_dropout(backend, checkpoint("post_ln_proj"), "float32")
    _, batches = steps_of("post_ln_proj")
    before = {name: value.copy() for name, value in backend.parameters(model).items()}
    backend.train(model, batches[:1], ADAMW)
    trained = backend.parameters(model)
    assert not any(np.array_equal(trained[name], before[name]) for name in before)
    model.save_pretrained(tmp_path / "mine")
    again = backend.load(tmp_path / "mine")
    assert all(np.array_equal(value, trained[name]) for name, value in backend.parameters(again).items())
    found, wanted = (backend.forward(one, **batches[0]).logits for one in (again, model))
    np.testing.assert_array_equal(found, wanted)


# Optimizer

ADAMW = {"learning_rate": 1e-3, "beta_1": 0.9, "beta_2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
"""What the goldens were computed with, on every parameter."""


def steps_of(variant):
    groups = expected(variant, "optim_expected.npz")
    return groups, [inputs_of(groups[f"step{step}"], labels=True) for step in range(3)]


@pytest.mark.parametrize("variant", THOROUGH)
def test_three_steps_of_adamw_are_the_goldens(backend, checkpoint, variant):
    groups, batches = steps_of(variant)
    model = without_dropout(backend, checkpoint(variant), "float32")
    losses = backend.train(model, batches, ADAMW)
    for step, loss in enumerate(losses):
        compare(loss, groups[f"step{step}"]["loss"].reshape(()), FLOAT32, what=f"step {step}")
    final = backend.parameters(model)
    assert set(final) == set(groups["final"])
    wide = without_dropout(backend, checkpoint(variant), "float64")
    gradients = [backend.gradients(wide, **batch) for batch in batches]
    for name, value in groups["final"].items():
        slack = adamw_slack([gradient[name] for gradient in gradients])
        assert name.endswith("k_proj.bias") or (slack > FLOAT32.absolute).mean() < 0.05
        compare(np.where(np.abs(final[name] - value) <= slack, value, final[name]), value, FLOAT32, what=name)


def adamw_slack(gradients):
    """How far AdamW may carry a float32 gradient's rounding into each element of a parameter.

    A step is λ g/√v̂, of size λ whatever the size of g: where g is hardly more than its rounding, so is the step's own
    sign. A key's bias is the extreme, for softmax does not see it and its gradient is rounding alone.

    Args:
        gradients: of the same parameter, in float64, at each step.
    """
    rounding = 2e-8  # of a float32 sum whose terms are near 0.1
    squares, slack = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
    for step, gradient in enumerate(gradients, start=1):
        squares = ADAMW["beta_2"] * squares + (1 - ADAMW["beta_2"]) * gradient**2
        size = np.sqrt(squares / (1 - ADAMW["beta_2"] ** step)) + ADAMW["epsilon"]
        slack += np.where(squares > 0, ADAMW["learning_rate"] * np.minimum(2, rounding / size), 0)
    return slack


@pytest.mark.parametrize("variant", THOROUGH)
def test_three_steps_of_adamw_agree_in_float64(backends, checkpoint, variant):
    _, batches = steps_of(variant)
    if len(backends) == 1:
        pytest.skip("one backend under test has nothing to agree with")
    finals = []
    for backend in backends:
        model = without_dropout(backend, checkpoint(variant), "float64")
        backend.train(model, batches, ADAMW)
        finals.append(backend.parameters(model))
    for other in finals[1:]:
        for name, value in finals[0].items():
            compare(other[name], value, FLOAT64_GRADIENT, what=name)


def without_dropout(backend, path, dtype):
    """A model of its own, for a test that changes it."""
    source = backend.load(path, dtype=dtype)
    model = backend.build(source.config.replace(dropout=0.0, attention_dropout=0.0, layerdrop=0.0), dtype=dtype)
    for parameter in backend.table(model):
        backend.set(model, parameter, backend.get(source, parameter))
    return model
