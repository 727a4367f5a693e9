"""DoLa: Hugging Face's texts, the rule's own texts, rows, layers, and the same in three frameworks."""

import importlib
import itertools
import json

import numpy as np
import pytest

from opt_common import dola
from opt_common.config import OPTConfig
from opt_common.errors import GenerationError
from opt_common.generation_config import GenerationConfig
from tests import plain_loops
from tests.cases import SMALL_VARIANTS, config_of
from tests.paths import GOLDENS
from tests.test_generate_bounds import MASK, PROMPTS, TINY
from tests.tolerances import FLOAT32, FLOAT64, compare

COMPILED = {("pre_ln", "dola_all"), ("gelu", "dola_low"), ("untied", "dola_first_leftpad")}
"""Cases for those who compile; each is another program."""

DEEP = TINY.replace(num_hidden_layers=5, word_embed_proj_dim=8, do_layer_norm_before=False)
"""Post-norm with projections, as 350m has them, which the goldens can't have."""


@pytest.fixture(scope="module")
def deep(backends):
    """One model with the same weights in each framework."""
    models = {backend.name: backend.build(DEEP) for backend in backends}
    weights = backends[0].parameters(models[backends[0].name])
    for backend in backends:
        for parameter in backend.table(models[backend.name]):
            backend.set(models[backend.name], parameter, weights[parameter.name])
    return models, weights


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_dola_goldens(backend, load, variant):
    if not (file := GOLDENS / variant / "generation_dola.json").exists():
        pytest.skip("there, transformers has no DoLa")
    for case in json.loads(file.read_text(encoding="utf-8"))["cases"]:
        if backend.compiles and (variant, case["name"]) not in COMPILED:
            continue
        ids, mask, golden = (np.array(case[key]) for key in ("input_ids", "attention_mask", "output_ids"))
        found = backend.generate(load(backend, variant), ids, mask, **case["kwargs"])
        np.testing.assert_array_equal(found, golden, err_msg=case["name"])


SETTINGS = {"dola_layers": [0, 2, 4], "repetition_penalty": 1.3, "max_new_tokens": 6, "eos_token_id": []}
ASKED = {"output_scores": True, "output_logits": True}


def text_of(backend, model, ids, mask=None, **changes):
    """Continue by the one program that all tests run."""
    return backend.generate_output(model, ids, mask, **(SETTINGS | changes), **ASKED).sequences


def test_texts_and_records_are_those_of_the_rule(backend, deep):
    """Each row is what a loop over the NumPy reference gives for it alone; scores are the contrasted ones."""
    models, weights = deep
    found = backend.generate_output(models[backend.name], PROMPTS, MASK, **SETTINGS, **ASKED)
    assert int(found.past_key_values.length) == 10
    for row, (prompt, mask) in enumerate(zip(PROMPTS, MASK, strict=True)):
        text = prompt[mask == 1].tolist()
        loop = plain_loops.dola(DEEP, weights, text, GenerationConfig(**SETTINGS))
        read = plain_loops.reader(DEEP, weights)
        for step, (token, scores) in enumerate(itertools.islice(loop, 6)):
            assert found.sequences[row, 5 + step] == token
            possible = scores > -np.inf
            np.testing.assert_array_equal(found.scores[step][row] > -np.inf, possible)
            compare(found.scores[step][row][possible], scores[possible], FLOAT32)
            compare(found.logits[step][row], read(text).logits[0, -1], FLOAT32)
            logprob = scores[token] - np.log(np.exp(scores[possible]).sum())
            compare(found.token_logprobs[row, step], logprob, FLOAT32)
            text.append(token)


def test_rows_sides_and_other_values(backend, deep):
    """A row of a batch is the row alone, padding on either side (transformers#17514); the programs are there."""
    model = deep[0][backend.name]
    batch = text_of(backend, model, PROMPTS, MASK)
    before = backend.compilations()
    right = np.stack([np.roll(row, -int((mask == 0).sum())) for row, mask in zip(PROMPTS, MASK, strict=True)])
    found = text_of(backend, model, right, MASK[:, ::-1].copy())
    np.testing.assert_array_equal(found[:, 5:], batch[:, 5:])
    for row in range(3):
        # Alone as three copies, so that one program serves all rows.
        alone = text_of(backend, model, PROMPTS[[row] * 3], MASK[[row] * 3])
        np.testing.assert_array_equal(alone, batch[[row] * 3])
    text_of(backend, model, PROMPTS[:, 1:], MASK[:, 1:], repetition_penalty=1.7)
    assert backend.compilations() == before
    if not backend.compiles:
        for row in range(3):
            prompt = PROMPTS[row : row + 1, MASK[row] == 1]
            alone = backend.generate(model, prompt, **SETTINGS)
            np.testing.assert_array_equal(alone[0, prompt.shape[1] :], batch[row, 5:])
        np.testing.assert_array_equal(backend.generate(model, PROMPTS, MASK, use_cache=False, **SETTINGS), batch)
        embeds = backend.tensor(deep[1]["model.decoder.embed_tokens.weight"][PROMPTS])
        found = backend.generate(model, PROMPTS, MASK, inputs_embeds=embeds, **SETTINGS)
        np.testing.assert_array_equal(found, batch)
        past = backend.forward(model, input_ids=PROMPTS[:, :3], attention_mask=MASK[:, :3], use_cache=True)
        found = backend.generate(model, PROMPTS, MASK, past_key_values=past.cache, **SETTINGS)
        np.testing.assert_array_equal(found, batch)


def predictions(dtype):
    """Logits of the last layer and of three earlier ones: ordinary, peaked, all the same, and one without numbers."""
    rng = np.random.default_rng(3)
    final, early = rng.normal(size=(5, 40)) * 3, rng.normal(size=(5, 3, 40)) * 3
    final[1, 7], early[1, 1, 7] = 300, -300
    final[2], early[2] = 0, 0
    early[3] = final[3]  # no layer is further than another
    final[4, 0] = np.nan
    return final.astype(dtype), early.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_contrasts_are_those_of_the_definition(backend, dtype):
    module = importlib.import_module(f"{backend.package.__name__}.dola")
    arrays = predictions(dtype)
    wanted = dola.contrasted(*arrays)
    with backend.precision(dtype):
        found = backend.array(module.contrasted(*map(backend.tensor, arrays)))
    possible = wanted[:4] > -np.inf
    np.testing.assert_array_equal(found[:4] > -np.inf, possible)
    assert possible.any(1).all()
    tolerance = FLOAT32 if dtype == "float32" else FLOAT64
    compare(found[:4][possible], wanted[:4][possible], tolerance)
    assert not (found[4].max() > -np.inf), "no token can be taken by scores that are not numbers"


def nearest_layer(final, early):
    nearest = np.abs(early - final[:, None]).sum(-1).argmin(1)
    return dola.contrasted(final, early[np.arange(len(final)), nearest][:, None])


def no_contrast(final, early):
    return np.where(dola.contrasted(final, early) > -np.inf, final, -np.inf)


def nothing_ruled_out(final, early):
    return final - early[:, 0]


def next_layer(final, early):
    return dola.contrasted(final, np.roll(early, 1, axis=1)[:, :1])


@pytest.mark.parametrize("mutation", [nearest_layer, no_contrast, nothing_ruled_out, next_layer])
def test_a_wrong_rule_is_noticed(backends, load, mutation, monkeypatch):
    """By the goldens, in PyTorch, whose function takes NumPy's place for it; as it is, the rule passes there."""
    (backend,) = (backend for backend in backends if not backend.compiles)
    module = importlib.import_module(f"{backend.package.__name__}.selection")
    case = json.loads((GOLDENS / "pre_ln" / "generation_dola.json").read_text(encoding="utf-8"))["cases"][1]
    assert case["name"] == "dola_all"

    def text(rule):
        monkeypatch.setattr(
            module, "contrasted", lambda *tensors: backend.tensor(rule(*map(backend.array, tensors)).astype("float32"))
        )
        arrays = np.array(case["input_ids"]), np.array(case["attention_mask"])
        return backend.generate(load(backend, "pre_ln"), *arrays, **case["kwargs"]).tolist()

    assert text(dola.contrasted) == case["output_ids"]
    assert text(mutation) != case["output_ids"]


@pytest.mark.parametrize(
    ("layers", "tied", "low", "high"),
    [
        (1, True, (0,), (0,)),
        (2, True, (1,), (1,)),
        (3, True, (1,), (1,)),
        (4, True, (2,), (2,)),
        (6, True, (2,), (3, 5)),
        (12, True, (2, 4), (6, 8, 10)),
        (40, True, (2, 4, 6, 8, 10, 12, 14, 16, 18), tuple(range(20, 40, 2))),
        (48, True, (2, 4, 6, 8, 10, 12, 14, 16, 18), tuple(range(28, 48, 2))),
        (1, False, (0,), (0,)),
        (3, False, (0,), (1,)),
        (12, False, (0, 2, 4), (6, 8, 10)),
    ],
)
def test_layers_by_name(layers, tied, low, high):
    config = OPTConfig(num_hidden_layers=layers, tie_word_embeddings=tied)
    assert dola.candidate_layers(config, "low") == low
    assert dola.candidate_layers(config, "high") == high


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dola_layers": [0, 5]}, "dola_layers has 5, expected numbers from 0 to 4: this model has 5 layers"),
        ({"dola_layers": [-1]}, 'dola_layers is .-1., expected "low", "high" or a list of numbers'),
        ({"dola_layers": []}, "dola_layers is "),
        ({"dola_layers": "middle"}, "dola_layers is 'middle'"),
        ({"dola_layers": 3}, "dola_layers is 3"),
        ({"dola_layers": [0.5]}, "dola_layers is"),
        ({"dola_layers": "low", "num_beams": 2}, "dola_layers would change nothing: the strategy is beam_search"),
        ({"dola_layers": "low", "penalty_alpha": 0.5}, "dola_layers would change nothing: the strategy is contrastive"),
        ({"dola_layers": "low", "temperature": 0.5}, "temperature would change nothing: the strategy is dola"),
        ({"dola_layers": "low", "num_return_sequences": 2}, "num_return_sequences would change nothing"),
    ],
)
def test_settings_that_cannot_be(backends, deep, settings, message):
    with pytest.raises(GenerationError, match=message):
        backends[0].generate(deep[0][backends[0].name], PROMPTS, MASK, max_new_tokens=2, **settings)


def test_settings_survive_their_file(tmp_path):
    for layers in ("high", (0, 2)):
        values = GenerationConfig(dola_layers=layers, eos_token_id=2).to_dict()
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        found = GenerationConfig.from_directory(tmp_path, config_of("pre_ln"))
        assert (found.strategy, found.dola_layers) == ("dola_generation", layers)
        assert found.updated(do_sample=True).strategy == "dola_sample"
        assert found.updated(num_beams=2).strategy == "beam_search"
