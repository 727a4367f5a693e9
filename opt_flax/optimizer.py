"""AdamW's state on its way between the frameworks; the rule is in `opt_common.adamw`.

save_optimizer("half-way", model, optimizer)    # beside model.save_pretrained("half-way")
load_optimizer("half-way", model, optimizer)    # in any of the three, into an optimizer that was made as usual
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from conversion.optimizer_state import load_optimizer_state, save_optimizer_state
from opt_common.adamw import MOMENTS, AdamWState, check_optimizer, check_same, trained_table
from opt_common.params import Parameter
from opt_flax.checkpoint import to_array, to_numpy


def save_optimizer(directory: str | os.PathLike[str], model: Any, optimizer: nnx.Optimizer) -> None:
    """Write an optimizer's moments and number of steps, for any of the three frameworks.

    Args:
        directory: where to; made if it does not exist. The model is not written.
        model: the model that the optimizer was made for.
        optimizer: an `nnx.Optimizer` of `optax.adamw` and all variables that train.

    Raises:
        ConfigError: if it is another optimizer, another model's, or its parameters took different numbers of steps.
    """
    table = trained_table(model.config, model.lora_config, model.head)
    moments = matched(model, optimizer, table)
    step = int(adam_state(optimizer).count[...])

    def read(parameter: Parameter, moment: str) -> np.ndarray:
        return to_numpy(moments[parameter.name][MOMENTS.index(moment)][...], parameter)

    save_optimizer_state(directory, table, AdamWState(step=step), read)


def load_optimizer(directory: str | os.PathLike[str], model: Any, optimizer: nnx.Optimizer) -> AdamWState:
    """Put what `save_optimizer` of any framework wrote into an optimizer, which keeps its own settings.

    Args:
        directory: holds the file.
        model: the model that the optimizer was made for.
        optimizer: as for `save_optimizer`.

    Returns:
        The number of steps, and the settings of the optimizer that was saved.

    Raises:
        ConfigError: as for `save_optimizer`.
        CheckpointError: if the file is absent, damaged, or of a model in which other parameters train.
    """
    table = trained_table(model.config, model.lora_config, model.head)
    moments = matched(model, optimizer, table)

    def write(parameter: Parameter, moment: str, array: np.ndarray) -> None:
        variable = moments[parameter.name][MOMENTS.index(moment)]
        variable[...] = to_array(array, parameter, variable.dtype)

    state = load_optimizer_state(directory, table, write)
    optimizer.step[...] = np.asarray(state.step, optimizer.step.dtype)
    for part in parts(optimizer.opt_state):
        # A schedule counts the same steps.
        if "count" in getattr(part, "_fields", ()):
            part.count[...] = np.asarray(state.step, part.count.dtype)
    return state


def matched(model: Any, optimizer: nnx.Optimizer, table: tuple[Parameter, ...]) -> Mapping[str, tuple[Any, Any]]:
    """The moments by canonical name, if they are just those of the variables that train."""
    state = adam_state(optimizer)
    first, second = (
        {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(moment)}
        for moment in (state.mu, state.nu)
    )
    held = set(first)
    moments: dict[str, tuple[Any, Any]] = {}
    problems: list[str] = []
    for parameter in table:
        *path, leaf = parameter.path("nnx")[1 if model.head is None else 0 :]
        places = ((*path, leaf), (*path, "base_layer", leaf))
        place = next((place for place in places if place in held), None)
        if place is None:
            problems.append(f"{parameter.name} is not in it")
        else:
            held.remove(place)
            moments[parameter.name] = first[place], second[place]
    check_same([*problems, *(["others are"] if held else [])])
    return moments


def adam_state(optimizer: nnx.Optimizer) -> Any:
    """The one part of an optimizer's state that has AdamW's moments; optax calls them mu and nu."""
    found = [part for part in parts(optimizer.opt_state) if {"mu", "nu", "count"} <= {*getattr(part, "_fields", ())}]
    check_optimizer(len(found) == 1, f"one with {len(found)} states of Adam", "an nnx.Optimizer of optax.adamw")
    return found[0]


def parts(state: Any) -> Iterator[Any]:
    """The records inside an optimizer's state, however deep in chains and masks."""
    if isinstance(state, tuple):
        yield state
        for part in state:
            yield from parts(part)
