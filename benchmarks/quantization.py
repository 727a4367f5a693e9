"""What few bits cost in quality: perplexity of the bundled model on made-up stories that it has not seen.

python -m benchmarks.quantization                      # all that PyTorch has
python -m benchmarks.quantization --framework flax     # or tf
"""

import argparse
import importlib
from typing import Any

import numpy as np

from examples.opt_tiny.corpus import stories
from opt_common import OPTTokenizer

STORIES, SEED = 60, 999
"""How many stories, and of which seed: the model was trained on another one."""

CLASSES = {"torch": "OPTForCausalLM", "tf": "TFOPTForCausalLM", "flax": "FlaxOPTForCausalLM"}


def perplexity(framework: str, scheme: str | None) -> float:
    """Perplexity a token, each story read alone."""
    model = getattr(importlib.import_module(f"opt_{framework}"), CLASSES[framework]).from_pretrained(
        "opt-tiny", quantization=scheme
    )
    tokenizer = OPTTokenizer.from_pretrained("opt-tiny")
    total = count = 0
    for text in stories(STORIES, seed=SEED):
        ids = np.asarray(tokenizer([text])["input_ids"])[:, : model.config.max_position_embeddings]
        total += loss(framework, model, ids) * (ids.size - 1)
        count += ids.size - 1
    return float(np.exp(total / count))


def loss(framework: str, model: Any, ids: np.ndarray) -> float:
    """Mean cross-entropy of a story's tokens."""
    if framework != "torch":
        return float(model(input_ids=ids, labels=ids).loss)
    import torch

    with torch.no_grad():
        rows = torch.from_numpy(ids)
        return float(model(input_ids=rows, labels=rows).loss)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=list(CLASSES), default="torch")
    framework = parser.parse_args().framework
    plain = perplexity(framework, None)
    print(f"| | perplexity | change |\n| --- | ---: | ---: |\n| float32 | {plain:.4f} | |")
    for scheme in importlib.import_module(f"opt_{framework}.quantized").AVAILABLE:
        found = perplexity(framework, scheme)
        print(f'| `"{scheme}"` | {found:.4f} | {100 * (found / plain - 1):+.2f} % |')


if __name__ == "__main__":
    main()
