"""Write a directory of golden data like the one this script lies in, with Hugging Face `transformers` 4.57.6.

    pip install -r tests/oracle/requirements.txt        # in an environment of its own
    python tests/goldens/regenerate.py OUT [--variants pre_ln gelu] [--seed 7]
    OPT_GOLDENS=OUT python -m pytest tests

Builds each variant with weights of `tests/seeded.py`, lets the library's own classes save it in every format they have,
and stores what its PyTorch class (eager attention) computes. Nothing of this repository is imported but `seeded.py` and
the `*_goldens.py` beside this file, which import nothing of it, so that no mistake of ours can reach the data. With
another seed the values differ; the suite must pass all the same.
"""

import argparse
import contextlib
import gzip
import json
import os
import shutil
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # the TensorFlow classes of 4.57.6 know Keras 2 only
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the goldens are defined on the CPU
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import transformers
from beam_goldens import beam_cases
from contrast_goldens import contrast_cases
from processed_goldens import processed_settings, processor_values
from safetensors.torch import save_file
from seeded import seeded_weight
from transformers import OPTConfig, OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification

TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pre_ln": {**TINY, "num_hidden_layers": 3},
    "post_ln_proj": {
        **TINY,
        "hidden_size": 48,
        "word_embed_proj_dim": 24,
        "ffn_dim": 96,
        "do_layer_norm_before": False,
    },
    "gelu": {**TINY, "activation_function": "gelu"},
    "no_bias_no_affine": {**TINY, "enable_bias": False, "layer_norm_elementwise_affine": False},
    "remove_final_ln": {**TINY, "_remove_final_layer_norm": True},
    "untied": {**TINY, "tie_word_embeddings": False},
    "sharded": {**TINY, "num_hidden_layers": 3},
    "real_vocab": {**TINY, "vocab_size": 50272, "hidden_size": 16, "ffn_dim": 64},
    "shape_125m": {},
    "shape_350m": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
}
CONTRASTED = ("pre_ln", "post_ln_proj", "gelu", "untied")
"""Variants with contrastive search, DoLa and guidance."""

THOROUGH = ("pre_ln", "post_ln_proj")
"""Variants with every group of results; the others differ in one option and need less."""

SEEDED_ONLY = ("real_vocab", "shape_125m", "shape_350m")
"""Variants whose weight files are too large to keep: the tests write them from the seed in `seed.json`."""


def build(config: OPTConfig, seed: int) -> OPTForCausalLM:
    """A model with seeded weights. The library's initialiser is skipped: it fails on bare norms."""
    config._attn_implementation = "eager"
    with transformers.modeling_utils.no_init_weights():
        model = OPTForCausalLM(config)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name not in tied:
                parameter.copy_(torch.from_numpy(seeded_weight(seed, name, tuple(parameter.shape))))
    return model.eval()


# Weight files


def save_formats(model: OPTForCausalLM, variant: str, directory: Path) -> None:
    """Every format in which the library's classes can hold this variant."""
    shards = {"max_shard_size": "70KB"} if variant == "sharded" else {}
    model.save_pretrained(directory / "safetensors", **shards)
    model.save_pretrained(directory / "torch_bin", safe_serialization=False, **shards)
    config = model.config
    if config.enable_bias and config.layer_norm_elementwise_affine:
        with tempfile.TemporaryDirectory() as source:
            model.save_pretrained(source)  # in one file: the Flax class reads no sharded safetensors
            flax = transformers.FlaxOPTForCausalLM.from_pretrained(source, from_pt=True)
            flax.save_pretrained(directory / "flax_msgpack", **shards)
            if config.tie_word_embeddings:
                tf = transformers.TFOPTForCausalLM.from_pretrained(source, from_pt=True)
                tf.save_pretrained(directory / "tf_h5", **shards)
    if variant == "post_ln_proj":
        flax.save_pretrained(directory / "flax_safetensors", safe_serialization=True)
        tf.save_pretrained(directory / "tf_safetensors", safe_serialization=True)
        save_bare(model, directory)
    if variant == "pre_ln":
        flax.save_pretrained(directory / "flax_safetensors", safe_serialization=True)
        tf.save_pretrained(directory / "tf_safetensors", safe_serialization=True)
        save_half(model, flax, directory)
        save_old(model, directory)


def save_bare(model: OPTForCausalLM, directory: Path) -> None:
    """The decoder without its head, whose torch names have no `model.` in front."""
    model.model.save_pretrained(directory / "base_safetensors")
    model.model.save_pretrained(directory / "base_torch_bin", safe_serialization=False)
    source = directory / "base_safetensors"
    transformers.TFOPTModel.from_pretrained(source, from_pt=True).save_pretrained(directory / "base_tf_h5")
    transformers.FlaxOPTModel.from_pretrained(source, from_pt=True).save_pretrained(directory / "base_flax_msgpack")


def save_half(model: OPTForCausalLM, flax: Any, directory: Path) -> None:
    """The formats in half precision."""
    for suffix, dtype, cast in (("fp16", torch.float16, flax.to_fp16), ("bf16", torch.bfloat16, flax.to_bf16)):
        half = copy_of(model, dtype)
        half.save_pretrained(directory / f"safetensors_{suffix}")
        flax.save_pretrained(directory / f"flax_msgpack_{suffix}", params=cast(flax.params))
        if suffix == "fp16":
            half.save_pretrained(directory / "torch_bin_fp16", safe_serialization=False)


def save_old(model: OPTForCausalLM, directory: Path) -> None:
    """Torch files as they were written in 2022: other containers, no `model.` prefix, `torch_dtype` in the config."""
    state = copy_of(model, torch.float16).state_dict()
    del state["lm_head.weight"]
    bare = {name.removeprefix("model."): tensor.clone() for name, tensor in state.items()}
    config = {key: value for key, value in model.config.to_diff_dict().items() if key != "dtype"}
    config = {"model_type": "opt", **config, "torch_dtype": "float16", "prefix": "</s>"}
    for suffix, content, zipped in (
        ("unprefixed", bare, True),
        ("nonzip", bare, False),
        ("ordereddict", OrderedDict(bare), True),
    ):
        target = directory / f"torch_bin_old_{suffix}"
        target.mkdir(exist_ok=True)
        torch.save(content, target / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        write_json(target / "config.json", config)


def copy_of(model: OPTForCausalLM, dtype: torch.dtype) -> OPTForCausalLM:
    """The model in another dtype; `model` stays as it is."""
    copy = OPTForCausalLM.from_pretrained(
        None, config=model.config, state_dict=dict(model.state_dict()), dtype=dtype, attn_implementation="eager"
    )
    return copy.eval()


# Expected values


def input_groups(config: OPTConfig, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(input_ids, attention_mask) of every group. Ordinary ids start at 4, above OPT's four special ones."""

    def ids(rows: int, columns: int) -> np.ndarray:
        return rng.integers(4, config.vocab_size, (rows, columns))

    def masked(lengths: tuple[int, ...], side: str) -> tuple[np.ndarray, np.ndarray]:
        width = max(lengths)
        column = np.arange(width)[None]
        length = np.array(lengths)[:, None]
        mask = (column < length if side == "right" else column >= width - length).astype(np.int64)
        return np.where(mask == 1, ids(len(lengths), width), config.pad_token_id), mask

    midpad_ids, midpad_mask = ids(3, 11), np.ones((3, 11), np.int64)
    midpad_mask[0, 3:5] = midpad_mask[1, [2, 6]] = midpad_mask[2, [0, 10]] = 0
    midpad_ids[midpad_mask == 0] = config.pad_token_id
    midpad_ids[1, 6] = 77  # a masked position may hold an ordinary token
    padtok = ids(2, 9)
    padtok[0, [0, 4]] = padtok[1, 8] = config.pad_token_id
    groups = {
        "nopad": ids(2, 9),
        "rightpad": masked((10, 7, 4), "right"),
        "leftpad": masked((10, 6, 3), "left"),
        "midpad": (midpad_ids, midpad_mask),
        "padtok": padtok,
        "len1": ids(2, 1),
        "maxlen": ids(1, config.max_position_embeddings),
    }
    return {name: group if isinstance(group, tuple) else (group, np.ones_like(group)) for name, group in groups.items()}


def labels_of(ids: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels equal to the ids, with -100 at masked positions and at some others."""
    return np.where((mask == 1) & (rng.random(ids.shape) > 0.15), ids, -100)


@contextlib.contextmanager
def softmax_in_own_dtype() -> Iterator[None]:
    """Attention in 4.57.6 computes its softmax in float32 even in a float64 model; the float64 goldens must not."""
    softmax = torch.nn.functional.softmax
    torch.nn.functional.softmax = lambda scores, dim=-1, dtype=None: softmax(scores, dim=dim)
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax


def run(model: OPTForCausalLM, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """logits, loss, hidden_states.N and attentions.N of one batch."""
    tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if labels is not None:
        tensors["labels"] = torch.from_numpy(labels)
    with torch.no_grad():
        output = model(**tensors, output_hidden_states=True, output_attentions=True)
    found = {"logits": output.logits.numpy()}
    if labels is not None:
        found["loss"] = output.loss.numpy().reshape(1)
    found |= {f"hidden_states.{index}": state.numpy() for index, state in enumerate(output.hidden_states)}
    found |= {f"attentions.{index}": attention.numpy() for index, attention in enumerate(output.attentions)}
    return found


def gradients(model: OPTForCausalLM, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The gradient of the loss with respect to every parameter; a tied head's is the token table's."""
    model.zero_grad()
    model(
        input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), labels=torch.from_numpy(labels)
    ).loss.backward()
    found = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def expected_values(model: OPTForCausalLM, variant: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The contents of `expected.npz`."""
    thorough = variant in THOROUGH
    values: dict[str, np.ndarray] = {}
    groups = input_groups(model.config, rng)
    wanted = groups if thorough else {name: groups[name] for name in ("nopad", "leftpad", "padtok", "len1")}
    double = build(model.config, model.seed).double() if thorough else None
    for name, (ids, mask) in wanted.items():
        labels = labels_of(ids, mask, rng) if name != "len1" else None
        found = run(model, ids, mask, labels)
        details = name == "leftpad" or (thorough and name in ("nopad", "rightpad", "len1"))
        kept = {key: found[key] for key in found if details or key in ("logits", "loss")}
        if double is not None and name in ("nopad", "leftpad"):
            with softmax_in_own_dtype():
                kept["logits_float64"] = run(double, ids, mask, None)["logits"]
        kept |= {"input_ids": ids, "attention_mask": mask} | ({"labels": labels} if labels is not None else {})
        values |= {f"{name}/{key}": array for key, array in kept.items()}
        if name == "padtok" or (thorough and name == "leftpad"):
            values |= {f"grad_{name}/{key}": grad for key, grad in gradients(model, ids, mask, labels).items()}
    values |= other_inputs(model, *groups["nopad"], rng)
    return values


def other_inputs(model: OPTForCausalLM, ids: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Explicit positions, embeddings instead of ids, and the keys and values that a cache holds after `ids`."""
    positions = np.sort(rng.integers(0, model.config.max_position_embeddings, ids.shape), axis=1)
    embeddings = rng.normal(size=(*ids.shape, model.config.word_embed_proj_dim)).astype(np.float32)
    with torch.no_grad():
        moved = model(input_ids=torch.from_numpy(ids), position_ids=torch.from_numpy(positions))
        embedded = model(inputs_embeds=torch.from_numpy(embeddings), attention_mask=torch.from_numpy(mask))
        cache = model(input_ids=torch.from_numpy(ids), use_cache=True).past_key_values
    values = {
        "explicit_pos/input_ids": ids,
        "explicit_pos/position_ids": positions,
        "explicit_pos/logits": moved.logits.numpy(),
        "inputs_embeds/inputs_embeds": embeddings,
        "inputs_embeds/attention_mask": mask,
        "inputs_embeds/logits": embedded.logits.numpy(),
    }
    for index, layer in enumerate(cache.layers):
        values[f"kv_nopad_steps/key.{index}"] = layer.keys.numpy()
        values[f"kv_nopad_steps/value.{index}"] = layer.values.numpy()
    return values


def low_precision(model: OPTForCausalLM, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of a left-padded batch in float16 and bfloat16, and in float32 with weights rounded to them."""
    values = {"leftpad/input_ids": ids, "leftpad/attention_mask": mask}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        half = copy_of(model, dtype)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        with torch.no_grad():
            values[f"leftpad/{name}_logits"] = half(**inputs).logits.float().numpy()
            values[f"leftpad/{name}_weights_fp32_compute_logits"] = half.float()(**inputs).logits.numpy()
    return values


# Other heads


def with_head(model: OPTForCausalLM, head: type, **changes: Any) -> Any:
    """A model of another class with the same decoder and a seeded head; one label is the first of three."""
    values = {key: value for key, value in model.config.to_dict().items() if key not in ("id2label", "label2id")}
    config = OPTConfig.from_dict({**values, **changes})
    config._attn_implementation = "eager"
    new = head(config).eval()
    new.model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if not name.startswith("model."):
                rows = 3 if name == "score.weight" else parameter.shape[0]
                values = seeded_weight(model.seed, name, (rows, *parameter.shape[1:]))
                parameter.copy_(torch.from_numpy(values[: parameter.shape[0]]))
    return new


def targets(ids: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Labels of every problem type, and ends of answers of which some are out of range."""
    rows, length = ids.shape
    found = {
        "labels_single_label_classification": rng.integers(0, 3, rows),
        "labels_multi_label_classification": rng.integers(0, 2, (rows, 3)).astype(np.float32),
        "labels_regression": rng.normal(size=(rows, 3)).astype(np.float32),
        "labels_regression1": rng.normal(size=rows).astype(np.float32),
        "qa_start_positions": rng.integers(0, length, rows),
        "qa_end_positions": rng.integers(0, length, rows),
    }
    found["qa_start_positions"][-1] = length + 3
    found["qa_end_positions"][0] = -4
    return found


def head_values(model: OPTForCausalLM, variant: str, rng: np.random.Generator, directory: Path) -> None:
    """Write `heads_expected.npz`, `heads.safetensors` and a whole checkpoint of one of the heads."""
    three = with_head(model, OPTForSequenceClassification, num_labels=3)
    one = with_head(model, OPTForSequenceClassification, num_labels=1)
    answers = with_head(model, OPTForQuestionAnswering)
    heads = {**three.state_dict(), **answers.state_dict()}
    heads = {name: tensor.clone() for name, tensor in heads.items() if not name.startswith("model.")}
    save_file(heads, directory / "heads.safetensors")
    if variant == "pre_ln":
        answers.save_pretrained(directory / "qa_torch_bin", safe_serialization=False)
    else:
        three.save_pretrained(directory / "seqcls_safetensors")
    values: dict[str, np.ndarray] = {}
    groups = input_groups(model.config, rng)
    for name in ("nopad", "rightpad", "leftpad", "midpad", "padtok", "len1"):
        ids, mask = groups[name]
        found = head_results(three, one, answers, ids, mask, targets(ids, rng), gradients=name == "rightpad")
        values |= {f"{name}/{key}": array for key, array in found.items()}
    values |= pooling_values(three, groups, rng)
    np.savez_compressed(directory / "heads_expected.npz", **values)


def optimizer_values(model: OPTForCausalLM, rng: np.random.Generator, directory: Path) -> None:
    """Write `optim_expected.npz`: three steps of AdamW without dropout, on every parameter."""
    trained = build(OPTConfig(**{**model.config.to_dict(), "dropout": 0.0}), model.seed).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    groups = input_groups(trained.config, rng)
    values: dict[str, np.ndarray] = {}
    for step, name in enumerate(("rightpad", "leftpad", "padtok")):
        ids, mask = groups[name]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels_of(ids, mask, rng)}
        optimizer.zero_grad()
        loss = trained(**{key: torch.from_numpy(array) for key, array in batch.items()}).loss
        loss.backward()
        optimizer.step()
        batch["loss"] = loss.detach().numpy().reshape(1)
        values |= {f"step{step}/{key}": array for key, array in batch.items()}
    values |= {f"final/{key}": parameter.detach().numpy() for key, parameter in trained.named_parameters()}
    np.savez_compressed(directory / "optim_expected.npz", **values)


def head_results(
    three: Any,
    one: Any,
    answers: Any,
    ids: np.ndarray,
    mask: np.ndarray,
    wanted: dict[str, np.ndarray],
    gradients: bool,
) -> dict[str, np.ndarray]:
    """One group: the targets, and logits, losses and gradients."""
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    found = {"input_ids": ids, "attention_mask": mask, **wanted}
    with torch.no_grad():
        found["base_last_hidden_state"] = three.model(**inputs).last_hidden_state.numpy()
    for kind in ("single_label_classification", "multi_label_classification", "regression", "regression1"):
        model = one if kind == "regression1" else three
        model.config.problem_type = kind.removesuffix("1")  # else the library infers one, and keeps it
        output = model(**inputs, labels=torch.from_numpy(wanted[f"labels_{kind}"]))
        found[f"loss_{kind}"] = output.loss.detach().numpy().reshape(1)
        found["seqcls1_logits" if model is one else "seqcls_logits"] = output.logits.detach().numpy()
        if gradients and kind == "single_label_classification":
            output.loss.backward()
            found["grad_score.weight"] = three.score.weight.grad.numpy()
            found["grad_fc1_0.weight"] = three.model.decoder.layers[0].fc1.weight.grad.numpy()
    ends = {name: torch.from_numpy(wanted[f"qa_{name}"].copy()) for name in ("start_positions", "end_positions")}
    output = answers(**inputs, **ends)
    found["qa_loss"] = output.loss.detach().numpy().reshape(1)
    found["qa_start_logits"], found["qa_end_logits"] = (
        output.start_logits.detach().numpy(),
        output.end_logits.detach().numpy(),
    )
    if gradients:
        output.loss.backward()
        found |= {
            f"grad_qa_outputs.{leaf}": getattr(answers.qa_outputs, leaf).grad.numpy() for leaf in ("weight", "bias")
        }
    return found


def pooling_values(model: Any, groups: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A row of pad ids alone, embeddings instead of ids, and one row without a pad id."""
    ids = groups["leftpad"][0].copy()
    ids[0] = model.config.pad_token_id
    mask = np.ones_like(ids)
    embeddings = rng.normal(size=(*ids.shape, model.config.word_embed_proj_dim)).astype(np.float32)
    lone = groups["nopad"][0][:1]
    with torch.no_grad():
        logits = [
            model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy(),
            model(inputs_embeds=torch.from_numpy(embeddings)).logits.numpy(),
        ]
        model.config.pad_token_id = None
        logits.append(model(input_ids=torch.from_numpy(lone)).logits.numpy())
    return {
        "allpad_row/input_ids": ids,
        "allpad_row/attention_mask": mask,
        "allpad_row/seqcls_logits": logits[0],
        "embeds/inputs_embeds": embeddings,
        "embeds/seqcls_logits": logits[1],
        "nopadid/input_ids": lone,
        "nopadid/seqcls_logits": logits[2],
    }


# Greedy text

MARGIN = 2e-3
"""Least distance between the best two scores of any step: below it, rounding alone could change the text."""


def generation_cases(model: OPTForCausalLM, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The contents of `generation.json`: greedy continuations, each with a margin that rounding cannot cross."""
    free = {"max_new_tokens": 18}
    cases = [
        case_of(model, rng, "greedy", (7, 7), free),
        case_of(model, rng, "greedy_left_pad", (7, 4, 2), free),
        case_of(model, rng, "greedy_single", (7,), {"max_length": 16}),
        case_of(model, rng, "greedy_no_cache", (7, 5, 3), {"max_new_tokens": 8, "use_cache": False}),
    ]
    # Ids that these prompts do produce, at different steps, so that rows end at different times.
    outputs = cases[0]["output_ids"]
    ends = [outputs[0][-14], outputs[1][-9], 2]
    prompts = np.array(cases[0]["input_ids"]), np.array(cases[0]["attention_mask"])
    cases.append(generate(model, "greedy_multi_eos", *prompts, {**free, "eos_token_id": ends})[0])
    cases.append(generate(model, "greedy_single_eos_int", *prompts, {**free, "eos_token_id": ends[0]})[0])
    return cases


def case_of(model: OPTForCausalLM, rng: np.random.Generator, name: str, lengths: tuple[int, ...], kwargs: Any) -> Any:
    """A case with random prompts of these lengths, drawn until the margin is wide enough."""
    width = max(lengths)
    mask = (np.arange(width)[None] >= width - np.array(lengths)[:, None]).astype(np.int64)
    for _ in range(200):
        ids = np.where(mask == 1, rng.integers(4, model.config.vocab_size, mask.shape), model.config.pad_token_id)
        case, margin = generate(model, name, ids, mask, kwargs)
        if margin >= MARGIN:
            return case
    raise SystemExit(f"{name}: no prompt with a margin of {MARGIN} in 200 draws. Try another --seed.")


def generate(model: OPTForCausalLM, name: str, ids: np.ndarray, mask: np.ndarray, kwargs: Any) -> tuple[Any, float]:
    """One case and its least margin."""
    output = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    best = torch.stack(output.scores).topk(2, dim=-1).values
    case = {
        "name": name,
        "kwargs": kwargs,
        "input_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
        "output_ids": output.sequences.tolist(),
    }
    return case, float((best[..., 0] - best[..., 1]).min())


def embedded_generation(model: OPTForCausalLM, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Greedy continuation of embeddings; the output has new tokens only."""
    embeddings = rng.normal(size=(2, 6, model.config.word_embed_proj_dim)).astype(np.float32)
    output = model.generate(inputs_embeds=torch.from_numpy(embeddings), max_new_tokens=10, do_sample=False)
    return {"embeds/inputs_embeds": embeddings, "embeds/output_ids": output.numpy()}


# Directories


def write_variant(variant: str, seed: int, directory: Path) -> None:
    """One variant's directory."""
    rng = np.random.default_rng([seed, list(VARIANTS).index(variant)])
    config = OPTConfig(**VARIANTS[variant])
    model = build(config, seed)
    model.seed = seed
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {**config.to_dict(), "architectures": ["OPTForCausalLM"], "dtype": "float32"})
    if variant in SEEDED_ONLY:
        write_json(directory / "seed.json", {"seed": seed})
        write_seeded_only(model, variant, rng, directory)
        return
    save_formats(model, variant, directory)
    values = expected_values(model, variant, rng)
    if variant == "sharded":
        values = {key: value for key, value in values.items() if key.startswith(("nopad/", "leftpad/"))}
    elif variant not in THOROUGH:
        values = {key: value for key, value in values.items() if not key.startswith(("kv_", "inputs_embeds"))}
    np.savez_compressed(directory / "expected.npz", **values)
    cases = {"transformers": transformers.__version__, "cases": generation_cases(model, rng)}
    (directory / "generation.json").write_text(json.dumps(cases) + "\n")
    if variant in THOROUGH:
        tokens = [row[len(cases["cases"][0]["input_ids"][0]) :] for row in cases["cases"][0]["output_ids"]]
        texts = [case_of(model, rng, *settings) for settings in processed_settings(tokens)]
        (directory / "generation_processed.json").write_text(json.dumps({**cases, "cases": texts}) + "\n")
    beam_rng = np.random.default_rng([seed, 2 * len(VARIANTS), list(VARIANTS).index(variant)])
    beams = {**cases, "cases": beam_cases(model, beam_rng, thorough=variant in THOROUGH)}
    (directory / "generation_beams.json").write_text(json.dumps(beams) + "\n")
    if variant in CONTRASTED:
        contrast_rng = np.random.default_rng([seed, 2 * len(VARIANTS) + 1, list(VARIANTS).index(variant)])
        for file, texts in contrast_cases(model, contrast_rng):
            (directory / file).write_text(json.dumps({**cases, "cases": texts}) + "\n")
    if variant in THOROUGH:
        head_values(
            model, variant, np.random.default_rng([seed, len(VARIANTS), list(VARIANTS).index(variant)]), directory
        )
        optimizer_values(
            model, np.random.default_rng([seed, len(VARIANTS) + 1, list(VARIANTS).index(variant)]), directory
        )
    if variant == "pre_ln":
        batch = values["leftpad/input_ids"], values["leftpad/attention_mask"]
        np.savez_compressed(directory / "lowprec_expected.npz", **low_precision(model, *batch))
        np.savez_compressed(directory / "generation_expected.npz", **embedded_generation(model, rng))


def write_seeded_only(model: OPTForCausalLM, variant: str, rng: np.random.Generator, directory: Path) -> None:
    """Logits of one short row: all positions of the small model, the last one at the released shapes."""
    ids = rng.integers(4, model.config.vocab_size, (1, 6 if variant == "real_vocab" else 8))
    logits = run(model, ids, np.ones_like(ids), None)["logits"]
    values = {"nopad/input_ids": ids, "nopad/attention_mask": np.ones_like(ids)}
    if variant == "real_vocab":
        values["nopad/logits"] = logits
        cases = [case_of(model, rng, "greedy_left_pad", (6, 4), {"max_new_tokens": 12})]
        payload = {"transformers": transformers.__version__, "cases": cases}
        (directory / "generation.json").write_text(json.dumps(payload) + "\n")
    else:
        values["nopad/last_logits"] = logits[:, -1]
    np.savez_compressed(directory / "expected.npz", **values)


def write_tokenizer(source: Path, vocabulary: Path, target: Path) -> None:
    """Encode and decode the texts of `source` again; its two other files, of batches and of raw ids, are copied."""
    slow = transformers.GPT2Tokenizer.from_pretrained(vocabulary, **TOKENIZER)
    fast = transformers.GPT2TokenizerFast.from_pretrained(vocabulary, **TOKENIZER)
    shutil.copytree(source, target, dirs_exist_ok=True)
    name = "tokenizer_goldens.jsonl.gz"
    with (
        gzip.open(source / name, "rt", encoding="utf-8") as old,
        gzip.open(target / name, "wt", encoding="utf-8") as new,
    ):
        for line in old:
            new.write(json.dumps(tokenizer_record(slow, fast, json.loads(line)["text"])) + "\n")


TOKENIZER = {
    "add_bos_token": True,
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
    "errors": "replace",
}


def tokenizer_record(slow: Any, fast: Any, text: str) -> dict[str, Any]:
    """What both tokenizers make of a text, and of its ids again."""
    ids, fast_ids = slow(text)["input_ids"], fast(text)["input_ids"]
    return {
        "text": text,
        "ids_slow": ids,
        "ids_fast": fast_ids,
        "same": ids == fast_ids,
        "tokens_slow": slow.convert_ids_to_tokens(ids),
        "ids_slow_no_special": slow(text, add_special_tokens=False)["input_ids"],
        "ids_fast_no_special": fast(text, add_special_tokens=False)["input_ids"],
        "decode": slow.decode(ids),
        "decode_skip": slow.decode(ids, skip_special_tokens=True),
        "decode_fast": fast.decode(fast_ids),
        "decode_fast_skip": fast.decode(fast_ids, skip_special_tokens=True),
        "decode_skip_cleanup": slow.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True),
    }


def write_processors(source: Path, target: Path) -> None:
    """The library's processors, for the cases and scores that are there: they depend on no model and no seed."""
    text = (source / "processors_cases.json").read_text()
    with np.load(source / "processors_expected.npz") as given:
        values = processor_values(json.loads(text), dict(given))
    (target / "processors_cases.json").write_text(text)
    np.savez_compressed(target / "processors_expected.npz", **values)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; made if absent")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--seed", type=int, default=7, help="another seed gives other weights, inputs and results (7)")
    parser.add_argument(
        "--vocab", type=Path, help="directory with OPT's vocab.json and merges.txt: tokenizer goldens too"
    )
    arguments = parser.parse_args()
    if transformers.__version__ != "4.57.6":
        raise SystemExit(f"The goldens are those of transformers 4.57.6; this is {transformers.__version__}.")
    for variant in arguments.variants:
        write_variant(variant, arguments.seed, arguments.out / variant)
        print(f"wrote {arguments.out / variant}")  # one line a variant: the large ones take a minute
    write_processors(Path(__file__).parent, arguments.out)
    if arguments.vocab:
        write_tokenizer(Path(__file__).parent / "tokenizer", arguments.vocab, arguments.out / "tokenizer")


if __name__ == "__main__":
    main()
