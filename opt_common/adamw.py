"""AdamW: the update that the three frameworks share, and what their optimizers call its two moments.

For each parameter θ with gradient g, at step t = 1, 2, … (Loshchilov and Hutter 2019, algorithm 2):

    m ← β₁ m + (1 - β₁) g                    "exp_avg"
    v ← β₂ v + (1 - β₂) g²                   "exp_avg_sq"
    θ ← θ - λ w θ - λ · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

λ is the learning rate, w the weight decay (0 for a parameter that doesn't decay) and ε outside the root and after the
correction. Equal updates come from:

    torch.optim.AdamW(parameters, lr=λ, betas=(β₁, β₂), eps=ε, weight_decay=w)
    optax.adamw(λ, b1=β₁, b2=β₂, eps=ε, weight_decay=w)                              in nnx.Optimizer(model, …, wrt=…)
    opt_tf.optimizer.AdamW(λ, beta_1=β₁, beta_2=β₂, epsilon=ε, weight_decay=w)

The defaults of the three are not the same: w is 1e-2, 1e-4 and 4e-3, β₂ is 0.999 in each, ε 1e-8, 1e-8 and 1e-7. Keras'
own AdamW adds ε before the correction: its steps are smaller where √v is near ε. It keeps λ in float32.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, ConfigError
from opt_common.lora import LoraConfig, adapter_table
from opt_common.params import Head, Parameter, parameter_table

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What the moments of a parameter are called: PyTorch's words."""

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters with the same settings. A setting that the framework doesn't tell is None.

    Attributes:
        names: their canonical names.
        learning_rate: λ, at the time of saving.
        beta_1: β₁.
        beta_2: β₂.
        epsilon: ε.
        weight_decay: w.
    """

    names: tuple[str, ...]
    learning_rate: float | None = None
    beta_1: float | None = None
    beta_2: float | None = None
    epsilon: float | None = None
    weight_decay: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWState:
    """What an optimizer's file says besides the moments.

    Attributes:
        step: number of steps taken, t.
        groups: the settings, for people; loading changes none of an optimizer's.
    """

    step: int
    groups: tuple[Group, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """The same as the metadata of a safetensors file."""
        groups = json.dumps([dataclasses.asdict(group) for group in self.groups])
        return {"format": "pt", "optimizer": "AdamW", "step": str(self.step), "groups": groups}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str) -> "AdamWState":
        """Read the metadata of a file.

        Raises:
            CheckpointError: if it is not an AdamW state's.
        """
        try:
            if metadata["optimizer"] != "AdamW":
                raise ValueError(f"optimizer {metadata['optimizer']!r}")
            step = int(metadata["step"])
            values = cast("Sequence[dict[str, Any]]", json.loads(metadata["groups"]))
            groups = tuple(Group(names=tuple(value.pop("names")), **value) for value in values)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{where} holds no state of AdamW ({error}). Name what save_optimizer wrote."
            ) from None
        if not 0 <= step < 1 << 53:
            raise CheckpointError(f"{where} says step {step}, which no optimizer took. Save it again.")
        return cls(step=step, groups=groups)


def trained_table(config: OPTConfig, lora: LoraConfig | None, head: Head | None) -> tuple[Parameter, ...]:
    """The parameters that train: the adapter's where there is one, or else all."""
    return parameter_table(config, head=head) if lora is None else adapter_table(config, lora, head).parameters


def adamw_step(
    parameter: Array,
    gradient: Array,
    moments: tuple[Array, Array],
    step: int,
    *,
    learning_rate: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
) -> tuple[Array, tuple[Array, Array]]:
    """One update, as the rule above says it.

    Args:
        parameter: θ.
        gradient: g.
        moments: m and v before the step.
        step: t, from 1.
        learning_rate: λ.
        beta_1: β₁.
        beta_2: β₂.
        epsilon: ε.
        weight_decay: w.

    Returns:
        θ, and m and v, after the step.
    """
    first = beta_1 * moments[0] + (1 - beta_1) * gradient
    second = beta_2 * moments[1] + (1 - beta_2) * gradient**2
    direction = (first / (1 - beta_1**step)) / (np.sqrt(second / (1 - beta_2**step)) + epsilon)
    return parameter - learning_rate * weight_decay * parameter - learning_rate * direction, (first, second)


def check_optimizer(holds: bool, got: str, expected: str) -> None:
    """Refuse an optimizer whose state has no place in the common file.

    Raises:
        ConfigError: naming what was got and what is expected.
    """
    if not holds:
        raise ConfigError(f"The optimizer is {got}, expected {expected}.")


def check_same(problems: Sequence[str]) -> None:
    """Refuse an optimizer that is not this model's.

    Raises:
        ConfigError: naming each parameter that one of them has alone.
    """
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(
            f"The optimizer must have just the parameters that train: {', '.join(problems[:5])}{more}. Make it from "
            "the model as it is now, its adapter included."
        )
