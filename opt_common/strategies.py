"""Which decoding strategy some settings ask for, and which settings each strategy has a use for."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opt_common.generation_config import GenerationConfig

STRATEGIES = {
    "greedy_search": "the likeliest token is taken",
    "sample": "each token is drawn by its probability",
}
"""Name of each strategy, as Hugging Face has it, and what it does."""

TOKEN_BY_TOKEN = ("greedy_search", "sample")
"""Strategies that append tokens and take none back, so that a text can be shown as it grows."""

KEEPS_CACHE = TOKEN_BY_TOKEN
"""Strategies whose last step has read the very rows that come back."""


def strategy_of(settings: "GenerationConfig") -> str:
    """The one strategy that some settings ask for, by the precedence of Hugging Face's `get_generation_mode`."""
    return "sample" if settings.do_sample else "greedy_search"


@dataclasses.dataclass(frozen=True)
class _Use:
    """What some settings are for: names, the strategies that read them, and how to ask for one of those."""

    settings: tuple[str, ...]
    strategies: Collection[str]
    remedy: str


_SAMPLING = ("sample",)

_USES = (
    _Use(
        ("seed", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        _SAMPLING,
        "do_sample=True",
    ),
    _Use(("num_return_sequences",), _SAMPLING, "do_sample=True"),
)
"""Every setting that not all strategies read."""

_MODEST = frozenset({"num_return_sequences"})
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
    if not settings.return_dict_in_generate and (
        asked := [name for name in ("output_scores", "output_logits") if given.get(name)]
    ):
        problems.append(
            f"{', '.join(asked)} would change nothing: ids alone come back. Pass return_dict_in_generate=True."
        )
    return problems
