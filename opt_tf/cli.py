"""The program `opt-tf`."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from opt_common.cli import Program, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `opt_common.cli.run`."""
    return run(Program(name="opt-tf", framework="TensorFlow", tensors="tf", load=load), argv)


def load(path_or_id: str, *, architecture: str = "OPTForCausalLM", **options: Any) -> Any:
    """The model of a class; its framework is imported only now."""
    with quiet_import():
        import opt_tf

    return getattr(opt_tf, "TF" + architecture).from_pretrained(path_or_id, **options)


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Keep TensorFlow's notes about the machine from the users of a program: its C++ writes them past Python."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
