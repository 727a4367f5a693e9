"""How long a forward pass takes on a CUDA device, by sequence length: attention kernels, ours and Hugging Face's.

    python -m benchmarks.attention_cuda --json attention.json --plot attention.svg    # with transformers: peers, too
    python -m benchmarks.attention_cuda --shapes 350m --lengths 512 1024 --dtype bfloat16

Weights are random, in float16 unless said otherwise; the models are built on the device. Each round times every kernel
once, by the device's own clock; the first round warms up and is not counted. Reported is the median, and the ratio to
Hugging Face's "eager" (to ours, where `transformers` is not installed). A kernel whose package is absent is left out.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opt_common import OPTConfig
from opt_torch import OPTModel

KERNELS = ("eager", "sdpa", "flash_attention_2")
OWN, PEER = "opt_torch", "hf_torch"


def systems() -> list[tuple[str, str]]:
    """Library and kernel of everything that can be timed in this environment."""
    kernels = [kernel for kernel in KERNELS if kernel != "flash_attention_2" or importlib.util.find_spec("flash_attn")]
    libraries = [OWN, *([PEER] if importlib.util.find_spec("transformers") else [])]
    return [(library, kernel) for library in libraries for kernel in kernels]


def build(library: str, kernel: str, shape: str, dtype: torch.dtype) -> Any:
    """A decoder of a published shape on the device."""
    config = OPTConfig.from_size(shape)
    if library == OWN:
        return OPTModel(config, attn_implementation=kernel, dtype=dtype, device="cuda").eval()
    import transformers

    peer_config = transformers.OPTConfig(**config.to_dict())
    with torch.device("cuda"):
        model = transformers.AutoModel.from_config(peer_config, attn_implementation=kernel, dtype=dtype)
    return model.eval()


def milliseconds(model: Any, ids_BT: torch.Tensor) -> float:
    """Time of one forward pass."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    model(input_ids=ids_BT, use_cache=False)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(shape: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each system and length."""
    dtype = getattr(torch, arguments.dtype)
    models = {system: build(*system, shape, dtype) for system in systems()}
    rows: list[dict[str, Any]] = []
    for length in arguments.lengths:
        ids_BT = torch.randint(4, 50000, (arguments.batch, length), device="cuda")
        times: dict[tuple[str, str], list[float]] = {system: [] for system in models}
        for number in range(arguments.rounds + 1):
            for system, model in models.items():
                time = milliseconds(model, ids_BT)
                if number:
                    times[system].append(time)
        medians = {system: statistics.median(values) for system, values in times.items()}
        baseline = medians.get((PEER, "eager"), medians[OWN, "eager"])
        rows += [
            {
                "shape": shape,
                "length": length,
                "system": f"{library}:{kernel}",
                "milliseconds": median,
                "ratio": baseline / median,
            }
            for (library, kernel), median in medians.items()
        ]
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| shape | length | system | ms | ÷ eager |", "| --- | ---: | --- | ---: | ---: |"]
    lines += [
        f"| {row['shape']} | {row['length']} | {row['system']} | {row['milliseconds']:.2f} | {row['ratio']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Ratios by length, a panel for each shape."""
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        shown = [row for row in rows if row["shape"] == shape]
        for system in dict.fromkeys(row["system"] for row in shown):
            own = [row for row in shown if row["system"] == system]
            panel.plot([row["length"] for row in own], [row["ratio"] for row in own], marker="o", label=system)
        panel.set_title(shape)
        panel.set_xlabel("sequence length")
        panel.set_ylabel("times as fast as eager")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2.7b", "350m"], help="published shapes (default: 2.7b 350m)")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=4, help="rows (default: 4)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--plot", type=Path, help="write a plot here (.png or .svg; needs matplotlib)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device, and PyTorch sees none. Run it on a machine with an NVIDIA GPU.")
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for shape in arguments.shapes:
            rows += measure(shape, arguments)
            gc.collect()
            torch.cuda.empty_cache()
    if arguments.json:
        result = {"device": torch.cuda.get_device_name(), "dtype": arguments.dtype, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
    print(table(rows))


if __name__ == "__main__":
    main()
