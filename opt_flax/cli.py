"""The program `opt-flax`."""

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
        name="opt-flax",
        framework="JAX",
        tensors="jax",
        load=load,
        inference=inference,
        trainer=trainer,
        write_random=write_random,
        write_outliers=write_outliers,
    )


def load(path_or_id: str, *, architecture: str = "OPTForCausalLM", **options: Any) -> Any:
    """The model of a class; its framework is imported only now."""
    import opt_flax

    return getattr(opt_flax, "Flax" + architecture).from_pretrained(path_or_id, **options)


def inference() -> contextlib.AbstractContextManager[Any]:
    """Keep nothing for a backward pass: JAX does so only under a gradient."""
    return contextlib.nullcontext()


def trainer(config: OPTConfig, dtype: str = "float32") -> Callable[[Any], float]:
    """What does one step of AdamW on ids (B, T) and returns the loss, with a new model.

    Args:
        config: the model's configuration.
        dtype: of the arithmetic; where it is a smaller one, weights are float32.
    """
    import optax
    from flax import nnx

    from opt_flax.modeling import FlaxOPTForCausalLM

    mixed = dtype in ("bfloat16", "float16")
    model = FlaxOPTForCausalLM(config, dtype=dtype, param_dtype="float32" if mixed else dtype, rngs=nnx.Rngs(0))
    model.train()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-5), wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, ids_BT: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda model: model(input_ids=ids_BT, labels=ids_BT).loss)(model)
        optimizer.update(model, gradients)
        return loss

    return lambda ids_BT: float(step(model, optimizer, ids_BT))
