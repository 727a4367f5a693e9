"""The program `opt-flax`."""

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.synthetic import write_outliers, write_random
from opt_common.cli import Program, run
from opt_common.config import OPTConfig

LEAST_ROOM_BYTES = 100 << 20
"""Free disk space below which no compiled programs are kept: JAX would leave files cut short."""


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

    model_class = getattr(opt_flax, "Flax" + architecture)
    keep_programs()
    return model_class.from_pretrained(path_or_id, **options)


def inference() -> contextlib.AbstractContextManager[Any]:
    """Keep nothing for a backward pass: JAX does so only under a gradient."""
    return contextlib.nullcontext()


def trainer(config: OPTConfig, dtype: str = "float32") -> Callable[[Any], float]:
    """What does one step of AdamW on ids (B, T) and returns the loss, with a new model.

    Args:
        config: the model's configuration.
        dtype: of the arithmetic; where it is a smaller one, weights are float32.
    """
    import jax
    import optax
    from flax import nnx

    from opt_flax.modeling import FlaxOPTForCausalLM

    keep_programs()
    mixed = dtype in ("bfloat16", "float16")
    # Of JAX's generators, the one that makes the numbers of dropout fastest on a CPU.
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
    model = FlaxOPTForCausalLM(config, dtype=dtype, param_dtype="float32" if mixed else dtype, rngs=rngs)
    model.train()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-5), wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, ids_BT: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda model: model(input_ids=ids_BT, labels=ids_BT).loss)(model)
        optimizer.update(model, gradients)
        return loss

    return lambda ids_BT: float(step(model, optimizer, ids_BT))


def keep_programs() -> None:
    """Have JAX keep what it compiles in the user's cache directory, where the next process finds it.

    Only the command line does so: a library leaves the settings of a process alone. What JAX has been told already, by
    its environment variables or otherwise, holds.
    """
    import jax

    config: Any = jax.config  # its type does not know the settings
    # An older JAX prints two lines for every program that it finds.
    if not config.jax_enable_compilation_cache or jax.__version_info__ < (0, 10, 2):
        return
    if config.jax_compilation_cache_dir is None:
        directory = cache_directory(os.environ, sys.platform)
        if (problem := unsuitable(directory)) is not None:
            warnings.warn(
                f"{directory} {problem}, so compiled programs are not kept. Name another directory by "
                f"JAX_COMPILATION_CACHE_DIR, or have none with JAX_ENABLE_COMPILATION_CACHE=0.",
                stacklevel=2,
            )
            return
        config.update("jax_compilation_cache_dir", str(directory))
    # JAX keeps what took it a second. Here many programs take less, and a user waits for all of them.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cache_directory(environment: Mapping[str, str], platform: str) -> Path:
    """The directory of this program's own in the cache directory of the user."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  # Path.home() fails where there is none
    places = {
        "darwin": home / "Library" / "Caches",
        "win32": Path(environment.get("LOCALAPPDATA") or home / "AppData" / "Local"),
    }
    named = Path(environment.get("XDG_CACHE_HOME", ""))
    # A relative path is to be ignored, says the specification of XDG.
    return (named if named.is_absolute() else places.get(platform, home / ".cache")) / "opt-flax"


def unsuitable(directory: Path) -> str | None:
    """Why compiled programs can't be kept in a directory, which is made if need be; None if they can."""
    if not directory.is_absolute():
        return "can't be made (the user has no home directory)"
    try:
        # JAX runs what it finds there, so it is the user's alone.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return f"can't be made ({error.strerror})"
    if not os.access(directory, os.W_OK | os.X_OK):
        return "can't be written to"
    if free < LEAST_ROOM_BYTES:
        return f"has {free >> 20} MiB of free space, less than {LEAST_ROOM_BYTES >> 20}"
    return None
