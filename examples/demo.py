"""The main job in one run: the bundled model writes the same text in three frameworks, and survives a round trip.

It needs no network. The exit code is 1 if a text, a logit, a tensor or a byte differs.
"""

import itertools
import os
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

# Read when TensorFlow is imported: no notes about the machine on standard error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from conversion import convert, open_checkpoint, verify
from opt_common import OPTTokenizer, reference
from opt_common.hub import FORMATS, resolve

MODEL = "opt-tiny"
PROMPT = "Once upon a time"
NEW_TOKENS = 40
TOLERANCE = 1e-4
"""Largest |logits - reference| that float32 rounding explains in a model of this size; a mistake is far above it."""

ROUND_TRIP = ("torch", "tf", "flax", "torch")


def load_models() -> dict[str, tuple[Any, str]]:
    """Framework -> the model in it, and the name of its arrays for the tokenizer."""
    from opt_flax import FlaxOPTForCausalLM
    from opt_tf import TFOPTForCausalLM
    from opt_torch import OPTForCausalLM

    return {
        "PyTorch": (OPTForCausalLM.from_pretrained(MODEL, dtype="float32"), "pt"),
        "TensorFlow": (TFOPTForCausalLM.from_pretrained(MODEL, dtype="float32"), "tf"),
        "JAX": (FlaxOPTForCausalLM.from_pretrained(MODEL, dtype="float32"), "jax"),
    }


def reference_logits(ids: np.ndarray) -> np.ndarray:
    """Logits of the bundled model, computed by the NumPy reference in float64."""
    with open_checkpoint(resolve(MODEL)) as checkpoint:
        params = {name: checkpoint.read(name) for name in checkpoint.names}
        return reference.forward(checkpoint.config, params, ids).logits


def generate() -> bool:
    """Continue the prompt in each framework; whether all agree with each other and with the reference."""
    tokenizer = OPTTokenizer.from_pretrained(MODEL)
    texts: dict[str, str] = {}
    differences: dict[str, float] = {}
    for framework, (model, tensors) in load_models().items():
        inputs = tokenizer([PROMPT], return_tensors=tensors)
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        logits = model(ids).logits
        logits = np.asarray(logits.detach() if framework == "PyTorch" else logits)
        differences[framework] = float(np.abs(logits - reference_logits(np.asarray(ids))).max())
        texts[framework] = tokenizer.batch_decode(np.asarray(ids), skip_special_tokens=True)[0]
        print(textwrap.fill(texts[framework], 100, initial_indent=f"{framework:12}", subsequent_indent=" " * 12))

    same = len(set(texts.values())) == 1
    print(f"\n{'framework':12}{'text':12}max |logits - NumPy float64 reference|")
    for framework, difference in differences.items():
        verdict = "the same" if texts[framework] == texts["PyTorch"] else "OTHER"
        print(f"{framework:12}{verdict:12}{difference:.1e}{'' if difference <= TOLERANCE else '  TOO LARGE'}")
    return same and max(differences.values()) <= TOLERANCE


def round_trip(scratch: Path) -> bool:
    """Convert the bundled model around the frameworks; whether nothing changed, down to the bytes of the file."""
    first = scratch / "torch-before"
    convert(resolve(MODEL), first, to="torch")
    right, source = True, first
    print(f"\n{'converted':16}{'tensors':24}max |logits - before|")
    for old, new in itertools.pairwise(ROUND_TRIP):
        target = scratch / f"{new}-after"
        convert(source, target, to=new)
        report = verify(target, first, function=True)
        equal = sum(check.verdict == "equal" for check in report.checks)
        changed = report.function.logits if report.function else float("nan")
        right &= report.holds and equal == report.tensors and changed == 0
        print(f"{f'{old} -> {new}':16}{f'{equal} of {report.tensors} bit-equal':24}{changed:.1e}")
        source = target
    name = FORMATS["torch"].single
    same = (first / name).read_bytes() == (source / name).read_bytes()
    print(f"{name}: {'the same bytes before and after' if same else 'OTHER BYTES after than before'}")
    return right and same


def main() -> int:
    """Run both halves; 0 if all is equal."""
    right = generate()
    with tempfile.TemporaryDirectory() as scratch:
        right &= round_trip(Path(scratch))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
