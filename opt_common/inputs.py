"""What the arguments of a model call must satisfy, stated once for the three backends.

An embedding lookup out of its table is an index error in PyTorch, a device assert on a GPU and a silently wrong row
under XLA; here it is one sentence, before anything is computed.
"""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from opt_common.config import POSITION_OFFSET, OPTConfig
from opt_common.errors import InputError, join_problems
from opt_common.params import Head
from opt_common.reference import IGNORED_LABEL

DROPPED_ARGUMENTS = {
    "return_dict": "results are always records; read .logits, .loss, … from them",
    "head_mask": "no head is ever masked; zero the head's rows of v_proj and of its bias instead",
    "cache_position": "the cache knows its length; leave the argument out",
    "token_type_ids": "OPT has no token types; leave the argument out",
    "params": "the model holds its parameters; use nnx.merge to call it with others",
    "train": "call model.train() or model.eval() first",
}
"""Arguments of Hugging Face's OPT classes that this package left out on purpose, and what to write instead."""


def reject_dropped(arguments: Mapping[str, Any]) -> None:
    """Explain each argument that a call does not take.

    One of Hugging Face's that is None asks for nothing, and `return_dict=True` for what is done anyway.

    Raises:
        InputError: for an argument that Hugging Face has and this package dropped, saying what to write instead.
        TypeError: for any other, as Python would.
    """
    if problems := [
        f"{name}= is not taken: {DROPPED_ARGUMENTS[name]}."
        for name, value in arguments.items()
        if name in DROPPED_ARGUMENTS and value is not None and not (name == "return_dict" and value is True)
    ]:
        raise InputError(join_problems(problems))
    for name in arguments.keys() - DROPPED_ARGUMENTS.keys():
        raise TypeError(f"the model got an unexpected keyword argument {name!r}")


def check_inputs(
    config: OPTConfig,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, npt.NDArray[Any]],
    past_length: int | None = 0,
    past_shape: tuple[int, ...] | None = None,
    head: Head | None = "lm",
    problem_type: str | None = None,
) -> None:
    """Check the arguments of one call.

    Args:
        config: the model's configuration.
        shapes: shape of each array given among input_ids, inputs_embeds, attention_mask, position_ids, labels,
            start_positions and end_positions.
        values: those whose values are known on the host; under a compiler there are none.
        past_length: number of tokens in the cache, or None when a compiler traces it.
        past_shape: shape (B, S, N, H) of the cache's buffers, or None without a cache.
        head: the head that the labels are for.
        problem_type: what `opt_common.config.problem_type_of` says of a sequence classifier's labels.

    Raises:
        InputError: naming everything that is wrong.
    """
    problems = _shape_problems(config, shapes, past_length, past_shape)
    if not problems:
        problems = _target_shape_problems(config, shapes, head, problem_type)
    # Wrong shapes make the values meaningless: tell of the shapes alone.
    if not problems:
        problems = _value_problems(config, shapes, values, past_length)
        problems += _target_value_problems(config, values, head, problem_type)
    if problems:
        raise InputError(join_problems(problems))


def _shape_problems(
    config: OPTConfig,
    shapes: Mapping[str, tuple[int, ...]],
    past_length: int | None,
    past_shape: tuple[int, ...] | None,
) -> list[str]:
    if ("input_ids" in shapes) == ("inputs_embeds" in shapes):
        given = "both" if "input_ids" in shapes else "neither"
        return [f"Expected either input_ids or inputs_embeds, got {given}."]
    if "input_ids" in shapes:
        if len(shapes["input_ids"]) != 2:
            return [f"input_ids has shape {shapes['input_ids']}, expected (batch, length)."]
    elif len(shapes["inputs_embeds"]) != 3 or shapes["inputs_embeds"][2] != config.word_embed_proj_dim:
        expected = f"(batch, length, {config.word_embed_proj_dim})"
        return [f"inputs_embeds has shape {shapes['inputs_embeds']}, expected {expected}."]
    batch, length = shapes.get("input_ids") or shapes["inputs_embeds"][:2]
    if not batch or not length:
        return [f"The input is empty (batch {batch}, length {length}). Give one token at least, such as </s>."]

    problems: list[str] = []
    if past_shape is not None and past_shape[0] != batch:
        problems.append(f"The cache has {past_shape[0]} rows, but the input has {batch}. Give each row its own.")
    if "position_ids" in shapes and shapes["position_ids"] != (batch, length):
        problems.append(
            f"position_ids has shape {shapes['position_ids']}, expected {(batch, length)} as the input has."
        )
    if "attention_mask" in shapes:
        past_capacity = past_shape[1] if past_shape is not None else 0
        widths = {past_capacity} if past_length is None else {past_length + length, past_capacity} - {0}
        if shapes["attention_mask"] not in {(batch, width) for width in widths}:
            wide = " or ".join(str((batch, width)) for width in sorted(widths))
            problems.append(
                f"attention_mask has shape {shapes['attention_mask']}, expected {wide}: past and new tokens."
            )
    return problems


def _value_problems(
    config: OPTConfig,
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, npt.NDArray[Any]],
    past_length: int | None,
) -> list[str]:
    problems: list[str] = []
    longest = None
    if "attention_mask" in values:
        mask = values["attention_mask"]
        if not ((mask == 0) | (mask == 1)).all():
            problems.append("attention_mask has values other than 0 and 1. Give 1 for a token and 0 for padding.")
        longest = int(mask.sum(1).max())
    elif past_length is not None and "attention_mask" not in shapes:
        longest = past_length + (shapes.get("input_ids") or shapes["inputs_embeds"])[1]
    limit = config.max_position_embeddings
    if "position_ids" in values:
        problems += _range_problem("position_ids", values["position_ids"], 1 - POSITION_OFFSET, limit - 1)
    elif longest is not None and longest > limit and "position_ids" not in shapes:
        problems.append(f"The input is {longest} tokens long, but this model has positions for {limit}. Shorten it.")
    if "input_ids" in values:
        problems += _range_problem("input_ids", values["input_ids"], 0, config.vocab_size - 1)
    return problems


def _target_shape_problems(
    config: OPTConfig, shapes: Mapping[str, tuple[int, ...]], head: Head | None, problem_type: str | None
) -> list[str]:
    """What a head cannot learn from, or not choose a position by."""
    batch, length = shapes.get("input_ids") or shapes["inputs_embeds"][:2]
    problems: list[str] = []
    if head == "lm" and shapes.get("labels", (batch, length)) != (batch, length):
        problems.append(f"labels has shape {shapes['labels']}, expected {(batch, length)} as the input has.")
    if head == "sequence_classification":
        if batch > 1 and config.pad_token_id is None and "input_ids" in shapes and "attention_mask" not in shapes:
            problems.append(
                f"There are {batch} rows, but without pad_token_id or attention_mask nobody can tell where each ends. "
                "Give attention_mask, or set pad_token_id in the configuration."
            )
        one_each = problem_type == "single_label_classification" or (
            problem_type == "regression" and config.num_labels == 1
        )
        expected = {(batch,), (batch, 1)} if one_each else {(batch, config.num_labels)}
        if "labels" in shapes and shapes["labels"] not in expected:
            problems.append(
                f"labels has shape {shapes['labels']}, expected {' or '.join(map(str, sorted(expected)))} for "
                f"{problem_type} with {config.num_labels} labels."
            )
    ends = [name for name in ("start_positions", "end_positions") if name in shapes]
    if len(ends) == 1:
        problems.append(f"Got {ends[0]} alone, expected both start_positions and end_positions, or neither.")
    problems += [
        f"{name} has shape {shapes[name]}, expected {(batch,)}: one for each row."
        for name in ends
        if shapes[name] not in {(batch,), (batch, 1)}
    ]
    return problems


def _target_value_problems(
    config: OPTConfig, values: Mapping[str, npt.NDArray[Any]], head: Head | None, problem_type: str | None
) -> list[str]:
    problems = [
        f"{name} has dtype {values[name].dtype}, expected integers."
        for name in ("start_positions", "end_positions")
        if name in values and values[name].dtype.kind not in "iu"
    ]
    classes = {"lm": config.vocab_size, "sequence_classification": config.num_labels}.get(head or "")
    if "labels" in values and classes is not None and (head == "lm" or problem_type == "single_label_classification"):
        labels = values["labels"]
        problems += _range_problem("labels", labels[labels != IGNORED_LABEL], 0, classes - 1)
    return problems


def _range_problem(name: str, values: npt.NDArray[Any], low: int, high: int) -> list[str]:
    if values.dtype.kind not in "iu":
        return [f"{name} has dtype {values.dtype}, expected integers."]
    outside = values[(values < low) | (values > high)]
    if not outside.size:
        return []
    return [f"{name} has the value {int(outside.flat[0])}, expected values from {low} to {high}."]
