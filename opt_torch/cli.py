"""The program `opt-torch`."""

from collections.abc import Sequence
from typing import Any

from opt_common.cli import Program, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `opt_common.cli.run`."""
    return run(Program(name="opt-torch", framework="PyTorch", tensors="pt", load=load), argv)


def load(path_or_id: str, **options: Any) -> Any:
    """The language model; its framework is imported only now."""
    from opt_torch import OPTForCausalLM

    return OPTForCausalLM.from_pretrained(path_or_id, **options)
