"""How fast is it? This package's backends and their peers, in turns on one machine, against the machine's limit.

    python -m benchmarks.speed --work /some/dir --systems opt_torch opt_torch:float32:int8-dynamic hf_torch \\
        --python hf_torch=/env/of/transformers/bin/python --json speed.json --plot speed.svg

Each system is a process of its own (`speed_systems.py`), with a Python of its own where `--python` names one. Every
round asks each of them for each workload once, so that a ratio compares times of the same minute; the first round warms
up (and compiles) and is not counted. Reported is the median of the others.

The limit of decoding is the bytes of weights that a token needs over the bandwidth measured in the same rounds; that of
prefill and training the operations over the best float32 matrix rate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import make
from conversion import convert
from opt_common import OPTConfig
from opt_common.config import SIZES
from opt_common.workloads import BITS, DEFAULT_WORKLOADS, Workload, timing

FORMATS = {"hf_tf": "tf", "hf_flax": "flax", "ct2": "ct2"}
"""What a system reads, if not safetensors."""

LIMITS = ("bytes_per_s", "flops_per_s")
"""What is measured of the machine in each round."""


class Worker:
    """A system in its own process."""

    def __init__(self, name: str, python: str, path: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.speed_systems", name, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment(name),
        )
        self.start = self.read()

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Let it do one command."""
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self.read()

    def read(self) -> dict[str, Any]:
        """Its next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} has died; its own words are above.")
        return json.loads(line)

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def environment(name: str) -> dict[str, str]:
    """The environment of a system's process."""
    extra = {"hf_tf": {"TF_USE_LEGACY_KERAS": "1"}, "keras_hub_tf": {"KERAS_BACKEND": "tensorflow"}}
    extra["keras_hub_jax"] = {"KERAS_BACKEND": "jax"}
    return {**os.environ, **extra.get(name.partition(":")[0], {})}


def checkpoint_for(name: str, shape: str, work: Path, python: str) -> Path:
    """A checkpoint of a shape that a system reads."""
    source = make(work / shape, shape)
    wanted = FORMATS.get(name.partition(":")[0])
    if wanted is None:
        return source
    target = work / f"{shape}-{wanted}"
    if not target.exists() and wanted == "ct2":
        write_vocabulary(source)
        converter = Path(python).parent / "ct2-transformers-converter"
        subprocess.run([converter, "--model", source, "--output_dir", target], check=True)
    elif not target.exists():
        convert(source, target, to=wanted)
    return target


def write_vocabulary(directory: Path) -> None:
    """Write a tokenizer of made-up words, which CTranslate2's converter wants to see."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"word{index}" for index in range(4, 50265))]
    (directory / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds; seconds by workload and system, and the limits of each round."""
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    workers: list[Worker] = []
    for name in ["limit", *arguments.systems]:
        python = pythons.get(name.partition(":")[0], sys.executable)
        path = Path() if name == "limit" else checkpoint_for(name, arguments.shape, arguments.work, python)
        workers.append(Worker(name, python, path))
        print(f"{name}: loaded in {workers[-1].start['load']:.1f} s", file=sys.stderr)
    limits: list[dict[str, Any]] = []
    seconds: dict[str, dict[str, list[float]]] = {workload: {} for workload in arguments.workloads}
    for number in range(arguments.rounds + 1):
        limits.append(workers[0].ask({"workload": "limit"}))
        for workload in arguments.workloads:
            for worker in workers[1:]:
                reply = worker.ask({"workload": workload, "seed": number})
                if number and "seconds" in reply:
                    seconds[workload].setdefault(worker.name, []).append(reply["seconds"])
        print(f"round {number} of {arguments.rounds} done", file=sys.stderr)
    for worker in workers:
        worker.close()
    return {
        "shape": arguments.shape,
        "start": {worker.name: worker.start for worker in workers[1:]},
        "limits": limits[1:],
        "seconds": seconds,
    }


def summary(result: Mapping[str, Any], baseline: str | None) -> list[dict[str, Any]]:
    """A row for each workload and system: tokens a second, the ratio to the baseline and to the limit."""
    config = OPTConfig.from_size(result["shape"])
    bandwidth, rate = (statistics.median(limit[key] for limit in result["limits"]) for key in LIMITS)
    rows: list[dict[str, Any]] = []
    for workload, systems in result["seconds"].items():
        medians = {name: statistics.median(times) for name, times in systems.items()}
        for name, times in systems.items():
            bits = BITS.get(name.rpartition(":")[2], BITS["float32"])
            best = Workload.parse(workload).best_seconds(config, bits, bandwidth, rate)
            one = timing(workload, times, best)
            rows.append(
                {
                    "workload": workload,
                    "system": name,
                    "tokens_per_s": one.tokens_per_s,
                    "ratio": medians[baseline] / medians[name] if baseline in medians else None,
                    "of_limit": one.of_limit,
                    "spread": one.spread,
                }
            )
    return rows


def table(rows: Sequence[Mapping[str, Any]], baseline: str | None) -> str:
    """The rows as Markdown."""
    lines = [f"| workload | system | tokens/s | ÷ {baseline} | of the limit |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = (row["workload"], row["system"], f"{row['tokens_per_s']:.0f}", ratio, f"{row['of_limit']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of tokens a second, a panel for each workload."""
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure, panels = pyplot.subplots(1, len(workloads), figsize=(4.5 * len(workloads), 4), squeeze=False)
    for panel, workload in zip(panels[0], workloads, strict=True):
        shown = [row for row in rows if row["workload"] == workload]
        colors = ["tab:blue" if row["system"].startswith("opt_") else "tab:gray" for row in shown]
        bars = panel.barh([row["system"] for row in shown], [row["tokens_per_s"] for row in shown], color=colors)
        panel.bar_label(bars, fmt="%.0f", padding=3)
        panel.invert_yaxis()
        panel.set_title(workload)
        panel.set_xlabel("tokens/s")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="125m", choices=SIZES, help="shape of the model (default: 125m)")
    parser.add_argument("--systems", nargs="+", default=["opt_torch"], help="what to time")
    parser.add_argument("--workloads", nargs="+", default=list(DEFAULT_WORKLOADS), help="see `opt-torch bench --help`")
    parser.add_argument("--baseline", help="the system that ratios are to")
    parser.add_argument("--python", nargs="*", default=[], metavar="SYSTEM=PATH", help="the Python of a system")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--json", type=Path, help="write every measured time here")
    parser.add_argument("--plot", type=Path, help="write a plot here (.png or .svg; needs matplotlib)")
    arguments = parser.parse_args()
    result = run(arguments)
    rows = summary(result, arguments.baseline)
    if arguments.json:
        arguments.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
    print(table(rows, arguments.baseline))


if __name__ == "__main__":
    main()
