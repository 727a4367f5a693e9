"""The examples' model and optimizer in JAX."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.common.options import Options
from examples.common.run import step_seed
from examples.common.task import Rows, Start, Task
from opt_flax import (
    FlaxOPTForCausalLM,
    FlaxOPTForQuestionAnswering,
    FlaxOPTForSequenceClassification,
    load_optimizer,
    save_optimizer,
)

CLASSES = {
    "lm": FlaxOPTForCausalLM,
    "sequence_classification": FlaxOPTForSequenceClassification,
    "question_answering": FlaxOPTForQuestionAnswering,
}


class Trainer:
    """See `examples.common.run.Trainer`."""

    def __init__(self, task: Task, start: Start, options: Options, rates: np.ndarray, checkpoint: Path | None) -> None:
        rngs = nnx.Rngs(params=options.seed, dropout=options.seed)
        kind = CLASSES[start.head]
        if checkpoint is not None and start.lora is None:
            self.model = kind.from_pretrained(checkpoint, rngs=rngs)
        elif start.config is not None:
            self.model = kind(start.config, rngs=rngs)
        else:
            self.model = kind.from_pretrained(options.model, rngs=rngs, **start.arguments)
        if start.lora is not None and checkpoint is None:
            self.model.add_lora(start.lora, rngs=rngs)
        elif start.lora is not None:
            self.model.load_adapter(checkpoint, rngs=rngs)
        self.task, self.options = task, options
        self.variables = nnx.Param if start.lora is None else nnx.LoRAParam
        table = jnp.asarray(rates, jnp.float32)
        rule = optax.chain(
            optax.clip_by_global_norm(options.clip),
            optax.adamw(lambda count: table[count], b1=0.9, b2=0.999, eps=1e-8, weight_decay=options.weight_decay),
        )
        self.optimizer = nnx.Optimizer(self.model, rule, wrt=self.variables)
        if checkpoint is not None:
            load_optimizer(checkpoint, self.model, self.optimizer)
        self.compiled = nnx.jit(self.update, donate_argnums=(0, 1))
        self.evaluated = nnx.jit(self.answer)

    def update(self, model: nnx.Module, optimizer: nnx.Optimizer, rows: dict[str, jax.Array]) -> jax.Array:
        """What `step` compiles."""
        gradient = nnx.value_and_grad(lambda model: model(**rows).loss, argnums=nnx.DiffState(0, self.variables))
        loss, gradients = gradient(model)
        optimizer.update(model, gradients)
        return loss

    def answer(self, model: nnx.Module, rows: dict[str, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """What `evaluate` compiles."""
        outputs = model(**rows, **self.task.arguments)
        return outputs.loss, tuple(getattr(outputs, name).argmax(-1) for name in self.task.choices)

    def step(self, step: int, rows: Rows) -> float:
        nnx.reseed(self.model, dropout=step_seed(self.options, step))
        self.model.train()
        return float(self.compiled(self.model, self.optimizer, tensors(rows)))

    def evaluate(self, rows: Rows) -> tuple[float, tuple[np.ndarray, ...]]:
        self.model.eval()
        loss, answers = self.evaluated(self.model, tensors(rows))
        return float(loss), tuple(map(np.asarray, answers))

    def save(self, directory: Path) -> None:
        if self.model.lora_config is None:
            self.model.save_pretrained(directory)
        else:
            self.model.save_adapter(directory)
        save_optimizer(directory, self.model, self.optimizer)


def tensors(rows: Rows) -> dict[str, jax.Array]:
    """Rows as JAX takes them."""
    return {name: jnp.asarray(column, jnp.int32) for name, column in rows.items()}
