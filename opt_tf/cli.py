"""The program `opt-tf`."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
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
        name="opt-tf",
        framework="TensorFlow",
        tensors="tf",
        load=load,
        inference=inference,
        trainer=trainer,
        write_random=write_random,
        write_outliers=write_outliers,
    )


def load(path_or_id: str, *, architecture: str = "OPTForCausalLM", **options: Any) -> Any:
    """The model of a class; its framework is imported only now."""
    with quiet_import():
        import opt_tf

        # The package imports its classes, and TensorFlow with them, when they are asked for.
        model_class = getattr(opt_tf, "TF" + architecture)
    return model_class.from_pretrained(path_or_id, **options)


def inference() -> contextlib.AbstractContextManager[Any]:
    """Keep nothing for a backward pass: TensorFlow does so only on a tape."""
    return contextlib.nullcontext()


def trainer(config: OPTConfig, dtype: str = "float32") -> Callable[[Any], float]:
    """What does one step of AdamW on ids (B, T) and returns the loss, with a new model.

    Args:
        config: the model's configuration.
        dtype: of the arithmetic; where it is a smaller one, weights are float32.
    """
    with quiet_import():
        import tensorflow as tf

        from opt_tf.modeling import TFOPTForCausalLM
        from opt_tf.optimizer import AdamW

    mixed = dtype in ("bfloat16", "float16")
    model = TFOPTForCausalLM(config, dtype=f"mixed_{dtype}" if mixed else dtype)
    optimizer = AdamW(1e-5)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True, autograph=False)
    def step(ids_BT: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model(input_ids=ids_BT, labels=ids_BT, training=True).loss
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return lambda ids_BT: float(step(tf.cast(ids_BT, tf.int32)))


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
