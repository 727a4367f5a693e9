"""The examples' model and optimizer in PyTorch."""

from pathlib import Path

import numpy as np
import torch

from examples.common.options import Options
from examples.common.run import step_seed
from examples.common.task import Rows, Start, Task
from opt_torch import (
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    load_optimizer,
    save_optimizer,
)

CLASSES = {
    "lm": OPTForCausalLM,
    "sequence_classification": OPTForSequenceClassification,
    "question_answering": OPTForQuestionAnswering,
}


class Trainer:
    """See `examples.common.run.Trainer`."""

    def __init__(self, task: Task, start: Start, options: Options, rates: np.ndarray, checkpoint: Path | None) -> None:
        torch.manual_seed(options.seed)
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
        self.variables = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.variables, betas=(0.9, 0.999), eps=1e-8, weight_decay=options.weight_decay
        )
        if checkpoint is not None:
            load_optimizer(checkpoint, self.model, self.optimizer)

    def step(self, step: int, rows: Rows) -> float:
        torch.manual_seed(step_seed(self.options, step))
        self.model.train()
        loss = self.model(**tensors(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.variables, self.options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.rates[step])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.inference_mode()
    def evaluate(self, rows: Rows) -> tuple[float, tuple[np.ndarray, ...]]:
        self.model.eval()
        outputs = self.model(**tensors(rows), **self.task.arguments)
        return outputs.loss.item(), tuple(getattr(outputs, name).argmax(-1).numpy() for name in self.task.choices)

    def save(self, directory: Path) -> None:
        if self.model.lora_config is None:
            self.model.save_pretrained(directory)
        else:
            self.model.save_adapter(directory)
        save_optimizer(directory, self.model, self.optimizer)


def tensors(rows: Rows) -> dict[str, torch.Tensor]:
    """Rows as PyTorch takes them."""
    return {name: torch.from_numpy(column) for name, column in rows.items()}
