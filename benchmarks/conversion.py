"""Memory and time of conversions between all formats, on a model of 5.3 GB, against `cp` and against transformers.

    python -m benchmarks.conversion --directory /tmp/bench --json conversion.json
    python -m benchmarks.conversion --directory /tmp/bench --files one --pairs torch-tf --repeats 3 --keep

A model of the shape of OPT-1.3b with random float32 weights is made in every format. Each pair of formats is converted
in a process of its own, and the source copied by `cp` before and after it: the ratio is that of the mean of the two
copies to the conversion. All end when everything is on the disk (fsync), find the source in the page cache, and before
each the system has written what it held back.

Peak memory is VmHWM of the converting process, pages of mapped files included, less its memory after the imports.

`--transformers PYTHON` also has transformers load and save a smaller model (its Flax classes take more than four times
the model's size in memory), with the Python of an environment that holds it, torch, TensorFlow and Flax.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("safetensors", "torch", "tf", "flax", "metaseq", "keras-hub")
KERNELS = ("tf", "flax", "keras-hub")
TRANSPOSED = {frozenset((one, other)) for one in FORMATS if one not in KERNELS for other in KERNELS}
SELF = (sys.executable, "-m", "benchmarks.conversion")
SHARD = "1GB"
PARTS = 4
MARGIN = 100e6

_SAVE = """
import sys
from transformers import AutoModelForCausalLM, FlaxAutoModelForCausalLM, TFAutoModelForCausalLM
source, target, to = sys.argv[1:]
if to == "tf":
    TFAutoModelForCausalLM.from_pretrained(source, from_pt=True).save_pretrained(target)
elif to == "flax":
    FlaxAutoModelForCausalLM.from_pretrained(source, from_pt=True).save_pretrained(target)
else:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(target, safe_serialization=to == "safetensors", max_shard_size="100GB")
"""


def make_model(directory: Path, *, layers: int, hidden: int = 2048, vocabulary: int = 50272) -> None:
    """Write a model with random float32 weights as safetensors."""
    from conversion import save_checkpoint
    from opt_common.config import OPTConfig
    from opt_common.params import Parameter, parameter_table

    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )
    table = parameter_table(config)
    numbers = {parameter.name: number for number, parameter in enumerate(table)}

    def draw(parameter: Parameter) -> Any:
        generator = np.random.Generator(np.random.SFC64(numbers[parameter.name]))
        return generator.random(parameter.shape, np.float32) - np.float32(0.5)

    save_checkpoint(directory, config, table, draw, dtype="float32", max_shard_size="100GB")


def options_of(to: str, *, sharded: bool) -> dict[str, Any]:
    """Arguments of `convert` for one file or several."""
    if not sharded:
        return {} if to in ("metaseq", "keras-hub") else {"max_shard_size": "100GB"}
    return {"model_parts": PARTS} if to == "metaseq" else {"max_shard_size": SHARD}


def memory(field: str) -> int:
    """A line of this process's status, in bytes: VmHWM is the most it ever had, VmRSS what it has."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def convert_here(source: str, target: str, to: str, sharded: bool) -> None:
    """Convert in this process and print its peak memory."""
    import h5py  # noqa: F401  (part of the interpreter's own memory)

    from conversion import convert

    before = memory("VmRSS")
    convert(source, target, to, **options_of(to, sharded=sharded))
    print(memory("VmHWM") - before)


def in_page_cache(directory: Path) -> None:
    """Read every file, so that the next reader finds it in memory."""
    buffer = bytearray(16 << 20)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def timed(source: Path, target: Path, run: Callable[[], str]) -> tuple[float, str]:
    """Seconds until all of the target is on the disk, and what was printed; the target is removed."""
    in_page_cache(source)
    os.sync()
    start = time.perf_counter()
    said = run()
    for path in [*target.iterdir(), target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start, said


def command(*arguments: str | Path) -> Callable[[], str]:
    """A process that must succeed; what it prints."""
    return lambda: subprocess.run(list(map(str, arguments)), check=True, capture_output=True, text=True).stdout


def ours(source: Path, target: Path, to: str, *, sharded: bool) -> Callable[[], str]:
    """The process that converts."""
    return command(*SELF, "--one", source, target, to, "sharded" if sharded else "single")


def largest_tensor(source: Path) -> int:
    """Bytes of the largest tensor of a checkpoint."""
    from conversion import open_checkpoint

    with open_checkpoint(source) as checkpoint:
        return max(checkpoint.info(name).nbytes for name in checkpoint.names)


def measure_pair(source: Path, target: Path, to: str, *, sharded: bool) -> dict[str, Any]:
    """One pair: a copy, a conversion, a copy."""
    copy = target.with_name("copy")
    copies: list[float] = []

    def measure_copy() -> None:
        copies.append(timed(source, copy, command("cp", "-r", "--reflink=never", source, copy))[0])
        shutil.rmtree(copy)

    measure_copy()
    seconds, peak = timed(source, target, ours(source, target, to, sharded=sharded))
    shutil.rmtree(target)
    measure_copy()
    mean = statistics.mean(copies)
    return {
        "sharded": sharded,
        "ours_seconds": round(seconds, 2),
        "cp_seconds": round(mean, 2),
        "peak_bytes": int(peak),
        "ratio": round(mean / seconds, 3),
    }


def has_target(to: str, *, sharded: bool) -> bool:
    """Whether a format has what is asked for: KerasHub's presets are written in one file only."""
    return not (sharded and to == "keras-hub")


def all_pairs(
    directory: Path, wanted: set[str], *, sharded: bool, repeats: int, keep: bool
) -> Iterator[dict[str, Any]]:
    """Measure every pair; the sources lie in `directory` under the names of their formats."""
    for source in FORMATS:
        targets = [to for to in FORMATS if has_target(to, sharded=sharded)]
        targets = [to for to in targets if not wanted or f"{source}-{to}" in wanted]
        if not targets:
            continue
        place = made(directory, source)
        for to in targets:
            for _ in range(repeats):
                row = measure_pair(place, directory / "target", to, sharded=sharded)
                transposed = frozenset((source, to)) in TRANSPOSED
                yield {"source": source, "target": to, "transposed": transposed, **row}
        if source != FORMATS[0] and not keep:
            shutil.rmtree(place)


def made(directory: Path, name: str) -> Path:
    """The model in a format, made where it is not there yet."""
    place = directory / name
    if not place.exists():
        command(*SELF, "--one", directory / FORMATS[0], place, name, "single")()
    return place


def against_transformers(directory: Path, python: str) -> Iterator[dict[str, Any]]:
    """transformers loads and saves the same model as ours converts, in turns."""
    source, target = made(directory, "torch"), directory / "target"
    for to in ("safetensors", "torch", "tf", "flax"):
        seconds: dict[str, float] = {}
        for name, run in (
            ("ours", ours(source, target, to, sharded=False)),
            ("transformers", command(python, "-W", "ignore", "-c", _SAVE, source, target, to)),
        ):
            seconds[name], _ = timed(source, target, run)
            shutil.rmtree(target)
        ratio = seconds["transformers"] / seconds["ours"]
        yield {"source": "torch", "target": to, **{name: round(s, 2) for name, s in seconds.items()}, "ratio": ratio}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    bound = 2 * report["largest_tensor_bytes"] + MARGIN
    lines = [
        f"{report['model_bytes'] / 1e9:.2f} GB, largest tensor {report['largest_tensor_bytes'] / 1e6:.0f} MB, bound of "
        f"the memory {bound / 1e6:.0f} MB",
        "",
        "| from | to | files | seconds | `cp` | ratio | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for row in report["pairs"]:
        groups.setdefault((row["source"], row["target"], row["sharded"]), []).append(row)
    for (source, to, sharded), rows in groups.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in ("ours_seconds", "cp_seconds", "ratio")}
        peak = max(row["peak_bytes"] for row in rows)
        files = "several" if sharded else "one"
        note = " (transposed)" if rows[0]["transposed"] else ""
        lines.append(
            f"| {source} | {to}{note} | {files} | "
            f"{middle['ours_seconds']:.1f} | {middle['cp_seconds']:.1f} | {middle['ratio']:.2f} | {peak / 1e6:.0f} MB |"
        )
    for transposed in (False, True):
        ratios = [row["ratio"] for row in report["pairs"] if row["transposed"] == transposed]
        if ratios:
            kind = "transposed" if transposed else "not transposed"
            lines.append(f"\n{kind}: median ratio {statistics.median(ratios):.2f}, least {min(ratios):.2f}")
    if report["transformers"]:
        lines += ["", "| to | seconds | transformers | ratio |", "| --- | --- | --- | --- |"]
        for row in report["transformers"]:
            lines.append(f"| {row['target']} | {row['ours']:.1f} | {row['transformers']:.1f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write the report after every line of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to; needs four times the model's size")
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--files", choices=["one", "several", "both"], default="both")
    parser.add_argument("--pairs", nargs="*", default=[], metavar="FROM-TO", help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the sources for the next call")
    parser.add_argument("--transformers", metavar="PYTHON", help="compare with transformers and with nothing else")
    parser.add_argument("--one", nargs=4, metavar=("SRC", "DST", "TO", "FILES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        source, target, to, files = arguments.one
        convert_here(source, target, to, files == "sharded")
        return
    directory: Path = arguments.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    first = directory / FORMATS[0]
    if not first.exists():
        make_model(first, layers=arguments.layers)
    report: dict[str, Any] = {
        "model_bytes": sum(path.stat().st_size for path in first.iterdir()),
        "largest_tensor_bytes": largest_tensor(first),
        "pairs": [],
        "transformers": [],
    }

    def add(kind: str, rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            report[kind].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")

    if arguments.transformers:
        add("transformers", against_transformers(directory, arguments.transformers))
    else:
        for sharded in {"one": [False], "several": [True], "both": [False, True]}[arguments.files]:
            repeats, keep = arguments.repeats, arguments.keep
            add("pairs", all_pairs(directory, set(arguments.pairs), sharded=sharded, repeats=repeats, keep=keep))
    print(table(report))


if __name__ == "__main__":
    main()
