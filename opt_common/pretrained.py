"""What `from_pretrained` does alike in the three backends."""

import warnings

from opt_common.errors import CheckpointError

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
