"""The programs as they are installed: what they need is imported where Ctrl-C is already answered.

Importing a program takes a third of a second and more. This module imports nothing of ours, and lies in no package, for
that would be imported first.
"""

import importlib
import sys


def opt_convert() -> int:
    """Run `opt-convert` and return its exit code."""
    return _run("opt-convert", "conversion.cli")


def opt_torch() -> int:
    """Run `opt-torch` and return its exit code."""
    return _run("opt-torch", "opt_torch.cli")


def opt_tf() -> int:
    """Run `opt-tf` and return its exit code."""
    return _run("opt-tf", "opt_tf.cli")


def opt_flax() -> int:
    """Run `opt-flax` and return its exit code."""
    return _run("opt-flax", "opt_flax.cli")


def _run(name: str, module: str) -> int:
    try:
        return importlib.import_module(module).main()
    except KeyboardInterrupt:
        print(f"{name}: interrupted.", file=sys.stderr)
        return 130
