"""The program `opt-torch`."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from conversion.synthetic import write_outliers, write_random
from opt_common.cli import Program, run
from opt_common.config import OPTConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `opt_common.cli.run`."""
    return run(program(), argv)


def program() -> Program:
    """What the commands work with."""
    return Program(
        name="opt-torch",
        framework="PyTorch",
        tensors="pt",
        load=load,
        inference=inference,
        trainer=trainer,
        write_random=write_random,
        write_outliers=write_outliers,
    )


def load(path_or_id: str, *, architecture: str = "OPTForCausalLM", **options: Any) -> Any:
    """The model of a class, for inference; its framework is imported only now."""
    import torch

    import opt_torch
    from opt_common.native import library
    from opt_torch.packed import pack

    model = getattr(opt_torch, architecture).from_pretrained(path_or_id, **options)
    # In float32 a single text gains nothing, and a checkpoint would no longer be used from where it lies in its file.
    if model.dtype is torch.bfloat16 and library() is None:
        pack(model)
    return model


def inference() -> contextlib.AbstractContextManager[Any]:
    """Keep nothing for a backward pass."""
    import torch

    return torch.no_grad()


def trainer(config: OPTConfig, dtype: str = "float32") -> Callable[[Any], float]:
    """What does one step of AdamW on ids (B, T) and returns the loss, with a new model.

    Args:
        config: the model's configuration.
        dtype: of the arithmetic; where it is a smaller one, weights are float32.
    """
    import torch

    from opt_torch.modeling import OPTForCausalLM

    mixed = dtype in ("bfloat16", "float16")
    model = OPTForCausalLM(config, dtype=torch.float32 if mixed else getattr(torch, dtype))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(ids_BT: Any) -> float:
        labels_BT = torch.as_tensor(ids_BT)
        with torch.autocast("cpu", dtype=getattr(torch, dtype)) if mixed else contextlib.nullcontext():
            loss = model(input_ids=labels_BT, labels=labels_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
