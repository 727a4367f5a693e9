"""The examples' model and optimizer in TensorFlow."""

import os
from pathlib import Path

# Read when TensorFlow is imported: no notes about the machine on standard error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from examples.common.options import Options
from examples.common.run import step_seed
from examples.common.task import Rows, Start, Task
from opt_tf import (
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    load_optimizer,
    save_optimizer,
)
from opt_tf.optimizer import AdamW

CLASSES = {
    "lm": TFOPTForCausalLM,
    "sequence_classification": TFOPTForSequenceClassification,
    "question_answering": TFOPTForQuestionAnswering,
}


class Trainer:
    """See `examples.common.run.Trainer`."""

    def __init__(self, task: Task, start: Start, options: Options, rates: np.ndarray, checkpoint: Path | None) -> None:
        keras.utils.set_random_seed(options.seed)
        kind = CLASSES[start.head]
        if checkpoint is not None and start.lora is None:
            self.model = kind.from_pretrained(checkpoint)
        elif start.config is not None:
            self.model = kind(start.config)
        else:
            self.model = kind.from_pretrained(options.model, **start.arguments)
        if start.lora is not None and checkpoint is None:
            self.model.add_lora(start.lora)
        elif start.lora is not None:
            self.model.load_adapter(checkpoint)
        self.task, self.options, self.rates = task, options, rates
        self.variables = self.model.trainable_variables
        self.generators = [variable for variable in self.model.variables if "seed_generator" in variable.path]
        self.optimizer = AdamW(
            beta_1=0.9,
            beta_2=0.999,
            epsilon=1e-8,
            weight_decay=options.weight_decay,
            global_clipnorm=options.clip,
        )
        self.optimizer.build(self.variables)
        if checkpoint is not None:
            load_optimizer(checkpoint, self.model, self.optimizer)
        self.compiled = tf.function(self.update, autograph=False)

    def update(self, rows: dict[str, tf.Tensor]) -> tf.Tensor:
        """What `step` compiles."""
        with tf.GradientTape() as tape:
            loss = self.model(**rows, training=True).loss
        self.optimizer.apply(tape.gradient(loss, self.variables), self.variables)
        return loss

    def step(self, step: int, rows: Rows) -> float:
        for number, generator in enumerate(self.generators):
            generator.assign([step_seed(self.options, step), number])
        self.optimizer.learning_rate.assign(self.rates[step])
        return float(self.compiled(tensors(rows)))

    def evaluate(self, rows: Rows) -> tuple[float, tuple[np.ndarray, ...]]:
        outputs = self.model(**tensors(rows), **self.task.arguments)
        return float(outputs.loss), tuple(tf.argmax(getattr(outputs, name), -1).numpy() for name in self.task.choices)

    def save(self, directory: Path) -> None:
        if self.model.lora_config is None:
            self.model.save_pretrained(directory)
        else:
            self.model.save_adapter(directory)
        save_optimizer(directory, self.model, self.optimizer)


def tensors(rows: Rows) -> dict[str, tf.Tensor]:
    """Rows as TensorFlow takes them."""
    return {name: tf.convert_to_tensor(column, tf.int32) for name, column in rows.items()}
