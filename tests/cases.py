"""The golden cases as the tests see them: variants of the model, the formats each exists in, the groups of results."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opt_common.config import OPTConfig
from opt_common.params import Parameter, parameter_table
from tests.paths import GOLDENS
from tests.seeded import seeded_weight

SMALL_VARIANTS = ("pre_ln", "post_ln_proj", "gelu", "no_bias_no_affine", "remove_final_ln", "untied", "sharded")
"""Variants whose weight files are in the golden directory; what each is for is in its README."""

VARIANTS = (*SMALL_VARIANTS, "real_vocab")

THOROUGH = ("pre_ln", "post_ln_proj")
"""Variants with every group of results: one pre-norm, and one post-norm with projections like 350m."""

SHAPES = tuple(path.name for path in sorted(GOLDENS.glob("shape_*")))
"""Released shapes with seeded weights; goldens hold the logits of the last position."""

BATCHES = ("nopad", "rightpad", "leftpad", "midpad", "padtok", "len1", "maxlen")
"""Groups that are a batch of ids with a mask."""

_HEADS = ("seqcls", "qa")


def formats(variant: str) -> tuple[str, ...]:
    """Folders with a checkpoint of the language model or of its bare decoder, in float32."""
    return tuple(name for name in _folders(variant) if not name.endswith(("fp16", "bf16")) and "_old_" not in name)


def half_formats(variant: str) -> tuple[str, ...]:
    """Folders with a checkpoint in float16 or bfloat16."""
    return tuple(name for name in _folders(variant) if name.endswith(("fp16", "bf16")) or "_old_" in name)


def _folders(variant: str) -> tuple[str, ...]:
    folders = (path.parent.name for path in sorted((GOLDENS / variant).glob("*/config.json")))
    return tuple(name for name in folders if not name.startswith(_HEADS))


@functools.cache
def config_of(variant: str) -> OPTConfig:
    """A variant's configuration."""
    return OPTConfig.from_json_file(GOLDENS / variant / "config.json")


@functools.cache
def expected(variant: str, file: str = "expected.npz") -> Mapping[str, Mapping[str, np.ndarray]]:
    """The golden arrays of a variant: group -> field -> array. Read-only: several tests share them."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDENS / variant / file) as arrays:
        for key in arrays.files:
            group, _, field = key.partition("/")
            groups.setdefault(group, {})[field] = arrays[key]
            groups[group][field].setflags(write=False)
    return groups


def batches(variant: str) -> tuple[str, ...]:
    """The groups of a variant that are a batch of ids with a mask and have logits."""
    return tuple(group for group in BATCHES if "logits" in expected(variant).get(group, {}))


def numbered(group: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, ...]:
    """`name.0`, `name.1`, … of a group."""
    count = sum(field.startswith(f"{name}.") for field in group)
    return tuple(group[f"{name}.{index}"] for index in range(count))


def inputs_of(group: Mapping[str, np.ndarray], *, labels: bool = False) -> dict[str, np.ndarray]:
    """The arguments of a model call that a group was computed from."""
    names = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", *(("labels",) if labels else ()))
    return {name: group[name] for name in names if name in group}


@functools.cache
def generation_cases(variant: str) -> Mapping[str, Mapping[str, Any]]:
    """Greedy goldens by name. Other strategies' cases are left out: they come with those strategies."""
    greedy = {"max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "use_cache"}
    cases = json.loads((GOLDENS / variant / "generation.json").read_text(encoding="utf-8"))["cases"]
    return {case["name"]: case for case in cases if set(case["kwargs"]) <= greedy}


def seed_of(variant: str) -> int:
    """The seed of a variant without weight files."""
    return json.loads((GOLDENS / variant / "seed.json").read_text(encoding="utf-8"))["seed"]


def seeded_parameters(variant: str) -> dict[str, np.ndarray]:
    """All weights of a variant without weight files."""
    seed = seed_of(variant)
    return {parameter.name: seeded_parameter(seed, parameter) for parameter in parameter_table(config_of(variant))}


def seeded_parameter(seed: int, parameter: Parameter) -> np.ndarray:
    """The seeded values of one tensor."""
    return seeded_weight(seed, parameter.name, parameter.shape)


def has_seed(variant: str) -> bool:
    """Whether a variant's weights are made from a seed instead of read from a file."""
    return (GOLDENS / variant / "seed.json").exists()


def write_seeded(variant: str, directory: Path) -> Path:
    """Write a seeded variant as a safetensors checkpoint."""
    from conversion import save_checkpoint

    config, seed = config_of(variant), seed_of(variant)
    save_checkpoint(directory, config, parameter_table(config), lambda parameter: seeded_parameter(seed, parameter))
    return directory
