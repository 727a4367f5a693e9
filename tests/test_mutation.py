"""Every check has been seen to fail: break the model in one way at a time, and the golden comparison must notice.

Each mutation alters weights, the configuration or one function of a backend, as a plausible mistake would, and the very
comparison that the suite makes must then refuse. A mutation that passes would mean that the mistake could be shipped.
"""

import importlib

import numpy as np
import pytest

from opt_common import reference
from tests.cases import THOROUGH, config_of, expected, inputs_of
from tests.tolerances import FLOAT32, FLOAT32_GRADIENT, compare, fails

LAYER = "model.decoder.layers.1."


def change(name, function):
    """A mutation of one weight."""

    def mutate(weights):
        weights[name] = function(weights[name])

    return mutate


def exchange(first, second):
    """Two weights in each other's place."""

    def mutate(weights):
        weights[first], weights[second] = weights[second], weights[first]

    return mutate


WEIGHTS = {
    "a sign flipped": change(LAYER + "fc2.weight", np.negative),
    "one element's sign flipped": change(
        LAYER + "fc1.weight", lambda w: w * np.where(np.arange(w.size) == 5, -1, 1).reshape(w.shape)
    ),
    "q and k swapped": exchange(LAYER + "self_attn.q_proj.bias", LAYER + "self_attn.k_proj.bias"),
    "k and v swapped": exchange(LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"),
    "the two norms of a layer swapped": exchange(
        LAYER + "self_attn_layer_norm.weight", LAYER + "final_layer_norm.weight"
    ),
    "a square matrix left untransposed": change(LAYER + "self_attn.out_proj.weight", np.transpose),
    "a bias dropped": change(LAYER + "fc1.bias", np.zeros_like),
    "a norm's scale dropped": change(LAYER + "final_layer_norm.weight", np.ones_like),
    "positions shifted by one": change("model.decoder.embed_positions.weight", lambda w: np.roll(w, 1, axis=0)),
    "the wrong scale of the query": change(LAYER + "self_attn.q_proj.weight", lambda w: w * 1.01),
    "the token table rounded to half precision": change(
        "model.decoder.embed_tokens.weight", lambda w: w.astype(np.float16).astype(np.float32)
    ),
}


def golden_group(variant):
    return expected(variant)["leftpad"]


@pytest.fixture(params=THOROUGH)
def variant(request):
    return request.param


@pytest.mark.parametrize("mutation", WEIGHTS)
def test_a_changed_weight_is_noticed(backend, load, variant, mutation):
    """On a model of its own, built from the weights of a good one."""
    source = load(backend, variant)
    weights = {name: value.copy() for name, value in backend.parameters(source).items()}
    model, group = fresh(backend, variant), golden_group(variant)
    install(backend, model, weights)
    compare(
        backend.forward(model, **inputs_of(group)).logits, group["logits"], FLOAT32, attended=group["attention_mask"]
    )
    WEIGHTS[mutation](weights)
    install(backend, model, weights)
    assert refused(backend, model, group)


FRESH = {}


def fresh(backend, variant):
    """A model that only this module writes to; every test installs all its weights."""
    if (backend.name, variant) not in FRESH:
        FRESH[backend.name, variant] = backend.build(config_of(variant))
    return FRESH[backend.name, variant]


def install(backend, model, weights):
    for parameter in backend.table(model):
        backend.set(model, parameter, weights[parameter.name])


def refused(backend, model, group, **options):
    """Whether the suite's own comparison fails."""
    found = backend.forward(model, **inputs_of(group), **options).logits
    return fails(found, group["logits"], FLOAT32, attended=group["attention_mask"])


CONFIGURATIONS = {
    "the final norm dropped": {"_remove_final_layer_norm": True},
    "another activation": {"activation_function": "silu"},
    "norms in the other place": {"do_layer_norm_before": None},
    "one layer fewer": {"num_hidden_layers": 1},
    "the wrong number of heads": {"num_attention_heads": 2},
}


@pytest.mark.parametrize("mutation", CONFIGURATIONS)
def test_a_model_of_another_configuration_is_noticed(backend, load, variant, mutation):
    config = config_of(variant)
    if variant == "post_ln_proj" and mutation == "the final norm dropped":
        pytest.skip("a post-norm model has no final norm to drop")
    changes = dict(CONFIGURATIONS[mutation])
    if "do_layer_norm_before" in changes:
        changes = {"do_layer_norm_before": not config.do_layer_norm_before, "_remove_final_layer_norm": True}
    model = backend.build(config.replace(**changes))
    install(backend, model, backend.parameters(load(backend, variant)))
    assert refused(backend, model, golden_group(variant))


def off_by_one(positions):
    return lambda mask: positions(mask) + 1


def unmasked_padding(attention_bias):
    return lambda mask, *rest: attention_bias(None, *rest)


def not_causal(attention_bias):
    def bias(mask, T, S, offset, like):
        return attention_bias(mask, T, S, offset + 1, like)

    return bias


FUNCTIONS = {
    "positions off by one": ("modeling", "positions", off_by_one),
    "padding attended to": ("modeling", "attention_bias", unmasked_padding),
    "the next token seen": ("modeling", "attention_bias", not_causal),
}


@pytest.mark.parametrize("mutation", FUNCTIONS)
def test_a_wrong_rule_is_noticed(backend, load, variant, mutation, monkeypatch):
    file, name, mutate = FUNCTIONS[mutation]
    module = importlib.import_module(f"{backend.package.__name__}.{file}")
    monkeypatch.setattr(module, name, mutate(getattr(module, name)))
    assert refused(backend, load(backend, variant), golden_group(variant), checked=True)


def test_a_query_left_unscaled_is_noticed(backend, load, variant, monkeypatch):
    module = importlib.import_module(f"{backend.package.__name__}.modeling")
    attend, scale = module.attend, config_of(variant).head_dim ** 0.5
    monkeypatch.setattr(module, "attend", lambda q, *rest, **options: attend(q * scale, *rest, **options))
    assert refused(backend, load(backend, variant), golden_group(variant), checked=True)


def test_positions_without_regard_to_padding_are_noticed(backend, load, variant):
    group = golden_group(variant)
    columns = np.broadcast_to(np.arange(group["input_ids"].shape[1]), group["input_ids"].shape).copy()
    assert refused(backend, load(backend, variant), group, position_ids=columns)


def test_labels_that_are_not_shifted_are_noticed(backend, load, variant):
    group = golden_group(variant)
    shifted = np.concatenate([group["labels"][:, :1], group["labels"][:, :-1]], axis=1)
    found = backend.forward(load(backend, variant), **inputs_of(group), labels=shifted)
    assert fails(found.loss.reshape(1), group["loss"], FLOAT32, attended=None)


def test_a_pad_row_with_an_input_gradient_is_noticed(backend, load):
    """The golden gradients keep the pad row's input side out; a model without the rule must not match them."""
    name = "model.decoder.embed_tokens.weight"
    golden = expected("pre_ln")["grad_padtok"][name]
    ruleless = backend.build(config_of("pre_ln").replace(pad_token_id=None))
    install(backend, ruleless, backend.parameters(load(backend, "pre_ln")))
    found = backend.gradients(ruleless, **inputs_of(expected("pre_ln")["padtok"], labels=True))[name]
    assert fails(found, golden, FLOAT32_GRADIENT, attended=None)
    pad = config_of("pre_ln").pad_token_id
    compare(np.delete(found, pad, axis=0), np.delete(golden, pad, axis=0), FLOAT32_GRADIENT)


def test_a_stale_cache_is_noticed(backend, load):
    """Keys and values of another prefix change what follows by far more than the tolerance of the cache tests."""
    model = load(backend, "pre_ln", dtype="float64")
    ids = np.array([[5, 6, 7, 8]])
    stale = backend.forward(model, input_ids=ids[:, ::-1].copy()[:, :3], use_cache=True).cache
    found = backend.forward(model, input_ids=ids[:, 3:], past_key_values=stale).logits
    wanted = backend.forward(model, input_ids=ids).logits[:, 3:]
    assert fails(found, wanted, FLOAT32, attended=None)


# The comparison itself


def test_the_comparison_refuses_what_it_should():
    values = np.zeros((2, 3, 4))
    for broken in (np.nan, np.inf, 2e-5):
        changed = values.copy()
        changed[1, 2, 3] = broken
        assert fails(changed, values, FLOAT32, attended=None)
    assert fails(values[:1], values, FLOAT32, attended=None)
    assert not fails(values, values, FLOAT32, attended=None)


def test_the_comparison_leaves_out_masked_positions_and_nothing_else():
    values, mask = np.zeros((2, 3, 4)), np.array([[0, 1, 1], [1, 1, 1]])
    masked, attended = values.copy(), values.copy()
    masked[0, 0] = np.nan
    attended[0, 1] = 1
    assert not fails(masked, values, FLOAT32, attended=mask)
    assert fails(attended, values, FLOAT32, attended=mask)
    with pytest.raises(AssertionError, match="nothing to compare"):
        compare(values, values, FLOAT32, attended=np.zeros((2, 3)))
    with pytest.raises(AssertionError, match=r"at \(0, 1, 0\)"):
        compare(attended, values, FLOAT32, attended=mask)


@pytest.mark.parametrize("name", ["positions", "attention_bias", "softmax", "layer_norm"])
def test_a_broken_reference_is_noticed(name, monkeypatch, load, backends):
    """The reference is held to the goldens by the same comparison."""
    group = golden_group("pre_ln")
    weights = backends[0].parameters(load(backends[0], "pre_ln"))
    broken = {
        "positions": lambda mask: np.cumsum(np.ones_like(mask), axis=1) - 1,
        "attention_bias": lambda mask: np.zeros((1, 1, 1, 1)),
        "softmax": lambda x: np.exp(x - x.max(-1, keepdims=True)),
        "layer_norm": lambda x, weights: x,
    }
    monkeypatch.setattr(reference, name, broken[name])
    found = reference.forward(config_of("pre_ln"), weights, **inputs_of(group)).logits
    assert fails(found, group["logits"], FLOAT32, attended=group["attention_mask"])
