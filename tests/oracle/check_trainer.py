"""`transformers.Trainer` and `accelerate` take the PyTorch models as they are.

    make trainer        # in an environment of its own, with transformers 5

Trainer's steps, with accumulation and checkpointing, must end at the parameters of a plain loop over the same batches;
training resumed from its checkpoint must end where the uninterrupted one did; the heads must train in bfloat16
(transformers#31162, peft#236) and the saved model must load in this package and in `transformers`.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import OPTForCausalLM as TheirOPTForCausalLM
from transformers import Trainer, TrainingArguments

from opt_common import OPTConfig
from opt_torch import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification

CONFIG = OPTConfig(
    vocab_size=64,
    hidden_size=16,
    word_embed_proj_dim=12,
    do_layer_norm_before=False,
    num_hidden_layers=2,
    ffn_dim=32,
    max_position_embeddings=32,
    num_attention_heads=2,
    dropout=0.0,
    init_std=0.1,
    num_labels=3,
)
STEPS, BATCH, ACCUMULATED = 6, 2, 3
problems: list[str] = []


def expect(holds: bool, what: str) -> None:
    print(("ok    " if holds else "FAILS ") + what)
    if not holds:
        problems.append(what)


def rows() -> list[dict[str, torch.Tensor]]:
    """Texts with unequal numbers of labels, so that a mean of means shows."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(STEPS * BATCH * ACCUMULATED):
        ids = torch.from_numpy(np.cumsum(rng.integers(1, 3, 12)) + 4)
        labels = ids.clone()
        labels[: int(rng.integers(0, 9))] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def new_model(kind: type = OPTForCausalLM) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(CONFIG)


def arguments(directory: Path, **changes: object) -> TrainingArguments:
    settings = {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def plain_loop() -> torch.nn.Module:
    model, data = new_model().train(), rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for start in range(0, len(data), BATCH * ACCUMULATED):
        step = data[start : start + BATCH * ACCUMULATED]
        batch = {name: torch.stack([row[name] for row in step]) for name in step[0]}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    # Softmax does not see a key's bias: its gradient is rounding, which AdamW blows up.
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for (name, a), (_, b) in pairs if not name.endswith("k_proj.bias"))


def check_language_model(directory: Path) -> None:
    wanted = plain_loop()
    trainer = Trainer(
        model=new_model(),
        args=arguments(directory / "lm", activation_checkpointing=True),
        train_dataset=rows(),
        eval_dataset=rows()[:4],
    )
    trainer.train()
    expect(difference(trainer.model, wanted) < 1e-4, "Trainer's accumulated steps are those of whole batches")
    resumed = Trainer(model=new_model(), args=arguments(directory / "lm"), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(directory / "lm" / f"checkpoint-{STEPS // 2}"))
    expect(difference(resumed.model, trainer.model) < 1e-6, "training goes on from Trainer's checkpoint")
    metrics = trainer.evaluate()
    expect(0 < metrics["eval_loss"] < 5, f"evaluate: {metrics['eval_loss']:.3f}")
    expect(trainer.predict(rows()[:4]).predictions.shape == (4, 12, 64), "predict gives logits")
    trainer.model.save_pretrained(directory / "saved")
    ids = torch.stack([row["input_ids"] for row in rows()[:2]])
    ours = OPTForCausalLM.from_pretrained(directory / "saved")(input_ids=ids).logits
    theirs = TheirOPTForCausalLM.from_pretrained(directory / "saved")(input_ids=ids).logits
    expect(float((ours - theirs).abs().max()) < 1e-5, "the trained model, 350m-like, loads here and in transformers")


def check_heads(directory: Path) -> None:
    data = rows()
    ends = {"start_positions": torch.tensor(1), "end_positions": torch.tensor(40)}
    cases = {
        OPTForSequenceClassification: [
            {"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 3} for row in data
        ],
        OPTForQuestionAnswering: [
            {"input_ids": row["input_ids"], **ends, "end_positions": torch.tensor(2)} for row in data
        ],
    }
    for kind, examples in cases.items():
        trainer = Trainer(
            model=new_model(kind),
            args=arguments(directory / kind.__name__, bf16=True, save_strategy="no"),
            train_dataset=examples,
            eval_dataset=examples[:4],
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        expect(np.isfinite(after) and after < before, f"{kind.__name__} in bfloat16: {before:.3f} to {after:.3f}")


def check_accelerate(directory: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = new_model()
    loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loader)
    model.train()
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    expect(np.isfinite(losses).all() and losses[-1] < losses[0], f"accelerate: {losses[0]:.3f} to {losses[-1]:.3f}")
    accelerator.save_state(str(directory / "state"))
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(str(directory / "state"))
    same = all(torch.equal(a, b) for a, b in zip(trained, model.parameters(), strict=True))
    expect(same, "accelerate saves and loads the state")


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        check_language_model(directory)
        check_heads(directory)
        check_accelerate(directory)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
