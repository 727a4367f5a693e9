"""Heads for sequences and spans: the goldens, the reference, padding on either side, checkpoints in every format."""

import contextlib
import functools
import importlib
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from conversion import convert, open_checkpoint, verify
from conversion.convert import class_limits
from conversion.inspect import inspect
from opt_common import reference
from opt_common.config import OPTConfig, problem_type_of
from opt_common.errors import CheckpointError, ConfigError, InputError
from opt_common.params import ARCHITECTURES, parameter_table
from tests.cases import THOROUGH, config_of, expected, inputs_of
from tests.paths import GOLDENS
from tests.tolerances import BFLOAT16, FLOAT16, FLOAT32, FLOAT32_GRADIENT, FLOAT64, FLOAT64_GRADIENT, compare

CLASSIFIER, ANSWERER = "sequence_classification", "question_answering"
HEADS = (CLASSIFIER, ANSWERER)
FORMATS = ("safetensors", "torch", "tf", "flax")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
GROUPS = ("nopad", "rightpad", "leftpad", "midpad", "padtok", "len1")
"""Groups of `heads_expected.npz` with labels and losses."""

DTYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16}
ENDS = ("start_positions", "end_positions")


@functools.cache
def parameters_of(variant, labels=3):
    """A variant's decoder and all its heads; one label is the first of three, as in the goldens."""
    found = safetensors.numpy.load_file(GOLDENS / variant / "safetensors" / "model.safetensors")
    found |= safetensors.numpy.load_file(GOLDENS / variant / "heads.safetensors")
    return {**found, "score.weight": found["score.weight"][:labels]}


def head_config(variant, head, labels=3, **changes):
    """The configuration of a variant with a head."""
    config = config_of(variant).replace(num_labels=labels, **changes)
    return config.replace(extra={**config.extra, "architectures": [ARCHITECTURES[head]]})


@pytest.fixture(scope="session")
def head_directory(tmp_path_factory):
    """A safetensors checkpoint of a head, put together by the safetensors library rather than by our own writer."""

    @functools.cache
    def find(variant, head, labels=3):
        directory = tmp_path_factory.mktemp(f"{variant}_{head}_{labels}")
        config = head_config(variant, head, labels)
        names = {parameter.name for parameter in parameter_table(config, head=head)}
        tensors = {name: array for name, array in parameters_of(variant, labels).items() if name in names}
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text(config.to_json())
        return directory

    return find


@pytest.fixture(scope="module")
def load_head(head_directory):
    """A model with a head, loaded once."""

    @functools.cache
    def find(backend, variant, head, labels=3, dtype="float32"):
        return backend.load(head_directory(variant, head, labels), head=head, dtype=dtype)

    return find


@contextlib.contextmanager
def changed(model, **changes):
    """A model whose head goes by another configuration."""
    config = model.config
    model.config = config.replace(**changes)
    try:
        yield model
    finally:
        model.config = config


def loss_of(backend, model, logits, labels, kind):
    """The backend's loss of a kind, of logits that are already there."""
    heads = importlib.import_module(f"{backend.package.__name__}.heads")
    config = model.config.replace(problem_type=kind)
    with backend.scope(model):
        loss = heads.sequence_classification_loss(config, backend.tensor(logits), backend.tensor(labels))
        return backend.array(loss)


def ends_of(group):
    return {name: group[f"qa_{name}"] for name in ENDS}


def masked(ids, lengths, side):
    """A mask of this many tokens a row, padded on a side."""
    column, length = np.arange(ids.shape[1]), np.array(lengths)[:, None]
    return (column < length if side == "right" else column >= ids.shape[1] - length).astype(np.int64)


# Goldens


@pytest.mark.parametrize("variant", THOROUGH)
def test_reference_is_the_goldens(variant):
    groups = expected(variant, "heads_expected.npz")
    for name in GROUPS:
        group = groups[name]
        inputs = inputs_of(group)
        for kind in PROBLEM_TYPES:
            config = head_config(variant, CLASSIFIER, problem_type=kind)
            found = reference.classify(config, parameters_of(variant), **inputs, labels=group[f"labels_{kind}"])
            compare(found.logits, group["seqcls_logits"], FLOAT32, what=name)
            compare(found.loss, group[f"loss_{kind}"][0], FLOAT32, what=f"{name} {kind}")
        one = head_config(variant, CLASSIFIER, labels=1)
        found = reference.classify(one, parameters_of(variant, 1), **inputs, labels=group["labels_regression1"])
        compare(found.logits, group["seqcls1_logits"], FLOAT32, what=name)
        compare(found.loss, group["loss_regression1"][0], FLOAT32, what=f"{name} with one label")
        answer = reference.answer(config_of(variant), parameters_of(variant), **inputs, **ends_of(group))
        for end in ("start", "end"):
            golden, mask = group[f"qa_{end}_logits"], group["attention_mask"]
            compare(getattr(answer, f"{end}_logits"), golden, FLOAT32, what=f"{name} {end}", attended=mask)
        compare(answer.loss, group["qa_loss"][0], FLOAT32, what=f"{name} answer")


@pytest.mark.parametrize("variant", THOROUGH)
def test_classifier_is_the_goldens(backend, load_head, variant):
    groups = expected(variant, "heads_expected.npz")
    for name in GROUPS:
        group = groups[name]
        model = load_head(backend, variant, CLASSIFIER)
        inferred = "multi_label_classification" if name == "len1" else "single_label_classification"
        found = backend.forward(model, **inputs_of(group), labels=group[f"labels_{inferred}"])
        compare(found.logits, group["seqcls_logits"], FLOAT32, what=name)
        compare(found.loss, group[f"loss_{inferred}"][0], FLOAT32, what=f"{name} {inferred}")
        assert model.config.problem_type is None
        for kind in PROBLEM_TYPES:
            loss = loss_of(backend, model, found.logits, group[f"labels_{kind}"], kind)
            compare(loss, group[f"loss_{kind}"][0], FLOAT32, what=f"{name} {kind}")
        # The one label of the other golden model is the first of these three.
        compare(found.logits[:, :1], group["seqcls1_logits"], FLOAT32, what=name)
        one = load_head(backend, variant, CLASSIFIER, labels=1)
        loss = loss_of(backend, one, found.logits[:, :1], group["labels_regression1"], None)
        compare(loss, group["loss_regression1"][0], FLOAT32, what=f"{name} with one label")
    group = groups["leftpad"]
    found = backend.forward(
        one,
        **inputs_of(group),
        labels=group["labels_regression1"],
        output_hidden_states=True,
        output_attentions=True,
    )
    compare(found.logits, group["seqcls1_logits"], FLOAT32)
    compare(found.loss, group["loss_regression1"][0], FLOAT32)
    compare(found.hidden_states[-1], group["base_last_hidden_state"], FLOAT32, attended=group["attention_mask"])
    assert len(found.hidden_states) == len(found.attentions) + 1 == config_of(variant).num_hidden_layers + 1


@pytest.mark.parametrize("variant", THOROUGH)
def test_answers_are_the_goldens(backend, load_head, variant):
    groups = expected(variant, "heads_expected.npz")
    for name in GROUPS:
        group = groups[name]
        found = backend.forward(load_head(backend, variant, ANSWERER), **inputs_of(group), **ends_of(group))
        mask = group["attention_mask"]
        compare(found.start_logits, group["qa_start_logits"], FLOAT32, what=name, attended=mask)
        compare(found.end_logits, group["qa_end_logits"], FLOAT32, what=name, attended=mask)
        compare(found.loss, group["qa_loss"][0], FLOAT32, what=name)


@pytest.mark.parametrize("group", ["allpad_row", "embeds", "nopadid"])
@pytest.mark.parametrize("variant", THOROUGH)
def test_row_26_pooling_without_a_plain_end(backend, load_head, variant, group):
    """A row of pad ids alone, embeddings instead of ids, no pad id: transformers#24265, #35352, #35909."""
    changes = {"pad_token_id": None} if group == "nopadid" else {}
    golden = expected(variant, "heads_expected.npz")[group]
    with changed(load_head(backend, variant, CLASSIFIER), **changes) as model:
        found = backend.forward(model, **inputs_of(golden))
    compare(found.logits, golden["seqcls_logits"], FLOAT32)
    config = head_config(variant, CLASSIFIER, **changes)
    compare(reference.classify(config, parameters_of(variant), **inputs_of(golden)).logits, found.logits, FLOAT32)


@pytest.mark.parametrize("variant", THOROUGH)
def test_gradients_are_the_goldens(backend, load_head, variant):
    group = expected(variant, "heads_expected.npz")["rightpad"]
    labels = group["labels_single_label_classification"]
    found = backend.gradients(load_head(backend, variant, CLASSIFIER), **inputs_of(group), labels=labels)
    compare(found["score.weight"], group["grad_score.weight"], FLOAT32_GRADIENT)
    compare(found["model.decoder.layers.0.fc1.weight"], group["grad_fc1_0.weight"], FLOAT32_GRADIENT)
    found = backend.gradients(load_head(backend, variant, ANSWERER), **inputs_of(group), **ends_of(group))
    compare(found["qa_outputs.weight"], group["grad_qa_outputs.weight"], FLOAT32_GRADIENT)
    compare(found["qa_outputs.bias"], group["grad_qa_outputs.bias"], FLOAT32_GRADIENT)


# float64


@pytest.mark.parametrize("variant", THOROUGH)
def test_float64_is_the_reference(backend, load_head, variant):
    group = expected(variant, "heads_expected.npz")["leftpad"]
    inputs, parameters = inputs_of(group), parameters_of(variant)
    model = load_head(backend, variant, CLASSIFIER, dtype="float64")
    found = backend.forward(model, **inputs)
    compare(found.logits, reference.classify(model.config, parameters, **inputs).logits, FLOAT64)
    for kind in PROBLEM_TYPES:
        labels = group[f"labels_{kind}"]
        labels = labels.astype(np.float64) if labels.dtype.kind == "f" else labels
        config = model.config.replace(problem_type=kind)
        wanted = reference.sequence_classification_loss(config, found.logits, labels)
        compare(loss_of(backend, model, found.logits, labels, kind), wanted, FLOAT64, what=kind)
    model = load_head(backend, variant, ANSWERER, dtype="float64")
    found = backend.forward(model, **inputs, **ends_of(group))
    wanted = reference.answer(model.config, parameters, **inputs, **ends_of(group))
    compare(found.start_logits, wanted.start_logits, FLOAT64, attended=group["attention_mask"])
    compare(found.end_logits, wanted.end_logits, FLOAT64, attended=group["attention_mask"])
    compare(found.loss, wanted.loss, FLOAT64)


@pytest.mark.parametrize("head", HEADS)
def test_float64_gradients_agree_between_backends(backends, load_head, head):
    group = expected("post_ln_proj", "heads_expected.npz")["leftpad"]
    targets = ends_of(group) if head == ANSWERER else {"labels": group["labels_single_label_classification"]}
    first, *others = (
        backend.gradients(load_head(backend, "post_ln_proj", head, dtype="float64"), **inputs_of(group), **targets)
        for backend in backends
    )
    assert np.abs(first["model.decoder.layers.0.fc1.weight"]).max() > 1e-4
    for other in others:
        for name, gradient in first.items():
            compare(other[name], gradient, FLOAT64_GRADIENT, what=name)


def test_losses_of_the_reference_have_their_slopes():
    """Central differences of the reference's losses against the gradients that calculus gives."""
    rng = np.random.default_rng(5)
    logits, step = rng.normal(size=(4, 3)), 1e-6
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    yes, numbers, chosen = rng.integers(0, 2, (4, 3)).astype(float), rng.normal(size=(4, 3)), np.array([2, 0, -100, 1])
    one_hot = np.eye(3)[np.maximum(chosen, 0)]
    wanted = {
        "single_label_classification": (chosen, (probabilities - one_hot) * (chosen != -100)[:, None] / 3),
        "multi_label_classification": (yes, (1 / (1 + np.exp(-logits)) - yes) / 12),
        "regression": (numbers, 2 * (logits - numbers) / 12),
    }
    for kind, (labels, slope) in wanted.items():
        config = OPTConfig(num_labels=3, problem_type=kind)
        for index in np.ndindex(logits.shape):
            up, down = logits.copy(), logits.copy()
            up[index] += step
            down[index] -= step
            losses = [reference.sequence_classification_loss(config, x, labels) for x in (up, down)]
            assert abs((losses[0] - losses[1]) / (2 * step) - slope[index]) < 1e-8, kind


# Padding


@pytest.mark.parametrize("head", HEADS)
def test_row_26_a_row_in_a_batch_is_the_row_alone(backend, load_head, head):
    """Whichever side the padding is on, whatever is written there, with a mask or by the pad id."""
    ids = np.random.default_rng(1).integers(4, 500, (2, 8))
    lengths = (8, 5)
    model = load_head(backend, "pre_ln", head, dtype="float64")
    for side in ("left", "right"):
        mask = masked(ids, lengths, side)
        padded = backend.forward(model, input_ids=np.where(mask == 1, ids, 1), attention_mask=mask)
        hidden = backend.forward(model, input_ids=ids, attention_mask=mask)  # ordinary tokens under the mask
        for row, length in enumerate(lengths):
            alone = backend.forward(model, input_ids=ids[row][mask[row] == 1][None])
            for found in (padded, hidden):
                if head == CLASSIFIER:
                    compare(found.logits[row], alone.logits[0], FLOAT64, what=f"{side}, {length} tokens")
                else:
                    kept = found.start_logits[row][mask[row] == 1]
                    compare(kept, alone.start_logits[0], FLOAT64, what=f"{side}, {length} tokens")


def test_row_26_the_pad_id_tells_without_a_mask(backend, load_head):
    ids = np.random.default_rng(2).integers(4, 500, (2, 7))
    ids[1, 4:] = 1
    model = load_head(backend, "pre_ln", CLASSIFIER, dtype="float64")
    found = backend.forward(model, input_ids=ids).logits
    compare(found[1], backend.forward(model, input_ids=ids[1:, :4]).logits[0], FLOAT64)


def test_row_26_embeddings_with_a_mask(backend, load_head):
    """transformers#46782: the last column was taken here, padding or not, and still is."""
    rng = np.random.default_rng(3)
    embeddings = rng.normal(size=(2, 6, config_of("post_ln_proj").word_embed_proj_dim))
    model = load_head(backend, "post_ln_proj", CLASSIFIER, dtype="float64")
    for side in ("left", "right"):
        mask = masked(embeddings, (6, 3), side)
        found = backend.forward(model, inputs_embeds=embeddings, attention_mask=mask).logits
        alone = backend.forward(model, inputs_embeds=embeddings[1][mask[1] == 1][None]).logits
        compare(found[1], alone[0], FLOAT64, what=side)


def test_row_26_without_a_pad_id_the_mask_decides_or_an_error_does(backend, load_head):
    ids = np.random.default_rng(4).integers(4, 500, (2, 6))
    mask = masked(ids, (6, 4), "right")
    with changed(load_head(backend, "pre_ln", CLASSIFIER, dtype="float64"), pad_token_id=None) as model:
        found = backend.forward(model, input_ids=ids, attention_mask=mask).logits
        compare(found[1], backend.forward(model, input_ids=ids[1:, :4]).logits[0], FLOAT64)
        with pytest.raises(InputError, match=r"2 rows, but without pad_token_id or attention_mask"):
            backend.forward(model, input_ids=ids, checked=True)


def test_pooling_of_any_mask_is_the_reference_s(backend, load_head):
    """Also behind a cached prefix, which the mask covers and the new tokens do not."""
    rng = np.random.default_rng(6)
    heads = importlib.import_module(f"{backend.package.__name__}.heads")
    model = load_head(backend, "pre_ln", CLASSIFIER)
    hidden = backend.tensor(np.zeros((40, 6, 32), np.float32))
    ids, mask = rng.integers(0, 3, (40, 6)), rng.integers(0, 2, (40, 8))
    for config in (model.config, model.config.replace(pad_token_id=None)):
        for given_ids in (ids, None):
            found = heads.pooled_positions(
                config, hidden, None if given_ids is None else backend.tensor(ids), backend.tensor(mask), 2
            )
            wanted = reference.pooled_positions(config, 6, given_ids, mask[:, 2:])
            np.testing.assert_array_equal(backend.array(found), wanted)


def test_a_cached_prefix_changes_nothing(backend, load_head):
    ids = np.random.default_rng(6).integers(4, 500, (3, 10))
    mask = masked(ids, (10, 7, 6), "right")
    model = load_head(backend, "post_ln_proj", CLASSIFIER)
    whole = backend.forward(model, input_ids=ids, attention_mask=mask)
    first = backend.forward(model, input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    rest = backend.forward(model, input_ids=ids[:, 5:], attention_mask=mask, past_key_values=first.cache)
    compare(rest.logits, whole.logits, FLOAT32)


def test_pooling_rule_by_hand():
    config = OPTConfig()
    ids = np.array([[5, 6, 7, 1], [1, 1, 5, 6], [5, 1, 6, 1], [1, 1, 1, 1]])
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])

    def rule(config, ids, mask):
        return reference.pooled_positions(config, 4, ids, mask).tolist()

    assert rule(config, ids, mask) == [1, 3, 2, 2]
    assert rule(config, ids, None) == [2, 3, 2, 0]  # as Hugging Face
    assert rule(config, None, mask) == [1, 3, 3, 3]
    assert rule(config.replace(pad_token_id=None), ids, mask) == [1, 3, 3, 3]
    assert rule(config, None, None) == [3]


# Inputs


def test_wrong_targets_are_told(backend, load_head):
    classifier, answerer = (load_head(backend, "pre_ln", head) for head in HEADS)
    ids = np.full((2, 4), 9)
    cases = [
        (classifier, {"labels": np.array([0, 3])}, r"labels has the value 3, expected values from 0 to 2"),
        (
            classifier,
            {"labels": np.array([0, 1, 2])},
            r"labels has shape \(3,\), expected \(2,\) or \(2, 1\) for single",
        ),
        (classifier, {"labels": np.zeros((2, 2), np.float32)}, r"expected \(2, 3\) for multi_label_classification"),
        (answerer, {"start_positions": np.array([0, 1])}, "start_positions alone, expected both"),
        (answerer, dict.fromkeys(ENDS, np.zeros((2, 4), int)), r"start_positions has shape \(2, 4\), expected \(2,\)"),
        (answerer, dict.fromkeys(ENDS, np.zeros(2, np.float32)), "end_positions has dtype float32, expected integers"),
    ]
    for model, targets, told in cases:
        with pytest.raises(InputError, match=told):
            backend.forward(model, input_ids=ids, checked=True, **targets)


def test_labels_that_do_not_count(backend, load_head):
    model = load_head(backend, "pre_ln", CLASSIFIER)
    logits = np.random.default_rng(8).normal(size=(2, 3)).astype(np.float32)
    both = loss_of(backend, model, logits, np.array([1, -100]), None)
    compare(both, loss_of(backend, model, logits[:1], np.array([1]), None), FLOAT32)
    # A column of labels is as good as a row of them.
    compare(loss_of(backend, model, logits, np.array([[1], [-100]]), None), both, FLOAT32)
    assert np.isnan(loss_of(backend, model, logits, np.array([-100, -100]), None))
    heads = importlib.import_module(f"{backend.package.__name__}.heads")
    ends = (backend.tensor(logits), backend.tensor(logits), *(backend.tensor(np.array([[3], [9]])),) * 2)
    assert np.isnan(backend.array(heads.question_answering_loss(*ends)))


def test_the_kind_of_problem_is_inferred_for_each_call():
    assert problem_type_of(OPTConfig(num_labels=1), np.dtype(np.int64)) == "regression"
    assert problem_type_of(OPTConfig(), np.dtype(np.uint8)) == "single_label_classification"
    assert problem_type_of(OPTConfig(), np.dtype(np.float16)) == "multi_label_classification"
    assert problem_type_of(OPTConfig(), np.dtype(bool)) == "multi_label_classification"
    assert problem_type_of(OPTConfig(problem_type="regression"), np.dtype(np.int32)) == "regression"


# Half precision


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_18_losses_are_finite_and_float32_in_half_precision(backend, load_head, dtype):
    """transformers#31162: a question-answering head in float16 gave NaN. Labels keep their own dtype."""
    group = expected("post_ln_proj", "heads_expected.npz")["leftpad"]
    model = load_head(backend, "post_ln_proj", ANSWERER, dtype=dtype)
    found = backend.forward(model, **inputs_of(group), **ends_of(group))
    assert found.loss.dtype == np.float32
    # XLA may leave out the rounding of the logits on their way to the loss, so that it is not that of the logits.
    wanted = reference.question_answering_loss(found.start_logits, found.end_logits, *ends_of(group).values())
    compare(found.loss, wanted, DTYPES[dtype])
    if dtype == "float16":  # the narrower range of the two
        gradients = backend.gradients(model, **inputs_of(group), **ends_of(group))
        assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    labels = np.full((3, 3), 1e6, np.float32)  # infinite in float16
    with changed(load_head(backend, "post_ln_proj", CLASSIFIER, dtype=dtype), problem_type="regression") as model:
        found = backend.forward(model, **inputs_of(group), labels=labels)
    assert found.loss.dtype == np.float32
    compare(found.loss, ((found.logits.astype(np.float64) - 1e6) ** 2).mean(), FLOAT32)


# Checkpoints


@pytest.mark.parametrize(
    ("variant", "folder", "head"),
    [("pre_ln", "qa_torch_bin", ANSWERER), ("post_ln_proj", "seqcls_safetensors", CLASSIFIER)],
)
def test_hugging_face_s_own_files_load(backend, variant, folder, head):
    model = backend.load(GOLDENS / variant / folder, head=head)
    found = backend.parameters(model)
    assert all(np.array_equal(found[name], parameters_of(variant)[name]) for name in found)
    assert model.config.num_labels == (3 if head == CLASSIFIER else 2)
    group = expected(variant, "heads_expected.npz")["nopad"]
    results = backend.forward(model, **inputs_of(group))
    golden = "seqcls_logits" if head == CLASSIFIER else "qa_start_logits"
    compare(results.logits if head == CLASSIFIER else results.start_logits, group[golden], FLOAT32)


@pytest.mark.parametrize("head", HEADS)
def test_row_7_saved_and_loaded_in_every_format(backend, load_head, head, tmp_path):
    """A 350m-like model: the head is word_embed_proj_dim wide, and stays so (transformers#17225, #17389)."""
    model = load_head(backend, "post_ln_proj", head)
    before = backend.parameters(model)
    width = config_of("post_ln_proj").word_embed_proj_dim
    assert before["score.weight" if head == CLASSIFIER else "qa_outputs.weight"].shape[1] == width
    for format in FORMATS:
        model.save_pretrained(tmp_path / format, format=format)
        again = backend.load(tmp_path / format, head=head)
        after = backend.parameters(again)
        assert before.keys() == after.keys()
        assert all(np.array_equal(after[name], before[name]) for name in before), format
        assert again.config.num_labels == 3
        assert again.config.extra["architectures"] == [ARCHITECTURES[head]]
        assert not (tmp_path / format / "generation_config.json").exists()


@pytest.mark.parametrize("head", HEADS)
def test_conversion_there_and_back(head_directory, head, tmp_path):
    source = head_directory("pre_ln", head)
    for format in FORMATS:
        for size in (None, "50KB"):
            there, back = tmp_path / f"{format}{size}", tmp_path / f"back_{format}{size}"
            done = convert(source, there, format, max_shard_size=size)
            assert len(done.files) > 2 if size else len(done.files) == 2
            assert bool(done.warnings) == (format in ("tf", "flax"))
            convert(there, back, "safetensors")
            with open_checkpoint(back) as one, open_checkpoint(source) as other:
                assert (one.head, set(one.names)) == (head, set(other.names))
                assert all(one.read(name).tobytes() == other.read(name).tobytes() for name in one.names)
                assert one.config.id2label == other.config.id2label
    assert json.loads((back / "config.json").read_text())["id2label"] == {str(i): f"LABEL_{i}" for i in range(3)}


def test_transformers_has_no_such_class_in_tensorflow_and_flax():
    config = OPTConfig()
    assert "TFOPTForQuestionAnswering" in next(class_limits(config, "tf", ANSWERER))
    assert "FlaxOPTForSequenceClassification" in next(class_limits(config, "flax", CLASSIFIER))
    assert not list(class_limits(config, "torch", CLASSIFIER))


def test_native_names_are_those_of_a_framework_s_own_classes(head_directory, tmp_path):
    import h5py

    convert(head_directory("pre_ln", CLASSIFIER), tmp_path / "tf", "tf")
    with h5py.File(tmp_path / "tf" / "tf_model.h5") as file:
        assert list(file.attrs["layer_names"]) == ["model", "score"]
        scope = "tfopt_for_sequence_classification"
        assert list(file["score"].attrs["weight_names"]) == [f"{scope}/score/kernel:0"]
        kernel = file[f"score/{scope}/score/kernel:0"][()]
    np.testing.assert_array_equal(kernel.T, parameters_of("pre_ln")["score.weight"])


@pytest.mark.parametrize("head", HEADS)
def test_inspect_and_verify_know_heads(head_directory, head, tmp_path):
    source = head_directory("pre_ln", head)
    described = inspect(source)
    assert (described.architecture, described.problem) == (ARCHITECTURES[head], None)
    convert(source, tmp_path / "same", "flax")
    same = verify(source, tmp_path / "same")
    assert same.holds
    assert (same.function.logits, same.function.top1_agreement, same.function.greedy) == (0.0, 1.0, ())

    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    tensors = safetensors.numpy.load_file(changed / "model.safetensors")
    name = "score.weight" if head == CLASSIFIER else "qa_outputs.weight"
    safetensors.numpy.save_file({**tensors, name: -tensors[name]}, changed / "model.safetensors")
    other = verify(source, changed)
    assert [name in problem for problem in other.problems] == [True]
    assert other.function.first_divergent is None
    assert other.function.logits > 0.1
    assert other.function.top1_agreement < 1

    language_model = verify(source, GOLDENS / "pre_ln" / "safetensors")
    assert any("of class OPTForCausalLM" in problem for problem in language_model.problems)


def test_a_head_is_never_dropped_or_made_up_by_conversion(head_directory, tmp_path):
    source = shutil.copytree(head_directory("pre_ln", CLASSIFIER), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for architecture, told in (
        ("OPTForCausalLM", "unexpected: score.weight"),
        ("OPTForQuestionAnswering", "missing: qa_"),
    ):
        (source / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        with pytest.raises(CheckpointError, match=told):
            convert(source, tmp_path / "target", "torch")
    (source / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.head == CLASSIFIER


# Loading into another class


def test_a_head_is_no_obstacle_to_the_decoder_and_the_language_model(backend, head_directory):
    for head in HEADS:
        for bare in (True, False):
            found = backend.parameters(backend.load(head_directory("pre_ln", head), bare=bare))
            assert all(np.array_equal(found[name], parameters_of("pre_ln")[name]) for name in found)


def test_a_new_head_must_be_asked_for(backend, tmp_path):
    source = GOLDENS / "pre_ln" / "safetensors"
    with pytest.raises(CheckpointError, match=r"missing: score\.weight(.|\n)*new_head=True"):
        backend.load(source, head=CLASSIFIER, num_labels=5)
    names = {0: "cold", 1: "warm", 2: "hot", 3: "?"}
    model = backend.load(source, head=CLASSIFIER, new_head=True, id2label=names, problem_type="regression")
    assert (model.config.num_labels, model.config.label2id["hot"]) == (4, 2)
    assert model.config.problem_type == "regression"
    found = backend.parameters(model)
    score = found.pop("score.weight")
    assert score.shape == (4, 32)
    assert 0.5 < score.std() / model.config.init_std < 1.5
    assert all(np.array_equal(found[name], parameters_of("pre_ln")[name]) for name in found)
    model.save_pretrained(tmp_path / "mine")
    assert backend.load(tmp_path / "mine", head=CLASSIFIER).config.id2label == names

    answerer = backend.parameters(backend.load(source, head=ANSWERER, new_head=True))
    assert np.abs(answerer["qa_outputs.weight"]).max() > 0
    assert not answerer["qa_outputs.bias"].any()
    with pytest.raises(CheckpointError, match="no head with weights of its own"):
        backend.load(source, new_head=True)


def test_another_number_of_labels_needs_a_new_head(backend, head_directory):
    source = head_directory("pre_ln", CLASSIFIER)
    with pytest.raises(CheckpointError, match=r"score\.weight is \[3, 32\], expected \[4, 32\](.|\n)*new_head=True"):
        backend.load(source, head=CLASSIFIER, num_labels=4)
    assert backend.load(source, head=CLASSIFIER, num_labels=4, new_head=True).config.num_labels == 4
    with pytest.raises(ConfigError, match="id2label"):
        backend.load(source, head=CLASSIFIER, num_labels=4, id2label={0: "a"}, new_head=True)


def test_new_models_have_heads_of_the_table(backend):
    tiny = {"vocab_size": 40, "hidden_size": 8, "word_embed_proj_dim": 4, "num_hidden_layers": 1, "ffn_dim": 12}
    config = OPTConfig(
        **tiny, num_attention_heads=2, max_position_embeddings=8, tie_word_embeddings=False, num_labels=5
    )
    for head in HEADS:
        model = backend.build(config, head=head)
        assert backend.count(model) == sum(parameter.size for parameter in parameter_table(config, head=head))
        for parameter in parameter_table(config, head=head):
            assert backend.get(model, parameter).shape == parameter.shape
