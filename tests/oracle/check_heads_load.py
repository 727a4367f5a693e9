"""Do the head checkpoints that `conversion` writes load in Hugging Face `transformers` 4.57.6, with the same logits?

Run like `check_transformers_loads.py`. PyTorch is the only framework with such classes there; so that the other formats
are tried too, each checkpoint has been through one of them. Exit code 1 if a class reports missing or unexpected
tensors, or a difference is above the tolerance.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from conversion import convert

CLASSES = {
    transformers.OPTForSequenceClassification: ("score", {"logits": "seqcls_logits"}),
    transformers.OPTForQuestionAnswering: (
        "qa_outputs",
        {"start_logits": "qa_start_logits", "end_logits": "qa_end_logits"},
    ),
}
GROUPS = ("nopad", "rightpad", "leftpad", "midpad", "padtok", "len1")
ABSOLUTE = 1e-5


def write_source(variant: Path, name: str, module: str, directory: Path) -> None:
    """A checkpoint of a variant's decoder with one of its heads, by the safetensors library."""
    directory.mkdir()
    heads = load_file(variant / "heads.safetensors")
    tensors = load_file(variant / "safetensors" / "model.safetensors")
    tensors |= {key: tensor for key, tensor in heads.items() if key.startswith(module)}
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((variant / "config.json").read_text()) | {"architectures": [name]}
    labels = {str(index): f"LABEL_{index}" for index in range(len(heads["score.weight"]))}
    config |= {"id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}
    (directory / "config.json").write_text(json.dumps(config))


def loads(source: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """The checkpoint in the formats of PyTorch, in one file and in shards, by way of the other two formats."""
    for way in ("tf", "flax"):
        convert(source, scratch / way, way)
        for format_name in ("safetensors", "torch"):
            for size in (None, "70KB"):
                target = scratch / f"{way}-{format_name}-{size}"
                convert(scratch / way, target, format_name, max_shard_size=size)
                yield target.name, target


def compare(variant: Path, model: torch.nn.Module, fields: dict[str, str]) -> float:
    """Largest difference from the goldens; of logits by position, where the mask is 1."""
    largest = 0.0
    with np.load(variant / "heads_expected.npz") as expected, torch.no_grad():
        for group in GROUPS:
            mask = expected[f"{group}/attention_mask"]
            ids = torch.from_numpy(expected[f"{group}/input_ids"])
            output = model(input_ids=ids, attention_mask=torch.from_numpy(mask))
            for field, golden in fields.items():
                difference = np.abs(getattr(output, field).numpy() - expected[f"{group}/{golden}"])
                difference = difference if field == "logits" else difference[mask == 1]
                largest = max(largest, float(difference.max()))
    return largest


def main() -> int:
    """Print a row for each load; 1 if one is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=Path(__file__).parents[1] / "goldens")
    goldens = parser.parse_args().goldens
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}")
    wrong = 0
    for variant in (goldens / "pre_ln", goldens / "post_ln_proj"):
        for head, (module, fields) in CLASSES.items():
            with tempfile.TemporaryDirectory() as scratch:
                write_source(variant, head.__name__, module, Path(scratch) / "source")
                for name, target in loads(Path(scratch) / "source", Path(scratch)):
                    model, reported = head.from_pretrained(
                        target, output_loading_info=True, attn_implementation="eager"
                    )
                    difference = compare(variant, model.eval(), fields)
                    wrong += any(reported.values()) or not difference <= ABSOLUTE
                    print(f"{variant.name:14} {head.__name__:28} {name:24} {difference:.1e}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
