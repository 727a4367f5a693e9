"""Write the golden LoRA adapters: PEFT's own files for some variants, and what PEFT computes with them.

Needs the packages of `../oracle/requirements-peft.txt`, and nothing of this repository but its golden checkpoints:

    python tests/goldens/regenerate_lora.py [directory]
"""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

GOLDENS = Path(__file__).parent
CLASSES = {
    "CAUSAL_LM": transformers.OPTForCausalLM,
    "SEQ_CLS": transformers.OPTForSequenceClassification,
    "QUESTION_ANS": transformers.OPTForQuestionAnswering,
}
CASES = {
    "plain": ("pre_ln", {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "lora_dropout": 0.1}),
    "patterns": (
        "post_ln_proj",
        {
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"fc1": 3, r"layers\.0\.self_attn\.q_proj": 1},
            "alpha_pattern": {"project_in": 6},
            "bias": "all",
        },
    ),
    "layers": (
        "gelu",
        {
            "task_type": "CAUSAL_LM",
            "r": 2,
            "target_modules": ["k_proj", "fc2"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
            "bias": "lora_only",
        },
    ),
    "regex": (
        "untied",
        {
            "task_type": "CAUSAL_LM",
            "r": 2,
            "target_modules": r"lm_head|.*\.layers\.0\.(fc1|self_attn\.out_proj)",
            "modules_to_save": ["embed_positions", "final_layer_norm"],
        },
    ),
    "seqcls": ("pre_ln", {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["q_proj", "v_proj"]}),
    "qa": ("post_ln_proj", {"task_type": "QUESTION_ANS", "r": 2, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
}


def write_case(directory: Path, name: str) -> None:
    """Write one adapter and `expected.npz`."""
    variant, settings = CASES[name]
    settings = {**settings, "init_lora_weights": False}
    kind = CLASSES[settings["task_type"]]
    labels = {"num_labels": 3} if settings["task_type"] == "SEQ_CLS" else {}
    base = kind.from_pretrained(GOLDENS / variant / "safetensors", dtype=torch.float32, **labels)
    model = peft.get_peft_model(base.eval(), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.requires_grad:
                # B is kept small, so that float32's rounding stays what it is without an adapter.
                tensor.mul_(0.2 if "lora_B" in key else 1.0).add_(
                    torch.randn(tensor.shape, generator=generator), alpha=0.05
                )
    model.save_pretrained(directory / name)
    config_file = directory / name / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config |= {"base_model_name_or_path": variant, "target_modules": sorted_names(config["target_modules"])}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / name / "README.md").unlink()
    (directory / name / "adapter_model.safetensors").chmod(0o644)
    with np.load(GOLDENS / variant / "expected.npz") as golden:
        inputs = {field: golden[f"leftpad/{field}"][:2] for field in ("input_ids", "attention_mask")}
    values = {**inputs, **outputs(model, inputs)}
    merged = model.merge_and_unload()
    values |= {
        f"weights/{key}": tensor.numpy()
        for key, tensor in merged.state_dict().items()
        if ".layers.0.self_attn.q_proj" in key or ".layers.0.fc1" in key
    }
    np.savez_compressed(directory / name / "expected.npz", **values)


def sorted_names(names: list[str] | str) -> list[str] | str:
    """PEFT keeps names in a set, whose order is another one in every process."""
    return names if isinstance(names, str) else sorted(names)


def outputs(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The logits of a batch."""
    with torch.no_grad():
        found = model(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    names = [name for name in ("logits", "start_logits", "end_logits") if name in found]
    return {name: found[name].numpy() for name in names}


def main() -> None:
    """Write every case."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDENS / "lora"
    for name in CASES:
        write_case(directory, name)
        print(name, "of peft", peft.__version__, "and transformers", transformers.__version__)


if __name__ == "__main__":
    main()
