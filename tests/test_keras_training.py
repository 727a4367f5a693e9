"""Keras' own ways of training: fit, evaluate, predict, save and load_model, keras.Input, without custom objects."""

import numpy as np
import pytest

from opt_common.config import OPTConfig
from opt_common.errors import InputError
from tests.adapters import BACKENDS

if "tf" not in BACKENDS:
    pytest.skip("the TensorFlow backend is not under test", allow_module_level=True)

import keras
import tensorflow as tf

from opt_tf import TFOPTForCausalLM, TFOPTForQuestionAnswering, TFOPTForSequenceClassification

CONFIG = OPTConfig(
    vocab_size=40,
    hidden_size=8,
    num_hidden_layers=2,
    ffn_dim=12,
    max_position_embeddings=16,
    num_attention_heads=2,
    num_labels=3,
)
KERAS_WARNS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""Saving, Keras 3.15 asks NumPy 2 for arrays in the way of NumPy 1."""

IDS = (np.arange(8)[:, None] + np.arange(7)[None] + 4).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[:, :2] = 0


def compiled(model, **options):
    model.compile(optimizer=keras.optimizers.AdamW(1e-2), **options)
    return model


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@KERAS_WARNS
def test_fit_evaluate_save_and_go_on(tmp_path):
    """In a graph, from `tf.data`, with checkpointing and an incomplete last batch; the optimizer is saved too."""
    model = TFOPTForCausalLM(CONFIG.replace(dropout=0.0))
    model.gradient_checkpointing_enable()
    data = tf.data.Dataset.from_tensor_slices({"input_ids": IDS, "attention_mask": MASK, "labels": IDS}).batch(3)
    losses = compiled(model).fit(data, epochs=4, verbose=0, shuffle=False).history["loss"]
    assert losses[-1] < losses[0] - 0.1
    whole = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    found = model.evaluate({"input_ids": IDS, "attention_mask": MASK}, IDS, batch_size=8, verbose=0)
    assert abs(found - float(whole)) < 1e-5

    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again) is TFOPTForCausalLM
    logits, wanted = (one(input_ids=IDS, attention_mask=MASK).logits.numpy() for one in (again, model))
    np.testing.assert_array_equal(logits, wanted)
    assert int(again.optimizer.iterations) == int(model.optimizer.iterations) == 12
    for one, other in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_targets_apart_and_metrics():
    classifier = compiled(TFOPTForSequenceClassification(CONFIG), metrics=["accuracy"], run_eagerly=True)
    history = classifier.fit({"input_ids": IDS}, IDS[:, 0] % 3, epochs=8, batch_size=8, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["accuracy"][-1] > 0.8
    answerer = compiled(TFOPTForQuestionAnswering(CONFIG), run_eagerly=True)
    targets = {"start_positions": IDS[:, 0] % 3, "end_positions": IDS[:, 0] % 4}
    losses = answerer.fit({"input_ids": IDS}, targets, epochs=4, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert {name: array.shape for name, array in answerer.predict({"input_ids": IDS}, verbose=0).items()} == {
        "start_logits": (8, 7),
        "end_logits": (8, 7),
    }
    model = compiled(TFOPTForCausalLM(CONFIG), metrics=["sparse_categorical_accuracy"], run_eagerly=True)
    found = model.evaluate(IDS, IDS, verbose=0, return_dict=True)
    right = model(input_ids=IDS).logits.numpy()[:, :-1].argmax(-1) == IDS[:, 1:]
    assert abs(found["sparse_categorical_accuracy"] - right.mean()) < 1e-6


def test_a_loss_of_compile_is_that_of_the_logits():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = compiled(TFOPTForSequenceClassification(CONFIG), loss=loss, run_eagerly=True)
    found = model.evaluate({"input_ids": IDS}, IDS[:, 0] % 3, verbose=0)
    assert abs(found - float(model(input_ids=IDS, labels=IDS[:, 0] % 3).loss)) < 1e-5


def test_what_cannot_be_learned_from_is_told():
    model = compiled(TFOPTForCausalLM(CONFIG), run_eagerly=True)
    with pytest.raises(InputError, match="no targets"):
        model.fit({"input_ids": IDS}, verbose=0)
    with pytest.raises(InputError, match="sample_weight is not taken"):
        model.fit({"input_ids": IDS}, IDS, sample_weight=np.ones(8), verbose=0)


@KERAS_WARNS
def test_part_of_a_functional_model(tmp_path):
    base = TFOPTForSequenceClassification(CONFIG)
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in ("input_ids", "attention_mask")}
    model = keras.Model(inputs, keras.layers.Softmax()(base(inputs).logits))
    arguments = {"input_ids": IDS, "attention_mask": MASK}
    wanted = tf.nn.softmax(base(**arguments).logits)
    np.testing.assert_allclose(model(arguments).numpy(), wanted.numpy(), atol=1e-6)
    compiled(model, loss="sparse_categorical_crossentropy", run_eagerly=True)
    losses = model.fit(arguments, IDS[:, 0] % 3, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(arguments).numpy(), model(arguments).numpy())


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_dtype_policies(policy):
    """float16 with Keras' own scaling of the loss."""
    model = compiled(TFOPTForCausalLM(CONFIG, dtype=policy), run_eagerly=True)
    losses = model.fit({"input_ids": IDS, "attention_mask": MASK}, IDS, epochs=4, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert ("LossScale" in type(model.optimizer).__name__) == (policy == "mixed_float16")
    assert {str(variable.dtype) for variable in model.trainable_variables} == {"float32"}
