"""Which decoding strategy some settings ask for, and which settings each strategy has a use for."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_common.generation_config import GenerationConfig

STRATEGIES = {
    "greedy_search": "the likeliest token is taken",
    "sample": "each token is drawn by its probability",
    "contrastive_search": "the likeliest tokens are tried, and one that repeats little of the text is taken",
    "assisted_generation": "the likeliest token is taken, and several are guessed ahead",
    "assisted_sample": "each token is drawn by its probability, and several are guessed ahead",
    "dola_generation": "the token whose likelihood grew most over the layers is taken",
    "dola_sample": "each token is drawn by how much its likelihood grew over the layers",
    "beam_search": "the likeliest text of several beams is taken",
    "beam_sample": "several beams are drawn by their probability",
    "group_beam_search": "groups of beams keep away from each other",
    "constrained_beam_search": "the likeliest text that contains what it must is taken",
}
"""Name of each strategy, as Hugging Face has it, and what it does."""

BEAM_STRATEGIES = frozenset(name for name in STRATEGIES if "beam" in name)
"""Strategies that keep several continuations of each prompt."""

DOLA_STRATEGIES = frozenset({"dola_generation", "dola_sample"})
"""Strategies that contrast layers; Hugging Face has one name for both."""

ASSISTED_STRATEGIES = frozenset({"assisted_generation", "assisted_sample"})
"""Strategies that check guesses; Hugging Face has one name for both."""

SAMPLING_STRATEGIES = frozenset({"sample", "assisted_sample", "dola_sample", "beam_sample"})
"""Strategies that draw."""

KEEPS_CACHE = ("greedy_search", "sample", *sorted(ASSISTED_STRATEGIES | DOLA_STRATEGIES))
"""Strategies whose last step has read the very rows that come back."""

TOKEN_BY_TOKEN = (*KEEPS_CACHE, "contrastive_search")
"""Strategies that append tokens and take none back, so that a text can be shown as it grows."""


UNGUIDED = ASSISTED_STRATEGIES | DOLA_STRATEGIES | {"contrastive_search"}
"""Strategies that compare predictions of their own, and have no place for those of another prompt."""


def strategy_of(settings: "GenerationConfig") -> str:
    """The one strategy that some settings ask for, by the precedence of Hugging Face's `get_generation_mode`."""
    if settings.constraints or settings.force_words_ids:
        return "constrained_beam_search"
    if settings.num_beams == 1:
        return _without_beams(settings)
    if settings.num_beam_groups > 1:
        return "group_beam_search"
    return "beam_sample" if settings.do_sample else "beam_search"


def _without_beams(settings: "GenerationConfig") -> str:
    if settings.penalty_alpha and not settings.do_sample:
        return "contrastive_search"
    if settings.assistant_model is not None or settings.prompt_lookup_num_tokens:
        return "assisted_sample" if settings.do_sample else "assisted_generation"
    if settings.dola_layers is not None:
        return "dola_sample" if settings.do_sample else "dola_generation"
    return "sample" if settings.do_sample else "greedy_search"


@dataclasses.dataclass(frozen=True)
class _Use:
    """What some settings are for: names, the strategies that read them, and how to ask for one of those."""

    settings: tuple[str, ...]
    strategies: Collection[str]
    remedy: str


_USES = (
    _Use(
        ("seed", "temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        SAMPLING_STRATEGIES,
        "do_sample=True",
    ),
    _Use(("top_k",), SAMPLING_STRATEGIES | {"contrastive_search"}, "do_sample=True or penalty_alpha"),
    _Use(
        ("assistant_model", "num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
        ASSISTED_STRATEGIES,
        "assistant_model or prompt_lookup_num_tokens, with neither num_beams nor penalty_alpha",
    ),
    _Use(("dola_layers",), DOLA_STRATEGIES, "none of num_beams, penalty_alpha, assistant_model and prompt lookup"),
    _Use(("penalty_alpha",), {"contrastive_search"}, "a penalty_alpha above 0, with neither do_sample nor num_beams"),
    _Use(("do_sample",), SAMPLING_STRATEGIES, "num_beam_groups=1 and no constraints"),
    _Use(("num_return_sequences",), SAMPLING_STRATEGIES | BEAM_STRATEGIES, "do_sample=True or num_beams"),
    _Use(("early_stopping", "length_penalty"), BEAM_STRATEGIES, "num_beams of 2 or more"),
    _Use(("diversity_penalty",), {"group_beam_search"}, "num_beam_groups of 2 or more"),
)
"""Every setting that not all strategies read."""

_COMPANIONS = {"num_assistant_tokens": "assistant_model", "max_matching_ngram_size": "prompt_lookup_num_tokens"}
"""Settings of one of two ways to guess, and what asks for it."""

_MODEST = frozenset({"do_sample", "num_return_sequences", "prompt_lookup_num_tokens"})
"""Settings whose default asks for nothing, so that giving it is no mistake with any strategy."""


def useless_settings(given: Mapping[str, Any], settings: "GenerationConfig") -> list[str]:
    """A sentence for each group of given settings that would change nothing.

    Args:
        given: keywords of a call.
        settings: what they make of the settings in force.
    """
    strategy = strategy_of(settings)
    problems: list[str] = []
    for use in _USES:
        names = [
            name
            for name in use.settings
            if name in given and not (name in _MODEST and getattr(settings, name) == getattr(type(settings), name))
        ]
        if names and strategy not in use.strategies:
            problems.append(
                f"{', '.join(names)} would change nothing: the strategy is {strategy}, in which "
                f"{STRATEGIES[strategy]}. Pass {use.remedy}, or leave {'it' if len(names) == 1 else 'them'} out."
            )
    if strategy in ASSISTED_STRATEGIES:
        problems += [
            f"{name} would change nothing without {needed}. Pass it too, or leave {name} out."
            for name, needed in _COMPANIONS.items()
            if name in given and not getattr(settings, needed)
        ]
    if not settings.return_dict_in_generate and (
        asked := [name for name in ("output_scores", "output_logits") if given.get(name)]
    ):
        problems.append(
            f"{', '.join(asked)} would change nothing: ids alone come back. Pass return_dict_in_generate=True."
        )
    return problems


def conflicting_settings(settings: "GenerationConfig") -> list[str]:
    """A sentence for each pair of settings that cannot both be."""
    problems: list[str] = []
    beams, groups = settings.num_beams, settings.num_beam_groups
    if beams > 1 and settings.num_return_sequences > beams:
        problems.append(f"num_return_sequences is {settings.num_return_sequences}, more than the {beams} of num_beams.")
    if beams % groups:
        problems.append(f"num_beams is {beams}, expected a multiple of num_beam_groups, which is {groups}.")
    if groups > 1 and settings.diversity_penalty == 0:
        problems.append("num_beam_groups needs a diversity_penalty above 0: without it all groups are the same.")
    if settings.strategy == "contrastive_search" and settings.top_k in {0, 1}:
        problems.append(f"top_k is {settings.top_k}, but penalty_alpha chooses among top_k candidates: pass 2 or more.")
    if settings.guided and settings.strategy in UNGUIDED:
        problems.append(
            f"guidance_scale can't be had with {settings.strategy}: leave guidance_scale or what asks for that "
            "strategy out."
        )
    if settings.assistant_model is not None and settings.prompt_lookup_num_tokens:
        problems.append("assistant_model and prompt_lookup_num_tokens both guess tokens. Leave one of them out.")
    if settings.strategy in ASSISTED_STRATEGIES and settings.num_return_sequences > 1:
        problems.append(
            f"num_return_sequences is {settings.num_return_sequences}, but assisted generation continues one row. "
            "Call it once for each continuation, each with its own seed."
        )
    if settings.constraints or settings.force_words_ids:
        if beams == 1:
            problems.append("force_words_ids and constraints need beams to choose from. Pass num_beams of 2 or more.")
        if groups > 1:
            problems.append("force_words_ids and constraints can't be had in groups. Leave num_beam_groups out.")
    return problems
