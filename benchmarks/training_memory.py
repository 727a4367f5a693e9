"""Peak memory of one training step at the shape of OPT-125m, ours and Hugging Face's, one process a measurement.

    python -m benchmarks.training_memory [--out figures.json]    # in an environment with transformers, too
    python -m benchmarks.training_memory --only ours/checkpointing,transformers/checkpointing

Figures are mebibytes of resident memory: the process's peak during a step of AdamW whose moments are there already,
less what it held after the imports. Weights are random; the numbers in them do not matter for memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES = ("ours", "ours/checkpointing", "transformers", "transformers/checkpointing")
SIZE, BATCH, LENGTH = "125m", 8, 512
MEBIBYTE = 2**20


def model_of(case: str) -> Any:
    """A new model in training mode."""
    if case.startswith("ours"):
        from opt_common import OPTConfig
        from opt_torch import OPTForCausalLM

        model = OPTForCausalLM(OPTConfig.from_size(SIZE))
    else:
        from transformers import OPTConfig, OPTForCausalLM  # whose defaults are the shape of 125m

        model = OPTForCausalLM(OPTConfig(attn_implementation="sdpa", use_cache=False))
    if case.endswith("checkpointing"):
        model.gradient_checkpointing_enable()
    return model.train()


def resident() -> int:
    """Bytes of memory that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(case: str) -> dict[str, float]:
    """Figures of one case, in this process."""
    import torch

    torch.manual_seed(0)
    model = model_of(case)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    baseline = resident() - weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():  # makes the moments, which the first step would make at its end
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ids = torch.randint(4, 50000, (BATCH, LENGTH))
    started = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak_mib": round((peak - baseline) / MEBIBYTE),
        "weights_mib": round(weights / MEBIBYTE),
        "seconds": round(time.perf_counter() - started, 1),
        "loss": float(loss.detach()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas between them")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to standard output")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return 0
    figures = {"size": SIZE, "batch": BATCH, "length": LENGTH, "cases": {}}
    for case in arguments.only.split(","):
        command = [sys.executable, "-m", "benchmarks.training_memory", "--case", case]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        figures["cases"][case] = json.loads(result.stdout.splitlines()[-1])
    text = json.dumps(figures, indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
