"""AdamW's state on its way between the frameworks; the rule is in `opt_common.adamw`.

save_optimizer("half-way", model, optimizer)    # beside model.save_pretrained("half-way")
load_optimizer("half-way", model, optimizer)    # in any of the three, into an optimizer that was made as usual
"""

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from conversion.optimizer_state import load_optimizer_state, save_optimizer_state
from opt_common.adamw import MOMENTS, AdamWState, Group, check_optimizer, check_same, trained_table
from opt_common.params import Parameter
from opt_tf.checkpoint import find, to_array, to_numpy


@keras.saving.register_keras_serializable(package="opt_tf")
class AdamW(keras.optimizers.AdamW):
    """Keras' AdamW with epsilon where PyTorch and optax have it; the arguments are Keras'."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # TensorFlow rounds Python's numbers to float32, but not NumPy's.
        self.weight_decay = np.float64(self.weight_decay)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable and its moments."""
        dtype = variable.dtype
        gradient = tf.cast(tf.convert_to_tensor(gradient), dtype)
        step = tf.cast(tf.convert_to_tensor(self.iterations) + 1, dtype)
        beta_1, beta_2, epsilon = (tf.constant(value, dtype) for value in (self.beta_1, self.beta_2, self.epsilon))
        first, second = moments_of(self, variable)
        self.assign(first, beta_1 * first.value + (1 - beta_1) * gradient)
        self.assign(second, beta_2 * second.value + (1 - beta_2) * gradient**2)
        corrected = second.value / (1 - beta_2**step)
        direction = first.value / (1 - beta_1**step) / (tf.sqrt(corrected) + epsilon)
        self.assign_sub(variable, tf.cast(learning_rate, dtype) * direction)


def save_optimizer(directory: str | os.PathLike[str], model: Any, optimizer: Any) -> None:
    """Write an optimizer's moments and number of steps, for any of the three frameworks.

    Args:
        directory: where to; made if it does not exist. The model is not written.
        model: the model that the optimizer was made for.
        optimizer: an `AdamW` of this module, or Keras' own, of all variables that train.

    Raises:
        ConfigError: if it is another optimizer, another model's, or its parameters took different numbers of steps.
    """
    table = trained_table(model.config, model.lora_config, model.head)
    variables = matched(model, optimizer, table)
    step = int(unscaled(optimizer).iterations.value)

    def read(parameter: Parameter, moment: str) -> np.ndarray:
        variable = moments_of(unscaled(optimizer), variables[parameter.name])[MOMENTS.index(moment)]
        return to_numpy(variable, parameter)

    state = AdamWState(step=step, groups=groups_of(optimizer, variables))
    save_optimizer_state(directory, table, state, read)


def load_optimizer(directory: str | os.PathLike[str], model: Any, optimizer: Any) -> AdamWState:
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
        variable = moments_of(unscaled(optimizer), variables[parameter.name])[MOMENTS.index(moment)]
        variable.assign(to_array(array, parameter, variable.dtype))

    state = load_optimizer_state(directory, table, write)
    unscaled(optimizer).iterations.assign(state.step)
    return state


def matched(model: Any, optimizer: Any, table: tuple[Parameter, ...]) -> Mapping[str, Any]:
    """The variables that train by canonical name, if they are just those of the optimizer."""
    inner = unscaled(optimizer)
    check_optimizer(isinstance(inner, keras.optimizers.AdamW), type(inner).__name__, "an opt_tf.optimizer.AdamW")
    check_optimizer(not inner.amsgrad, "AdamW with amsgrad", "AdamW without")
    if not inner.built:
        optimizer.build(model.trainable_variables)
    variables = {parameter.name: find(model, parameter) for parameter in table}
    held = {id(variable) for variable in inner._trainable_variables}
    problems = [f"{name} is not in it" for name, variable in variables.items() if id(variable) not in held]
    others = held - {id(variable) for variable in variables.values()}
    check_same([*problems, *(["others are"] if others else [])])
    return variables


def groups_of(optimizer: Any, variables: Mapping[str, Any]) -> tuple[Group, ...]:
    """The optimizer's settings."""
    inner = unscaled(optimizer)
    decaying = {name for name, variable in variables.items() if inner._use_weight_decay(variable)}
    return tuple(
        Group(
            names=tuple(name for name in variables if (name in decaying) == decays),
            learning_rate=float(inner.learning_rate),
            beta_1=float(inner.beta_1),
            beta_2=float(inner.beta_2),
            epsilon=float(inner.epsilon),
            weight_decay=float(inner.weight_decay) if decays else 0.0,
        )
        for decays in sorted({name in decaying for name in variables})
    )


def unscaled(optimizer: Any) -> Any:
    """The optimizer inside one that scales losses."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def moments_of(optimizer: Any, variable: Any) -> tuple[Any, Any]:
    """The optimizer's two variables for a variable of the model."""
    index = optimizer._get_variable_index(variable)
    return optimizer._momentums[index], optimizer._velocities[index]
