"""A backend's program that is wrong: `opt-torch` with one bias of one layer changed after loading."""

import dataclasses
from typing import Any

from opt_common.cli import run
from opt_torch import cli

LAYER = 1


def load(path_or_id: str, **options: Any) -> Any:
    """The model, of which layer `LAYER` computes something else."""
    import torch

    model = cli.load(path_or_id, **options)
    with torch.no_grad():
        model.model.decoder.layers[LAYER].fc2.bias += 1e-6
    return model


def main() -> int:
    """Run one command of `opt-torch`."""
    return run(dataclasses.replace(cli.program(), name="opt-wrong", load=load))
