"""What `from_pretrained` does alike in the three backends."""

import warnings
from collections.abc import Mapping

from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError
from opt_common.hub import QUANTIZED
from opt_common.params import Head, Parameter, head_of, parameter_table

MODEL_DTYPES = ("float32", "float64", "bfloat16", "float16")
"""Dtypes a model can have. The first is what `from_pretrained` gives when it is not told."""


def choose_dtype(requested: str | None, stored: str) -> str:
    """The dtype a loaded model gets.

    Args:
        requested: a name of `MODEL_DTYPES`, "auto" for the stored one, or None for the default.
        stored: the dtype of the checkpoint's tensors.

    Raises:
        CheckpointError: for a dtype no model can have.
    """
    if requested is None:
        if stored in ("float16", "bfloat16"):
            # Half precision is slow on a CPU and overflows in training, so nobody gets it unasked.
            warnings.warn(
                f"The checkpoint is stored in {stored}; the model is loaded in {MODEL_DTYPES[0]}. "
                f"Pass dtype='auto' for {stored}, or dtype='{MODEL_DTYPES[0]}' to say that this is meant.",
                stacklevel=4,
            )
        return MODEL_DTYPES[0]
    name = stored if requested == "auto" else requested
    if name not in MODEL_DTYPES:
        raise CheckpointError(f"dtype is {name!r}, expected one of {', '.join(MODEL_DTYPES)} or 'auto'.")
    return name


def choose_format(config: OPTConfig, requested: str | None) -> tuple[OPTConfig, str]:
    """The configuration and the format that `save_pretrained` writes.

    Args:
        config: the model's configuration.
        requested: a format, or None for that of the model's weights.

    Raises:
        CheckpointError: if that of quantised weights is asked for, and the model's are not.
    """
    quantized = config.quantization is not None
    if requested == QUANTIZED and not quantized:
        raise CheckpointError(f"format is {QUANTIZED!r}, but the model is not. Load it with quantization=….")
    chosen = requested or (QUANTIZED if quantized else "safetensors")
    # Any other format holds the numbers that integers stand for.
    return config if chosen == QUANTIZED else config.replace(quantization=None), chosen


def with_labels(
    config: OPTConfig,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    label2id: Mapping[str, int] | None = None,
    problem_type: str | None = None,
) -> OPTConfig:
    """A configuration with those of its fields of sequence classification changed that are given.

    Raises:
        ConfigError: for labels that contradict each other.
    """
    changes = {"num_labels": num_labels, "id2label": id2label, "label2id": label2id, "problem_type": problem_type}
    changes = {name: value for name, value in changes.items() if value is not None}
    return config.replace(**changes) if changes else config


def split_table(
    config: OPTConfig, head: Head | None, *, new_head: bool
) -> tuple[tuple[Parameter, ...], tuple[Parameter, ...]]:
    """The rows of the parameter table that are loaded, and those that are made anew: the head's, if that is asked for.

    Raises:
        CheckpointError: if a new head is asked for and the model has none, or one that is the token table.
    """
    table = parameter_table(config, head=head)
    if not new_head:
        return table, ()
    new = tuple(parameter for parameter in table if head_of(parameter.name) is not None)
    if not new:
        raise CheckpointError("new_head is True, but this model has no head with weights of its own. Leave it out.")
    return tuple(parameter for parameter in table if parameter not in new), new
