"""Do the files that `conversion` writes load in Hugging Face `transformers` 4.57.6, with the same logits?

Run in the environment of `requirements.txt`, with the project on PYTHONPATH:

    TF_USE_LEGACY_KERAS=1 PYTHONPATH=. python tests/oracle/check_transformers_loads.py [--goldens DIR] [--json FILE]

Every golden variant is converted to every format, in one file and in shards, and loaded by the class of that format;
safetensors by Flax's too. Printed is max |logits - golden| over attended positions, and what share of the tolerance
it is; for half precision the golden is the NumPy reference with the rounded weights. Bare decoders are compared by
their last hidden state. What a class cannot hold (see `conversion.convert.class_limits`) is left out. Exit code 1 if a
file does not load, a class reports missing or unexpected tensors, or a difference is above the tolerance. A quantised
checkpoint, of which transformers knows no tensor, must be refused by every class.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import transformers

from conversion import convert, open_checkpoint, save_checkpoint
from conversion.convert import class_limits
from opt_common.config import OPTConfig
from opt_common.hub import QUANTIZED
from opt_common.params import Parameter, parameter_table
from opt_common.quantization import StoredPart, quantize_rows
from opt_common.reference import forward

VARIANTS = (
    ("post_ln_proj", "base_safetensors"),
    ("pre_ln", "safetensors"),
    ("post_ln_proj", "safetensors"),
    ("gelu", "safetensors"),
    ("remove_final_ln", "safetensors"),
    ("untied", "safetensors"),
    ("no_bias_no_affine", "safetensors"),
    ("pre_ln", "safetensors_fp16"),
    ("pre_ln", "safetensors_bf16"),
)
"""Variant, and the folder whose tensors are converted."""

FORMATS = ("safetensors", "torch", "tf", "flax")
READERS = {"safetensors": ("torch", "flax"), "torch": ("torch",), "tf": ("tf",), "flax": ("flax",)}
"""Classes by format. transformers' TF class can't read safetensors in PyTorch's layout, its own files included
("'builtins.safe_open' object is not iterable"), and its Flax class no sharded safetensors."""
UNSUPPORTED = ("flax", "safetensors", "shards")
SHARD_SIZES = (None, "30KB")
ABSOLUTE, RELATIVE = 1e-5, 2e-6
"""A difference may be ABSOLUTE + RELATIVE * max |golden|: transformers' own frameworks differ that much in float32."""

GROUPS = ("nopad", "leftpad")


def logits_of_torch(directory: Path, ids: np.ndarray, mask: np.ndarray, *, bare: bool) -> tuple[np.ndarray, list[str]]:
    """What transformers' PyTorch class computes, and the tensors that it misses or does not know."""
    import torch

    torch_class = transformers.OPTModel if bare else transformers.OPTForCausalLM
    model, info = torch_class.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", torch_dtype=torch.float32
    )
    with torch.no_grad():
        output = model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask))
    return (output.last_hidden_state if bare else output.logits).numpy(), _reported(info)


def logits_of_tf(directory: Path, ids: np.ndarray, mask: np.ndarray, *, bare: bool) -> tuple[np.ndarray, list[str]]:
    """What transformers' TensorFlow class computes, and the tensors that it misses or does not know."""
    tf_class = transformers.TFOPTModel if bare else transformers.TFOPTForCausalLM
    model, info = tf_class.from_pretrained(directory, output_loading_info=True)
    output = model(ids, attention_mask=mask, training=False)
    return (output.last_hidden_state if bare else output.logits).numpy(), _reported(info)


def logits_of_flax(directory: Path, ids: np.ndarray, mask: np.ndarray, *, bare: bool) -> tuple[np.ndarray, list[str]]:
    """What transformers' Flax class computes. It raises where tensors are missing."""
    flax_class = transformers.FlaxOPTModel if bare else transformers.FlaxOPTForCausalLM
    model = flax_class.from_pretrained(directory)
    model.params = model.to_fp32(model.params)
    output = model(ids, attention_mask=mask)
    return np.asarray(output.last_hidden_state if bare else output.logits), []


Loader = Callable[..., tuple[np.ndarray, list[str]]]
LOADERS: dict[str, Loader] = {"torch": logits_of_torch, "tf": logits_of_tf, "flax": logits_of_flax}


def _reported(info: dict[str, Any]) -> list[str]:
    return [
        f"{kind}: {name}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in info.get(kind, ())
    ]


def golden(directory: Path, folder: str, group: str) -> np.ndarray:
    """The golden result of a group, for the weights of a folder."""
    if folder.endswith(("fp16", "bf16")):
        with open_checkpoint(directory / folder) as checkpoint, np.load(directory / "expected.npz") as arrays:
            params = {name: checkpoint.read(name) for name in checkpoint.names}
            ids, mask = arrays[f"{group}/input_ids"], arrays[f"{group}/attention_mask"]
            return forward(checkpoint.config, params, ids, mask).logits
    last = OPTConfig.from_json_file(directory / "config.json").num_hidden_layers
    with np.load(directory / "expected.npz") as arrays:
        return arrays[f"{group}/{f'hidden_states.{last}' if folder.startswith('base') else 'logits'}"]


def rows(goldens: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Convert, load and compare everything; one row for each combination."""
    for variant, folder in VARIANTS:
        source = goldens / variant / folder
        config = OPTConfig.from_json_file(source / "config.json")
        for format_name in FORMATS:
            for size in SHARD_SIZES:
                target = scratch / f"{variant}-{folder}-{format_name}-{size}"
                convert(source, target, to=format_name, max_shard_size=size)
                files = "shards" if any(target.glob("*.index.json")) else "single"
                for framework in READERS[format_name]:
                    if any(class_limits(config, framework)) or (framework, format_name, files) == UNSUPPORTED:
                        continue
                    yield {
                        "variant": variant,
                        "source": folder,
                        "format": format_name,
                        "files": files,
                        "class": framework,
                        **compare(goldens / variant, folder, target, framework),
                    }


def compare(variant: Path, folder: str, target: Path, framework: str) -> dict[str, Any]:
    """Load one checkpoint in one framework and compare it with the goldens."""
    largest, share, reported = 0.0, 0.0, []
    with np.load(variant / "expected.npz") as expected:
        for group in GROUPS:
            ids, mask = expected[f"{group}/input_ids"], expected[f"{group}/attention_mask"]
            try:
                result, reported = LOADERS[framework](target, ids, mask, bare=folder.startswith("base"))
            except (OSError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
                return {
                    "max_difference": float("nan"),
                    "of_tolerance": float("nan"),
                    "reported": [f"{type(error).__name__}: {error}"],
                }
            wanted = golden(variant, folder, group)
            difference = np.abs(result - wanted)[mask.astype(bool)].max()
            largest = max(largest, float(difference))
            share = max(share, float(difference / (ABSOLUTE + RELATIVE * np.abs(wanted).max())))
    return {"max_difference": largest, "of_tolerance": share, "reported": reported}


def misread(source: Path, target: Path) -> list[str]:
    """Quantise a checkpoint; the frameworks whose class loads the result, as something else than it is."""
    with open_checkpoint(source) as checkpoint:

        def read(parameter: Parameter) -> np.ndarray[Any, Any]:
            if isinstance(parameter, StoredPart):
                return quantize_rows(checkpoint.read(parameter.whole.name))[parameter.index]
            return checkpoint.read(parameter.name)

        config = checkpoint.config.replace(quantization="int8")
        save_checkpoint(target, config, parameter_table(config), read, format=QUANTIZED, dtype="float32")
    ids = np.ones((1, 4), np.int64)
    found: list[str] = []
    for framework, load in LOADERS.items():
        try:
            load(target, ids, ids, bare=False)
        except OSError as error:
            print(f"{framework}: a quantised checkpoint is refused: {str(error)[:120]}")
        else:
            found.append(framework)
    return found


def main() -> int:
    """Print the table; 1 if a row is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=Path(__file__).parents[1] / "goldens")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(arguments.goldens, Path(scratch)):
            results.append(row)
            print(
                f"{row['variant']:18} {row['source']:17} {row['format']:11} {row['files']:7} {row['class']:6} "
                f"{row['max_difference']:.1e} {row['of_tolerance']:5.0%} {'; '.join(row['reported'])[:200]}",
                flush=True,
            )
        unnoticed = misread(arguments.goldens / "pre_ln" / "safetensors", Path(scratch) / "quantized")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [row for row in results if row["reported"] or not row["of_tolerance"] <= 1]
    print(
        f"{len(results)} loads, {len(wrong)} wrong; largest difference {max(r['max_difference'] for r in results):.1e}"
    )
    if unnoticed:
        print(f"a quantised checkpoint is loaded without an error by: {', '.join(unnoticed)}")
    return 1 if wrong or unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
