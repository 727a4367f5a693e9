"""Beam search as `transformers` does it: the part of `regenerate.py` that writes `generation_beams.json`.

Version 4.57.6 runs beam search itself. Of groups and constraints it has what ranks the beams (`BeamSearchScorer`,
`ConstrainedBeamSearchScorer`, `HammingDiversityLogitsProcessor`) but no loop any more: that is here, without a cache.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import OPTForCausalLM
from transformers.generation.beam_constraints import DisjunctiveConstraint, PhrasalConstraint
from transformers.generation.beam_search import BeamSearchScorer, ConstrainedBeamSearchScorer
from transformers.generation.logits_process import HammingDiversityLogitsProcessor

PADDED = (7, 5, 3)
EVEN = (7, 7)


def beam_cases(model: OPTForCausalLM, rng: np.random.Generator, *, thorough: bool) -> list[dict[str, Any]]:
    """The contents of `generation_beams.json`: texts that rounding does not change."""
    # Not in float64, where the library makes padding NaN.
    variants = [model, *(noisy(model, rng) for _ in range(3))]
    return [stable_case(variants, rng, *case) for case in wanted(model, rng, thorough=thorough)]


def wanted(
    model: OPTForCausalLM, rng: np.random.Generator, *, thorough: bool
) -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Name, lengths of the prompts and settings of each case."""
    # Enough ids that beams end at all lengths.
    ends = sorted(map(int, rng.choice(np.arange(4, model.config.vocab_size), 30, replace=False)))
    phrases = [list(map(int, rng.integers(4, model.config.vocab_size, size))) for size in (2, 1, 3, 2)]
    bag = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": ends}
    yield "beam3_ends", PADDED, {**bag, "length_penalty": 0.6, "early_stopping": True}
    yield "beam3", EVEN, {"max_new_tokens": 10, "num_beams": 3}
    padded = {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.6}
    yield "beam4_left_pad", PADDED, {**padded, "early_stopping": True}
    if not thorough:
        return
    for penalty, stopping in ((0.6, False), (1.0, False), (2.0, True), (0.6, "never"), (-0.5, False), (0.0, "never")):
        name = f"beam3_ends_{penalty}_{stopping}"
        yield name, PADDED, {**bag, "length_penalty": penalty, "early_stopping": stopping}
    processed = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "eos_token_id": ends}
    yield "beam3_processed", EVEN, {"max_new_tokens": 12, "num_beams": 3, **processed}
    yield "beam3_min_new", EVEN, {"max_new_tokens": 12, "num_beams": 3, "min_new_tokens": 6, "eos_token_id": ends}
    groups = {"max_new_tokens": 9, "num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0}
    yield "group_beam_6x3_div1.0", EVEN, {**groups, "num_return_sequences": 6}
    yield "group_beam_6x3_div1.0_leftpad", PADDED, {**groups, "num_return_sequences": 3, "length_penalty": 0.6}
    yield "group_beam_4x4_ends", EVEN, {**groups, "num_beams": 4, "num_beam_groups": 4, "eos_token_id": ends}
    forced = {"max_new_tokens": 10, "num_beams": 4}
    yield "forced_phrase", EVEN, {**forced, "force_words_ids": [phrases[0]]}
    yield "forced_choice_left_pad", PADDED, {**forced, "force_words_ids": [[phrases[1], phrases[2]]]}
    both = [phrases[3], [phrases[1], phrases[2]]]
    yield "forced_both_ends", EVEN, {**forced, "num_beams": 6, "force_words_ids": both, "eos_token_id": ends[:4]}


def noisy(model: OPTForCausalLM, rng: np.random.Generator) -> OPTForCausalLM:
    """The model with weights a little off."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1 + 2e-5 * torch.from_numpy(rng.normal(size=parameter.shape).astype(np.float32)))
    return copied


def stable_case(
    variants: list[OPTForCausalLM], rng: np.random.Generator, name: str, lengths: tuple[int, ...], kwargs: Any
) -> dict[str, Any]:
    """A case with random prompts that every variant of the model continues alike."""
    width, config = max(lengths), variants[0].config
    mask = (np.arange(width)[None] >= width - np.array(lengths)[:, None]).astype(np.int64)
    for _ in range(200):
        ids = np.where(mask == 1, rng.integers(4, config.vocab_size, mask.shape), config.pad_token_id)
        found = [search(model, torch.from_numpy(ids), torch.from_numpy(mask), **kwargs) for model in variants]
        if all(found[0][0] == other[0] for other in found):
            sequences, scores = found[0]
            case = {"name": name, "kwargs": kwargs, "input_ids": ids.tolist(), "attention_mask": mask.tolist()}
            return {**case, "output_ids": sequences, "sequences_scores": scores}
    raise SystemExit(f"{name}: no prompt that all variants of the model continue alike. Try another --seed.")


@torch.no_grad()
def search(model: OPTForCausalLM, ids: Any, mask: Any, **kwargs: Any) -> tuple[list[list[int]], list[float]]:
    """Texts and their scores."""
    if "num_beam_groups" in kwargs or "force_words_ids" in kwargs:
        output = scored_search(model, ids, mask, **kwargs)
        return output["sequences"].tolist(), output["sequence_scores"].tolist()
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, output_scores=True, return_dict_in_generate=True, **kwargs
    )
    return output.sequences.tolist(), output.sequences_scores.tolist()


def scored_search(
    model: OPTForCausalLM,
    ids: Any,
    mask: Any,
    *,
    max_new_tokens: int,
    num_beams: int,
    num_beam_groups: int = 1,
    num_return_sequences: int = 1,
    diversity_penalty: float = 0.0,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    force_words_ids: list[Any] | None = None,
    eos_token_id: Any = None,
) -> Any:
    """The loop of 4.55, around what 4.57.6 still has of it."""
    batch, start = ids.shape
    limit = {"pad_token_id": model.config.pad_token_id, "decoder_prompt_len": start}
    limit["eos_token_id"] = torch.tensor(eos_token_id or [model.config.eos_token_id])
    rules = {"length_penalty": length_penalty, "do_early_stopping": early_stopping}
    rules |= {"num_beam_hyps_to_keep": num_return_sequences, "max_length": start + max_new_tokens}
    if force_words_ids:
        constraints = [
            DisjunctiveConstraint(words) if isinstance(words[0], list) else PhrasalConstraint(words)
            for words in force_words_ids
        ]
        scorer = ConstrainedBeamSearchScorer(batch, num_beams, constraints, ids.device, **rules)
    else:
        scorer = BeamSearchScorer(batch, num_beams, ids.device, num_beam_groups=num_beam_groups, **rules)
        apart = HammingDiversityLogitsProcessor(diversity_penalty, num_beams, num_beam_groups)
    size = num_beams // num_beam_groups
    ids, mask = ids.repeat_interleave(num_beams, 0), mask.repeat_interleave(num_beams, 0)
    totals = torch.full((batch, num_beams), -1e9, dtype=model.dtype)
    totals[:, ::size] = 0
    totals = totals.view(-1)
    while True:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        logprobs = torch.log_softmax(logits, dim=-1)
        current = torch.zeros(batch * num_beams, dtype=torch.long)
        moved = ids.clone()
        for group in range(num_beam_groups):
            rows = torch.arange(batch * num_beams).view(batch, num_beam_groups, size)[:, group].reshape(-1)
            scores = logprobs[rows]
            if num_beam_groups > 1:
                scores = apart(ids[rows], scores, current_tokens=current, beam_group_idx=group)
            scores = scores + totals[rows, None]
            count = max(2, 1 + len(limit["eos_token_id"])) * size
            best, places = scores.view(batch, -1).topk(count, dim=1)
            vocabulary = logits.shape[1]
            more = {"scores_for_all_vocab": scores} if force_words_ids else {"group_index": group}
            found = scorer.process(ids[rows], best, places % vocabulary, places // vocabulary, **more, **limit)
            totals[rows] = found["next_beam_scores"].to(totals)
            current[rows] = found["next_beam_tokens"]
            moved[rows] = ids[rows][found["next_beam_indices"]]
        ids = torch.cat([moved, current[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if scorer.is_done or ids.shape[1] == start + max_new_tokens:
            return scorer.finalize(ids, totals, current, None, max_length=start + max_new_tokens, **limit)
