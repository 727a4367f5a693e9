"""The command `bench` of `opt-torch`, `opt-tf` and `opt-flax`: how fast a model is on this machine."""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_common.cli_model import source_of
from opt_common.config import QUANTIZATIONS, SIZES, OPTConfig
from opt_common.encoding import tensor_maker
from opt_common.errors import ConfigError, InputError
from opt_common.texts import write_document
from opt_common.workloads import (
    BITS,
    DEFAULT_WORKLOADS,
    Bandwidth,
    Timing,
    Workload,
    seconds_of,
    timing,
)

if TYPE_CHECKING:
    from opt_common.cli import Program

DESCRIPTION = """\
Time a model: decoding (new tokens a second), reading of prompts and training (tokens read a second). Workloads take
turns; the first round compiles and is not counted. Decoding is held to the bandwidth of the memory, measured in the
same rounds: a token that is decoded alone reads every weight once.
"""

EPILOGUE = """\
examples:
  {name} bench
  {name} bench --size 125m --workloads decode:1 decode:8 prefill:1x512 train:4x256
  {name} bench --model facebook/opt-125m --dtype bfloat16 --json figures.json
  {name} bench --size 125m --quantization int8-dynamic
"""


def add_options(bench: argparse.ArgumentParser) -> None:
    """Declare what `bench` takes, apart from the model."""
    bench.add_argument("--size", choices=SIZES, help="random weights in a released shape, in place of --model")
    bench.add_argument("--quantization", choices=QUANTIZATIONS, help="weights in few bits (default: none)")
    bench.add_argument(
        "--workloads",
        nargs="+",
        default=list(DEFAULT_WORKLOADS),
        metavar="WORKLOAD",
        help="decode:BATCH, prefill:BATCHxLENGTH, train:BATCHxLENGTH; training in bfloat16 or float16 is mixed, its "
        f"weights are float32 (default: {' '.join(DEFAULT_WORKLOADS)})",
    )
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="counted rounds (default 5)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every measured time there")


def run(program: "Program", arguments: argparse.Namespace) -> None:
    """Time what the command line names, and print a table.

    Raises:
        ConfigError: if a workload is longer than the model, or trains integers.
        InputError: if a workload is not known.
    """
    workloads = {name: Workload.parse(name) for name in dict.fromkeys(arguments.workloads)}
    if arguments.rounds < 1:
        raise InputError(f"--rounds is {arguments.rounds}, expected 1 or more.")
    trains = any(workload.kind == "train" for workload in workloads.values())
    dtype = arguments.dtype or "float32"
    if trains and arguments.quantization:
        raise ConfigError("Weights in few bits do not train. Leave out the train workloads, or --quantization.")
    if trains and dtype == "auto":
        raise ConfigError('Training needs a dtype by name, got "auto". Pass --dtype float32, or bfloat16.')
    with _model(program, arguments) as (path, source):
        model = program.load(path, dtype=dtype, quantization=arguments.quantization, **source)
        for name, workload in workloads.items():
            if workload.positions > model.config.max_position_embeddings:
                raise ConfigError(
                    f"{name} takes {workload.positions} positions, but the model has "
                    f"{model.config.max_position_embeddings}. Give it a shorter workload, or --size for a larger model."
                )
        step = program.trainer(model.config, dtype) if trains else None
        seconds, bandwidth = _rounds(_calls(program, model, step, workloads), arguments.rounds)
    bits = BITS.get(model.config.quantization or dtype)
    found: list[Timing] = []
    for name, workload in workloads.items():
        best = None if bits is None else workload.best_seconds(model.config, bits, bandwidth, None)
        found.append(timing(name, seconds[name], best))
    print(_table(found, bandwidth))
    if arguments.json:
        document = {
            "framework": program.framework,
            "model": arguments.size or arguments.model,
            "dtype": dtype,
            "quantization": arguments.quantization,
            "bytes_per_s": bandwidth,
            "timings": [dataclasses.asdict(one) for one in found],
        }
        write_document(arguments.json, document)


@contextlib.contextmanager
def _model(program: "Program", arguments: argparse.Namespace) -> Generator[tuple[str, dict[str, Any]]]:
    """Where the model is, and how it is fetched; random weights lie on the disk for as long as they are used."""
    if arguments.size is None:
        yield arguments.model, source_of(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="opt-bench-") as directory:
        program.write_random(Path(directory), OPTConfig.from_size(arguments.size))
        yield directory, {}


def _calls(
    program: "Program", model: Any, step: Callable[[Any], float] | None, workloads: dict[str, Workload]
) -> dict[str, Callable[[int], Any]]:
    """What does each workload once, for a seed."""
    tensor = tensor_maker(program.tensors)
    vocab_size = model.config.vocab_size

    def call(workload: Workload) -> Callable[[int], Any]:
        if step is not None and workload.kind == "train":
            train = step
            return lambda seed: train(workload.prompts(vocab_size, seed))
        options = {"max_new_tokens": workload.new_tokens, "min_new_tokens": workload.new_tokens}
        return lambda seed: model.generate(tensor(workload.prompts(vocab_size, seed)), **options)

    return {name: call(workload) for name, workload in workloads.items()}


def _rounds(calls: dict[str, Callable[[int], Any]], rounds: int) -> tuple[dict[str, list[float]], float]:
    """The seconds of each workload in each counted round, and the best bandwidth of them."""
    from tqdm import tqdm

    memory, bandwidths = Bandwidth(), list[float]()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with tqdm(total=(rounds + 1) * len(calls), unit="run", disable=not sys.stderr.isatty(), leave=False) as bar:
        for number in range(rounds + 1):
            bandwidths.append(memory.measure())
            for name, call in calls.items():
                took = seconds_of(lambda call=call, number=number: call(number))
                if number:
                    seconds[name].append(took)
                bar.update()
    return seconds, max(bandwidths)


def _table(timings: Sequence[Timing], bandwidth: float) -> str:
    """Markdown."""
    lines = ["| workload | tokens/s | spread | of the limit |", "| --- | ---: | ---: | ---: |"]
    for one in timings:
        limit = "" if one.of_limit is None else f"{one.of_limit:.2f}"
        lines.append(f"| {one.workload} | {one.tokens_per_s:.1f} | {100 * one.spread:.0f} % | {limit} |")
    lines.append(f"\nMemory is read at {bandwidth / 1e9:.1f} GB/s.")
    return "\n".join(lines)
