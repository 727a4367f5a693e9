"""What `transformers` does to scores: the part of `regenerate.py` that writes processors' cases and texts with them."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers.generation import logits_process as library

EVEN = (7, 7)
PADDED = (7, 5, 3)


def processed_settings(free: list[list[int]]) -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Name, lengths of the prompts and settings of each text, given new tokens that the model likes."""
    first, second, third = free[0][:3]
    ends = [free[0][3], free[1][3]]
    long = {"max_new_tokens": 18}
    for penalty in (1.2, 2.5, 0.7):
        yield f"repetition_penalty_{penalty}", EVEN, {**long, "repetition_penalty": penalty}
    for size in (1, 2, 3):
        yield f"no_repeat_ngram_{size}", EVEN, {**long, "no_repeat_ngram_size": size}
    yield "bad_words", PADDED, {**long, "bad_words_ids": [[first], [second, third]]}
    yield "min_new_tokens", PADDED, {**long, "min_new_tokens": 11, "eos_token_id": ends}
    yield "min_length", EVEN, {"max_length": 25, "min_length": 14, "eos_token_id": ends}
    yield "forced_bos_eos", (1, 1), {"max_length": 10, "forced_bos_token_id": 17, "forced_eos_token_id": 23}
    yield "suppress_tokens", PADDED, {**long, "suppress_tokens": sorted({first, second, third})}
    yield "begin_suppress_tokens", PADDED, {**long, "begin_suppress_tokens": [free[0][0], free[1][0]]}
    yield "exponential_decay", EVEN, {**long, "exponential_decay_length_penalty": [4, 1.6], "eos_token_id": 2}
    biases = [[[first], -6.0], [[second, third], -9.0], [[11], 3.0]]
    yield "sequence_bias", PADDED, {**long, "sequence_bias": biases}
    yield "renormalize", EVEN, {"max_new_tokens": 6, "renormalize_logits": True, "repetition_penalty": 1.4}
    some = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "bad_words_ids": [[first]]}
    yield "combo", EVEN, {**long, **some, "eos_token_id": ends}


def processor_values(cases: list[dict[str, Any]], given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The contents of `processors_expected.npz`, for the cases, ids and scores of the file that is there."""
    values = {name: array for name, array in given.items() if not name.startswith("out/") and name != "hamming/out"}
    ids = torch.from_numpy(given["input_ids"])
    for case in cases:
        name, params = case["name"], dict(case["params"])
        if name == "hamming":
            apart = library.HammingDiversityLogitsProcessor(
                params["diversity_penalty"], params["num_beams"], params["num_beam_groups"]
            )
            scores = torch.from_numpy(given["hamming/in"].copy())
            tokens = torch.from_numpy(given["hamming/current_tokens"])
            values["hamming/out"] = apart(ids[:4], scores, tokens, params["beam_group_idx"]).numpy()
            continue
        scores = torch.from_numpy(given["scores"].copy())
        for processor in chain(params):
            scores = processor(ids, scores)
        values[f"out/{name}"] = scores.numpy()
    return values


def chain(params: dict[str, Any]) -> Iterator[Callable[[Any, Any], Any]]:
    """The library's processors of one case, in the order of its settings."""
    keep = {"min_tokens_to_keep": params.get("min_tokens_to_keep", 1)}
    ends = torch.tensor(params["eos_token_id"]) if "eos_token_id" in params else None
    other = torch.tensor(params["encoder_input_ids"]) if "encoder_input_ids" in params else None
    makers: dict[str, Callable[[Any], Any]] = {
        "temperature": library.TemperatureLogitsWarper,
        "top_k": lambda value: library.TopKLogitsWarper(value, **keep),
        "top_p": lambda value: library.TopPLogitsWarper(value, **keep),
        "min_p": lambda value: library.MinPLogitsWarper(value, **keep),
        "typical_p": lambda value: library.TypicalLogitsWarper(value, **keep),
        "epsilon_cutoff": lambda value: library.EpsilonLogitsWarper(value, **keep),
        "eta_cutoff": lambda value: library.EtaLogitsWarper(value, **keep),
        "repetition_penalty": library.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": library.NoRepeatNGramLogitsProcessor,
        "encoder_repetition_penalty": lambda value: library.EncoderRepetitionPenaltyLogitsProcessor(value, other),
        "encoder_no_repeat_ngram_size": lambda value: library.EncoderNoRepeatNGramLogitsProcessor(value, other),
        "bad_words_ids": lambda value: library.NoBadWordsLogitsProcessor(value, ends),
        "sequence_bias": library.SequenceBiasLogitsProcessor,
        "min_length": lambda value: library.MinLengthLogitsProcessor(value, ends),
        "min_new_tokens": lambda value: library.MinNewTokensLengthLogitsProcessor(params["prompt_length"], value, ends),
        "forced_eos_token_id": lambda value: library.ForcedEOSTokenLogitsProcessor(params["max_length"], value),
        "suppress_tokens": library.SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda value: library.SuppressTokensAtBeginLogitsProcessor(
            value, params["begin_index"]
        ),
        "exponential_decay_length_penalty": lambda value: library.ExponentialDecayLengthPenalty(
            value, ends, params["prompt_length"]
        ),
    }
    for name, value in params.items():
        if name in makers:
            yield makers[name](value)
    if params.get("renormalize_logits") or params.get("order", "").endswith("log_softmax"):
        yield library.LogitNormalization()
