"""Does PEFT work with the PyTorch models as they are, and do the adapters that the three backends write load in PEFT?

Run by `make peft`, in an environment of its own:

    python tests/oracle/check_peft.py DIRECTORY      # what write_adapters.py wrote

`get_peft_model` on our classes: training, generation, saving, loading into our `load_adapter`, merging. Each written
adapter: PEFT on our model and on transformers' own, with the outputs of the framework that wrote it. Exit code 1 if
something isn't right.
"""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

import opt_torch
from opt_common import LoraConfig, OPTError
from opt_torch.bits_and_bytes import quantize_base

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 5e-5
CASES = {
    "plain": ("pre_ln", "CAUSAL_LM"),
    "patterns": ("post_ln_proj", "CAUSAL_LM"),
    "layers": ("gelu", "CAUSAL_LM"),
    "regex": ("untied", "CAUSAL_LM"),
    "seqcls": ("pre_ln", "SEQ_CLS"),
    "qa": ("post_ln_proj", "QUESTION_ANS"),
}
OURS = {
    "CAUSAL_LM": opt_torch.OPTForCausalLM,
    "SEQ_CLS": opt_torch.OPTForSequenceClassification,
    "QUESTION_ANS": opt_torch.OPTForQuestionAnswering,
    "FEATURE_EXTRACTION": opt_torch.OPTModel,
}
THEIRS = {
    "CAUSAL_LM": transformers.OPTForCausalLM,
    "SEQ_CLS": transformers.OPTForSequenceClassification,
    "QUESTION_ANS": transformers.OPTForQuestionAnswering,
}
FIELDS = ("logits", "start_logits", "end_logits")


def load(variant: str, task: str, *, ours: bool) -> torch.nn.Module:
    """A golden variant in one of our classes or of transformers'."""
    path = GOLDENS / variant / "safetensors"
    labels = {"num_labels": 3} if task == "SEQ_CLS" else {}
    if not ours:
        return THEIRS[task].from_pretrained(path, dtype=torch.float32, **labels).eval()
    new = {"new_head": True} if task in ("SEQ_CLS", "QUESTION_ANS") else {}
    return OURS[task].from_pretrained(path, **new, **labels)


def batch(case: str) -> dict[str, torch.Tensor]:
    """The golden batch of a case."""
    with np.load(GOLDENS / "lora" / case / "expected.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask")}


def difference(output: object, expected: dict[str, np.ndarray], mask: torch.Tensor) -> float:
    """Largest difference of the outputs, where the mask is 1 if they have a position."""
    largest = 0.0
    for name, values in expected.items():
        found = np.abs(getattr(output, name).detach().numpy() - values)
        largest = max(
            largest,
            float((found[mask.numpy() == 1] if len(values) and values.shape[:2] == mask.shape else found).max()),
        )
    return largest


def check_written(directory: Path) -> Iterator[tuple[str, float]]:
    """Each adapter that a framework wrote, in PEFT on both models."""
    for framework in sorted(path.name for path in directory.iterdir()):
        for case, (variant, task) in CASES.items():
            inputs = batch(case)
            with np.load(directory / framework / case / "outputs.npz") as arrays:
                expected = dict(arrays)
            for ours in (True, False):
                model = peft.PeftModel.from_pretrained(load(variant, task, ours=ours), directory / framework / case)
                with torch.no_grad():
                    output = model.eval()(**inputs)
                whose = "ours" if ours else "transformers'"
                yield f"{framework}'s {case} in PEFT on {whose}", difference(output, expected, inputs["attention_mask"])


def check_peft_model(task: str) -> Iterator[tuple[str, float]]:
    """`get_peft_model` on one of our classes: train, save, load in ours, merge."""
    torch.manual_seed(0)
    model = peft.get_peft_model(load("pre_ln", task, ours=True), peft.LoraConfig(task_type=task, r=4, bias="lora_only"))
    inputs = batch("plain")
    targets = {
        "CAUSAL_LM": {"labels": inputs["input_ids"]},
        "SEQ_CLS": {"labels": torch.tensor([0, 2])},
        "QUESTION_ANS": {"start_positions": torch.tensor([3, 4]), "end_positions": torch.tensor([5, 4])},
        "FEATURE_EXTRACTION": {},
    }[task]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        output = model(**inputs, **targets)
        loss = output.loss if targets else output.last_hidden_state.square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    yield f"{task}: the loss falls from {losses[0]:.3f} to {losses[-1]:.3f}", float(losses[-1] >= losses[0])
    model.eval()
    with torch.no_grad():
        output = model(**inputs)
    names = [name for name in (*FIELDS, "last_hidden_state") if getattr(output, name, None) is not None]
    expected = {name: getattr(output, name).numpy() for name in names}
    mask = inputs["attention_mask"]
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        loaded = load("pre_ln", task, ours=True)
        loaded.load_adapter(scratch)
        with torch.no_grad():
            yield f"{task}: PEFT's adapter in load_adapter", difference(loaded(**inputs), expected, mask)
    if task == "CAUSAL_LM":
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        ours = loaded.generate(**inputs, max_new_tokens=6, do_sample=False)
        yield f"{task}: generate through PEFT", float(not torch.equal(ids, ours))
    merged = model.merge_and_unload()
    plain = load("pre_ln", task, ours=True)
    yield f"{task}: names after merge_and_unload", float(merged.state_dict().keys() != plain.state_dict().keys())
    with torch.no_grad():
        yield f"{task}: merge_and_unload", difference(merged(**inputs), expected, mask)
    loaded.merge_and_unload()
    weights = zip(merged.state_dict().values(), loaded.state_dict().values(), strict=True)
    yield f"{task}: its weights are ours", max(float((a - b).abs().max()) for a, b in weights)


def check_quantized(bits: int) -> Iterator[tuple[str, float]]:
    """Base weights by bitsandbytes: what the layers compute, training of ours and PEFT's adapters on them, refusals."""
    inputs = batch("plain")
    model = opt_torch.OPTForCausalLM.from_pretrained("opt-tiny")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_base(model, bits=bits)
    layer = model.model.decoder.layers[0].fc1
    stored = layer.weight.numel() * layer.weight.element_size()
    weight = weights["model.decoder.layers.0.fc1.weight"]
    yield (
        f"{bits} bits: a weight of {weight.numel()} numbers takes {stored} bytes",
        float(stored * 8 > weight.numel() * bits),
    )
    rounded = layer(torch.eye(layer.in_features)).detach().T - layer.bias.detach()[:, None]
    worst = float((rounded - weight).abs().max() / weight.abs().max())
    yield (
        f"{bits} bits: rounding of a weight is {worst:.3f} of its largest number",
        float(worst > (0.02 if bits == 8 else 0.2)),
    )
    embedding = model.model.decoder.embed_tokens.weight
    yield (
        f"{bits} bits: embeddings stay",
        float(not torch.equal(embedding, weights["model.decoder.embed_tokens.weight"])),
    )
    for refused in (lambda: model.save_pretrained(tempfile.mkdtemp() + "/x"), lambda: quantize_base(model, bits=8)):
        try:
            refused()
        except OPTError as error:
            yield f"{bits} bits: refused: {error}", 0.0
        else:
            yield f"{bits} bits: not refused", 1.0
    model.add_lora(LoraConfig(r=4, target_modules="all-linear"))
    yield from falls(f"{bits} bits, our adapter", model, inputs)
    yield f"{bits} bits: generates", float(model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] < 4)
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        expected = {"logits": model.eval()(**inputs).logits.numpy()}
        model.save_adapter(scratch)
        again = opt_torch.OPTForCausalLM.from_pretrained("opt-tiny")
        quantize_base(again, bits=bits)
        theirs = peft.PeftModel.from_pretrained(again, scratch).eval()
        yield f"{bits} bits: our adapter in PEFT", difference(theirs(**inputs), expected, inputs["attention_mask"])
    base = opt_torch.OPTForCausalLM.from_pretrained("opt-tiny")
    quantize_base(base, bits=bits)
    theirs = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(base), peft.LoraConfig(task_type="CAUSAL_LM", r=4)
    )
    yield from falls(f"{bits} bits, PEFT's adapter", theirs, inputs)


def falls(what: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    """Some steps of training."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    yield f"{what}: the loss falls from {losses[0]:.3f} to {losses[-1]:.3f}", float(losses[-1] > losses[0] - 0.3)


def main() -> int:
    """Print a row for each check; 1 if one is not right."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(f"peft {peft.__version__}, transformers {transformers.__version__}")
    wrong = 0
    rows = [row for task in OURS for row in check_peft_model(task)]
    rows += check_written(Path(sys.argv[1]))
    rows += [row for bits in (8, 4) for row in check_quantized(bits)]
    for what, value in rows:
        wrong += not value <= TOLERANCE
        print(f"{'ok' if value <= TOLERANCE else 'WRONG':6} {value:.1e}  {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
