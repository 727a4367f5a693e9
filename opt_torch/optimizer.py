"""AdamW's state on its way between the frameworks; the rule is in `opt_common.adamw`.

save_optimizer("half-way", model, optimizer)    # beside model.save_pretrained("half-way")
load_optimizer("half-way", model, optimizer)    # in any of the three, into an optimizer that was made as usual
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from conversion.optimizer_state import load_optimizer_state, save_optimizer_state
from opt_common.adamw import AdamWState, Group, check_optimizer, check_same, trained_table
from opt_common.params import Parameter
from opt_torch.checkpoint import find, to_numpy, to_tensor


def save_optimizer(directory: str | os.PathLike[str], model: Any, optimizer: torch.optim.AdamW) -> None:
    """Write an optimizer's moments and number of steps, for any of the three frameworks.

    Args:
        directory: where to; made if it does not exist. The model is not written.
        model: the model that the optimizer was made for.
        optimizer: a `torch.optim.AdamW` of all parameters that train.

    Raises:
        ConfigError: if it is another optimizer, another model's, or its parameters took different numbers of steps.
    """
    table = trained_table(model.config, model.lora_config, model.head)
    variables = matched(model, optimizer, table)
    steps = {int(optimizer.state.get(variable, {}).get("step", 0)) for variable in variables.values()}
    check_optimizer(len(steps) == 1, f"at steps {sorted(steps)}, by parameter", "at one step")
    step = steps.pop()

    def read(parameter: Parameter, moment: str) -> np.ndarray:
        variable = variables[parameter.name]
        return to_numpy(optimizer.state[variable][moment] if step else torch.zeros_like(variable))

    state = AdamWState(step=step, groups=groups_of(optimizer, variables))
    save_optimizer_state(directory, table, state, read)


def load_optimizer(directory: str | os.PathLike[str], model: Any, optimizer: torch.optim.AdamW) -> AdamWState:
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
    variables = matched(model, optimizer, table)

    def write(parameter: Parameter, moment: str, array: np.ndarray) -> None:
        variable = variables[parameter.name]
        tensor = to_tensor(array).to(variable.device, variable.dtype)
        optimizer.state[variable][moment] = tensor

    state = load_optimizer_state(directory, table, write)
    for variable in variables.values():
        optimizer.state[variable]["step"] = torch.tensor(float(state.step))
        if not state.step:
            del optimizer.state[variable]
    return state


def matched(model: Any, optimizer: torch.optim.AdamW, table: tuple[Parameter, ...]) -> Mapping[str, torch.nn.Parameter]:
    """The variables that train by canonical name, if they are just those of the optimizer."""
    check_optimizer(isinstance(optimizer, torch.optim.AdamW), type(optimizer).__name__, "a torch.optim.AdamW")
    odd = any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups)
    check_optimizer(not odd, "AdamW with amsgrad or maximize", "AdamW without")
    variables = {parameter.name: find(model, parameter) for parameter in table}
    held = {id(variable) for group in optimizer.param_groups for variable in group["params"]}
    problems = [f"{name} is not in it" for name, variable in variables.items() if id(variable) not in held]
    others = held - {id(variable) for variable in variables.values()}
    check_same([*problems, *(["others are"] if others else [])])
    return variables


def groups_of(optimizer: torch.optim.AdamW, variables: Mapping[str, torch.nn.Parameter]) -> tuple[Group, ...]:
    """The optimizer's settings."""
    names = {id(variable): name for name, variable in variables.items()}
    return tuple(
        Group(
            names=tuple(names[id(variable)] for variable in group["params"]),
            learning_rate=float(group["lr"]),
            beta_1=float(group["betas"][0]),
            beta_2=float(group["betas"][1]),
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
        )
        for group in optimizer.param_groups
    )
