"""The program `opt-flax`."""

from collections.abc import Sequence
from typing import Any

from opt_common.cli import Program, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `opt_common.cli.run`."""
    return run(Program(name="opt-flax", framework="JAX", tensors="jax", load=load), argv)


def load(path_or_id: str, *, architecture: str = "OPTForCausalLM", **options: Any) -> Any:
    """The model of a class; its framework is imported only now."""
    import opt_flax

    return getattr(opt_flax, "Flax" + architecture).from_pretrained(path_or_id, **options)
