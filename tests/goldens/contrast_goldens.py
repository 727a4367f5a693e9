"""Contrastive search, DoLa and guidance: the part of `regenerate.py` that writes a file for each of them.

Version 4.57.6 of `transformers` has guidance, and fetches the other two from elsewhere: their loops are here, without a
cache. `--check` holds them against 4.55.4, the last version with its own, and this directory's files against either.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beam_goldens import EVEN, PADDED, noisy
from torch import Tensor
from transformers import OPTForCausalLM

FILES = ("generation_contrastive.json", "generation_dola.json", "generation_guidance.json")


def contrast_cases(model: OPTForCausalLM, rng: np.random.Generator) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The names and contents of these files, as far as the library can do it with a model."""
    variants = [model, *(noisy(model, rng) for _ in range(3))]
    for file, wanted in zip(FILES, (contrastive_settings, dola_settings, guidance_settings), strict=True):
        if cases := [stable_case(variants, rng, *case) for case in wanted(model)]:
            yield file, cases


def contrastive_settings(model: OPTForCausalLM) -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Name, lengths of the prompts and settings of each case."""
    del model
    yield "contrastive_a0.6_k4", (7,), {"max_new_tokens": 16, "penalty_alpha": 0.6, "top_k": 4}
    yield "contrastive_a0.6_k4_batch", EVEN, {"max_new_tokens": 14, "penalty_alpha": 0.6, "top_k": 4}
    yield "contrastive_a0.6_k4_leftpad", PADDED, {"max_new_tokens": 12, "penalty_alpha": 0.6, "top_k": 4}
    yield "contrastive_a0.3_k6", EVEN, {"max_new_tokens": 12, "penalty_alpha": 0.3, "top_k": 6}


def dola_settings(model: OPTForCausalLM) -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """The same. Of several layers the library chooses one for a whole batch: those cases have one row."""
    if model.config.word_embed_proj_dim != model.config.hidden_size:
        return  # the library multiplies hidden states with a head of another width
    new = {"max_new_tokens": 12, "repetition_penalty": 1.2}
    layers = list(range(model.config.num_hidden_layers))
    yield "dola_high", (7,), {**new, "dola_layers": "high"}
    yield "dola_all", (7,), {**new, "dola_layers": layers}
    yield "dola_first_leftpad", PADDED, {**new, "dola_layers": [0]}
    yield "dola_last_ends", EVEN, {**new, "dola_layers": layers[-1:], "eos_token_id": list(range(4, 60))}
    if model.config.num_hidden_layers != 3:  # there, the library's "low" is no layer at all
        yield "dola_low", EVEN, {**new, "dola_layers": "low"}


def guidance_settings(model: OPTForCausalLM) -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """The same; `negative` are lengths of the unconditional prompts."""
    del model
    new = {"max_new_tokens": 12}
    yield "guidance_1.5", EVEN, {**new, "guidance_scale": 1.5}
    yield "guidance_3_negative", EVEN, {**new, "guidance_scale": 3.0, "negative": (4, 4)}
    yield "guidance_2_leftpad_negative", PADDED, {**new, "guidance_scale": 2.0, "negative": (2, 9, 5)}
    yield "guidance_0.5_processed", EVEN, {**new, "guidance_scale": 0.5, "repetition_penalty": 1.3}
    yield "guidance_0_negative", EVEN, {**new, "guidance_scale": 0.0, "negative": (3, 3)}


def padded_prompts(config: Any, rng: np.random.Generator, lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and their mask, padded on the left."""
    width = max(lengths)
    mask = (np.arange(width)[None] >= width - np.array(lengths)[:, None]).astype(np.int64)
    return np.where(mask == 1, rng.integers(4, config.vocab_size, mask.shape), config.pad_token_id), mask


def stable_case(
    variants: list[OPTForCausalLM], rng: np.random.Generator, name: str, lengths: tuple[int, ...], kwargs: Any
) -> dict[str, Any]:
    """A case with random prompts that every variant of the model continues alike."""
    config, kwargs = variants[0].config, dict(kwargs)
    negative = kwargs.pop("negative", None)
    for _ in range(200):
        ids, mask = padded_prompts(config, rng, lengths)
        case = {"name": name, "kwargs": kwargs, "input_ids": ids.tolist(), "attention_mask": mask.tolist()}
        if negative:
            ids, mask = padded_prompts(config, rng, negative)
            case |= {"negative_prompt_ids": ids.tolist(), "negative_prompt_attention_mask": mask.tolist()}
        found = [continued(model, case) for model in variants]
        if all(text == found[0] for text in found):
            return {**case, "output_ids": found[0]}
    raise SystemExit(f"{name}: no prompt that all variants of the model continue alike. Try another --seed.")


@torch.no_grad()
def continued(model: OPTForCausalLM, case: dict[str, Any]) -> list[list[int]]:
    """The texts of a case."""
    kwargs, ids, mask = case["kwargs"], torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"])
    if "penalty_alpha" in kwargs:
        return appended(model, ids, mask, contrastive_tokens, **kwargs)
    if "dola_layers" in kwargs:
        return appended(model, ids, mask, dola_tokens, **kwargs)
    names = ("negative_prompt_ids", "negative_prompt_attention_mask")
    negative = {name: torch.tensor(case[name]) for name in names if name in case}
    return model.generate(ids, attention_mask=mask, do_sample=False, **negative, **kwargs).tolist()


def appended(model: OPTForCausalLM, ids: Tensor, mask: Tensor, rule: Any, **kwargs: Any) -> list[list[int]]:
    """Texts to which a rule appends token after token."""
    ends = torch.tensor(kwargs.pop("eos_token_id", model.config.eos_token_id)).reshape(-1)
    finished = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(kwargs.pop("max_new_tokens")):
        tokens = torch.where(finished, model.config.pad_token_id, rule(model, ids, mask, **kwargs))
        ids, mask = torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        finished |= torch.isin(tokens, ends)
        if finished.all():
            break
    return ids.tolist()


def contrastive_tokens(model: OPTForCausalLM, ids: Tensor, mask: Tensor, *, penalty_alpha: float, top_k: int) -> Tensor:
    """The next token of each text, by Su et al. 2022."""
    best = model(input_ids=ids, attention_mask=mask).logits[:, -1].softmax(-1).topk(top_k)
    values = []
    for place in range(top_k):
        longer = torch.cat([ids, best.indices[:, place : place + 1]], 1)
        attended = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        states = model(input_ids=longer, attention_mask=attended, output_hidden_states=True).hidden_states[-1]
        likeness = torch.cosine_similarity(states[:, :-1], states[:, -1:], dim=-1)
        penalty = likeness.masked_fill(mask == 0, -torch.inf).amax(1)
        values.append((1 - penalty_alpha) * best.values[:, place] - penalty_alpha * penalty)
    return best.indices.gather(1, torch.stack(values, 1).argmax(1, keepdim=True))[:, 0]


def dola_tokens(
    model: OPTForCausalLM, ids: Tensor, mask: Tensor, *, dola_layers: Any, repetition_penalty: float
) -> Tensor:
    """The next token of each text, by Chuang et al. 2024, as the library has it."""
    count = model.config.num_hidden_layers
    outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    final = outputs.logits[:, -1].log_softmax(-1)
    start = {1: 0, 2: 1}.get(count, 2) if model.config.tie_word_embeddings else 0
    if dola_layers == "low":
        dola_layers = [start] if start == count // 2 else range(start, count // 2, 2)
    elif dola_layers == "high":
        dola_layers = range(count // 2, count, 2)
    early = torch.stack([model.lm_head(outputs.hidden_states[layer][:, -1]) for layer in dola_layers]).log_softmax(-1)
    mean = (final.exp() + early.exp()) / 2
    divergence = (mean * (2 * mean.log() - final - early)).sum(-1).mean(1)
    scores = final - early[divergence.argmax()]
    scores[final < final.amax(-1, keepdim=True) + np.log(0.1)] = -torch.inf
    seen = torch.zeros_like(scores).scatter(1, ids, 1.0) > 0
    penalised = torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
    return torch.where(seen, penalised, scores).argmax(-1)


def check(directory: Path) -> None:
    """Hold every case against this module and, where the installed version has the strategy, against the library.

    `repetition_penalty` counts padding there, as in this module.
    """
    for file in sorted(path for name in FILES for path in directory.glob(f"*/{name}")):
        model = OPTForCausalLM.from_pretrained(file.parent / "safetensors", attn_implementation="eager").eval()
        for case in json.loads(file.read_text(encoding="utf-8"))["cases"]:
            assert continued(model, case) == case["output_ids"], (file, case["name"])
            ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"])
            if hasattr(model, "_dola_decoding"):
                names = ("negative_prompt_ids", "negative_prompt_attention_mask")
                negative = {name: torch.tensor(case[name]) for name in names if name in case}
                text = model.generate(ids, attention_mask=mask, do_sample=False, **negative, **case["kwargs"]).tolist()
                assert text == case["output_ids"], (file, case["name"], "the library")
            print(file.parent.name, case["name"], "holds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", required=True)
    parser.parse_args()
    check(Path(__file__).parent)
