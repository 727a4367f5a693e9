"""How fast is it? This package's backends and their peers, in turns on one machine, against the machine's limit.

    python -m benchmarks.speed --work /some/dir --systems opt_torch opt_torch:float32:int8-dynamic hf_torch \\
        --python hf_torch=/env/of/transformers/bin/python --json speed.json --plot speed.svg

Each system is a process of its own (`speed_systems.py`), with a Python of its own where `--python` names one. Every
round asks each of them for each workload once, so that a ratio compares times of the same minute; the first round warms
up (and compiles) and is not counted. Reported is the median of the others: tokens a second, the ratio to the baseline
(more is faster), the share of the limit. With `--starts`, each round starts new processes.

The limit of decoding is the bytes of the matrices that a token reads over the bandwidth measured in the same rounds;
that of prefill and training their operations over the best float32 matrix rate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import make
from conversion import convert
from opt_common import OPTConfig
from opt_common.config import SIZES
from opt_common.hub import QUANTIZED
from opt_common.workloads import BITS, DEFAULT_WORKLOADS, Workload, timing

FORMATS = {"hf_tf": "tf", "hf_flax": "flax", "ct2": "ct2"}
"""What a system reads, if not safetensors."""

SAVE_QUANTIZED = """\
import sys
from opt_torch import OPTForCausalLM

source, target, bits = sys.argv[1:]
OPTForCausalLM.from_pretrained(source, dtype="float32", quantization=bits).save_pretrained(target)
"""
"""A program that rounds a checkpoint and saves it."""

STARTS = ("import", "first logits")
"""What new processes are timed on, in place of workloads."""

FIRST_LOGITS = "prefill:1x8"
"""What is computed first there."""

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
    return {**os.environ, **extra.get(name.partition(":")[0].partition("@")[0], {})}


def checkpoint_for(name: str, shape: str, stored: str, work: Path, python: str) -> Path:
    """A checkpoint of a shape, stored in a dtype, in the format that a system reads."""
    kind, _, wanted = name.partition(":")[0].partition("@")
    wanted = wanted or FORMATS.get(kind, "safetensors")
    source = make(work / f"{shape}-{stored}", shape, dtype=stored)
    target = work / f"{shape}-{stored}-{wanted}"
    if wanted == "safetensors":
        return source
    if wanted == QUANTIZED:
        bits = name.split(":")[2]
        target = target.with_name(f"{target.name}-{bits}")
        if not target.exists():
            subprocess.run([sys.executable, "-c", SAVE_QUANTIZED, source, target, bits], check=True)
        return target
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


def workers_of(arguments: argparse.Namespace, names: Sequence[str]) -> Iterator[Worker]:
    """The processes of some systems, started one after the other."""
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    for name in names:
        python = pythons.get(name.partition(":")[0].partition("@")[0], sys.executable)
        path = Path()
        if name != "limit":
            path = checkpoint_for(name, arguments.shape, arguments.stored, arguments.work, python)
        yield Worker(name, python, path)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds; seconds by workload and system, the limits of each round, and the most memory of each system."""
    workers = list(workers_of(arguments, ["limit", *arguments.systems]))
    limits: list[dict[str, Any]] = []
    seconds: dict[str, dict[str, list[float]]] = {workload: {} for workload in arguments.workloads}
    peaks: dict[str, int] = {}
    for number in range(arguments.rounds + 1):
        limits.append(workers[0].ask({"workload": "limit"}))
        for workload in arguments.workloads:
            for worker in workers[1:]:
                reply = worker.ask({"workload": workload, "seed": number})
                peaks[worker.name] = reply["peak_bytes"]
                if number and "seconds" in reply:
                    seconds[workload].setdefault(worker.name, []).append(reply["seconds"])
        print(f"round {number} of {arguments.rounds} done", file=sys.stderr)
    for worker in workers:
        worker.close()
    return {**described(arguments), "limits": limits[1:], "peak_bytes": peaks, "seconds": seconds}


def run_starts(arguments: argparse.Namespace) -> dict[str, Any]:
    """New processes in each round: seconds of the import, and from there to the first logits."""
    seconds: dict[str, dict[str, list[float]]] = {workload: {} for workload in STARTS}
    peaks: dict[str, int] = {}
    for number in range(arguments.rounds + 1):
        for worker in workers_of(arguments, arguments.systems):
            reply = worker.ask({"workload": FIRST_LOGITS, "seed": number})
            peaks[worker.name] = reply["peak_bytes"]
            worker.close()
            if number:
                found = {"import": worker.start["import"], "first logits": worker.start["load"] + reply["seconds"]}
                for workload in STARTS:
                    seconds[workload].setdefault(worker.name, []).append(found[workload])
        print(f"round {number} of {arguments.rounds} done", file=sys.stderr)
    return {**described(arguments), "limits": [], "peak_bytes": peaks, "seconds": seconds}


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for."""
    return {"shape": arguments.shape, "stored": arguments.stored, "baseline": arguments.baseline}


def summary(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each workload and system: its median, the ratio to the baseline's, the share of the limit."""
    config, baseline = OPTConfig.from_size(result["shape"]), result["baseline"]
    rows: list[dict[str, Any]] = []
    for workload, systems in result["seconds"].items():
        medians = {name: statistics.median(times) for name, times in systems.items()}
        for name, times in systems.items():
            row: dict[str, Any] = {
                "workload": workload,
                "system": name,
                "seconds": medians[name],
                "spread": (max(times) - min(times)) / medians[name],
                "ratio": medians[baseline] / medians[name] if baseline in medians else None,
            }
            if workload not in STARTS:
                bandwidth, rate = (statistics.median(limit[key] for limit in result["limits"]) for key in LIMITS)
                bits = BITS.get(name.rpartition(":")[2], BITS["float32"])
                one = timing(workload, times, Workload.parse(workload).best_seconds(config, bits, bandwidth, rate))
                row |= {"tokens_per_s": one.tokens_per_s, "of_limit": one.of_limit}
            rows.append(row)
    return rows


def table(result: Mapping[str, Any]) -> str:
    """The medians as Markdown, a system a line, a workload a column."""
    workloads = list(result["seconds"])
    cells: dict[str, dict[str, str]] = {}
    for row in summary(result):
        speed = f"{row['tokens_per_s']:.0f}" if "tokens_per_s" in row else f"{row['seconds']:.2f} s"
        parts = [speed, *([] if row["ratio"] is None else [f"**{row['ratio']:.2f}**"])]
        parts += [f"{row['of_limit']:.2f}"] if row.get("of_limit") else []
        cells.setdefault(row["system"], {})[row["workload"]] = " · ".join(parts)
    peaks = {name: f"{peak / 1e9:.2f} GB" for name, peak in result["peak_bytes"].items()}
    lines = [f"| system | {' | '.join(workloads)} | peak memory |", f"| --- |{' ---: |' * (len(workloads) + 1)}"]
    for name, found in cells.items():
        lines.append(f"| {name} | {' | '.join(found.get(one, '–') for one in workloads)} | {peaks.get(name, '')} |")
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
    parser.add_argument("--stored", default="float32", help="dtype of the checkpoint (default: float32)")
    parser.add_argument(
        "--systems", nargs="+", default=["opt_torch"], help="what to time: NAME[@FORMAT][:DTYPE[:BITS]]"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--workloads", nargs="+", default=list(DEFAULT_WORKLOADS), help="see `opt-torch bench --help`")
    what.add_argument("--starts", action="store_true", help="time imports, and loading to first logits, instead")
    parser.add_argument("--baseline", help="the system that ratios are to")
    parser.add_argument("--python", nargs="*", default=[], metavar="SYSTEM=PATH", help="the Python of a system")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--json", type=Path, help="write every measured time here")
    parser.add_argument("--plot", type=Path, help="write a plot here (.png or .svg; needs matplotlib)")
    arguments = parser.parse_args()
    result = run_starts(arguments) if arguments.starts else run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        plot(summary(result), arguments.plot)
    print(table(result))


if __name__ == "__main__":
    main()
