"""The program `opt-tf`."""

import os
from collections.abc import Sequence
from typing import Any

from opt_common.cli import Program, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `opt_common.cli.run`."""
    # Read when TensorFlow is imported: its notes about the machine are not for the users of a program.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return run(Program(name="opt-tf", framework="TensorFlow", tensors="tf", load=load), argv)


def load(path_or_id: str, **options: Any) -> Any:
    """The language model; its framework is imported only now."""
    from opt_tf import TFOPTForCausalLM

    return TFOPTForCausalLM.from_pretrained(path_or_id, **options)
