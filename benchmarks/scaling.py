"""How a token's cost grows: with the number of layers, and with the length of the text before it.

    python -m benchmarks.scaling flax --json scaling.json   # or torch, tf

A deeper model should take longer to compile and to run by no more than its layers, a longer text by no more than its
keys and values take to read. Weights are random, of the shape of 125m but for the number of layers.
"""

import argparse
import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation_overhead import MODELS
from opt_common import OPTConfig
from opt_common.encoding import tensor_maker
from opt_common.generation import token_steps

PROMPT = 32
"""Tokens of the prompt where depth is what changes."""


def steps_of(package: str, model: Any, prompt: int, tokens: int) -> Iterator[Any]:
    """Greedy decoding, token by token; the first reads the prompt."""
    module = importlib.import_module(f"{package}.generation")
    program = importlib.import_module(f"{package}.cli").program()
    ids = tensor_maker(program.tensors)(np.full((1, prompt), 5))
    options, read = module.prepare(model, ids, max_new_tokens=tokens, eos_token_id=[])
    around = getattr(module, "evaluating", lambda *_: contextlib.nullcontext())
    with around(model, options):
        yield from token_steps(module.Decoder(model, read), read, options)


def timed(package: str, model: Any, prompt: int, tokens: int) -> dict[str, float]:
    """Seconds of the first two tokens, which compile, and the median of a token in a second run."""
    begin = time.perf_counter()
    first = steps_of(package, model, prompt, tokens)
    next(first)
    next(first)
    started = time.perf_counter() - begin
    seconds: list[float] = []
    begin = time.perf_counter()
    for _ in steps_of(package, model, prompt, tokens):
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    again = seconds[0] + seconds[1]
    return {"first_two": started, "compiling": started - again, "token": statistics.median(seconds[1:])}


def measure(framework: str, layers: list[int], lengths: list[int], tokens: int) -> dict[str, Any]:
    """Figures by number of layers, and, at the smallest of them, by length of the prompt.

    Each number of layers has a process of its own: what one has compiled would be ready for the next.
    """
    found: dict[str, Any] = {"framework": framework, "layers": {}, "lengths": {}}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for depth in sorted(layers, reverse=True):
            own_lengths = lengths if depth == min(layers) else []
            figures = processes.submit(measure_depth, framework, depth, own_lengths, tokens).result()
            found["layers"][depth], by_length = figures
            found["lengths"] |= by_length
            print(f"{depth} layers done", file=sys.stderr)
    return found


def measure_depth(
    framework: str, depth: int, lengths: list[int], tokens: int
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Figures of one number of layers, and by length of the prompt."""
    model, _, _ = MODELS[framework](OPTConfig.from_size("125m").replace(num_hidden_layers=depth))
    package = f"opt_{framework}"
    figures = timed(package, model, PROMPT, tokens)
    return figures, {length: timed(package, model, length, tokens) for length in lengths}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each framework, the ratio of most layers to fewest in bold."""
    lines = []
    for one in found:
        layers, lengths = one["layers"], one["lengths"]
        few, *_, many = (layers[depth] for depth in sorted(layers, key=int))
        cells = []
        for kind, unit, factor in (("compiling", "s", 1), ("token", "ms", 1e3)):
            digits = 1 if unit == "s" else 0
            figures = " · ".join(f"{abs(layers[depth][kind]) * factor:.{digits}f}" for depth in sorted(layers, key=int))
            ratio = f" · **{many[kind] / few[kind]:.1f}**" if few[kind] > 0.1 else ""
            cells.append(f"{figures} {unit}{ratio}")
        cells.append(" · ".join(f"{lengths[length]['token'] * 1e3:.0f}" for length in sorted(lengths, key=int)) + " ms")
        lines.append(f"| opt_{one['framework']} | {' | '.join(cells)} |")
    depths, texts = (" · ".join(sorted(found[0][kind], key=int)) for kind in ("layers", "lengths"))
    return "\n".join(
        [
            f"| | compiling, {depths} layers | a token, {depths} layers | a token after {texts} |",
            "| --- | ---: | ---: | ---: |",
            *lines,
        ]
    )


def main() -> None:
    """Measure one framework, print two tables, and write JSON."""
    # Compiling is what is measured: nothing may be found ready.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("torch", "tf", "flax"))
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48], help="numbers of layers")
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 448, 960, 1900], help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens (default 32)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    found = measure(arguments.framework, arguments.layers, arguments.lengths, arguments.tokens)
    for kind in ("layers", "lengths"):
        print(f"{kind:>8}{'compiling':>12}{'a token':>12}")
        for number, row in found[kind].items():
            print(f"{number:8}{row['compiling']:10.1f} s{row['token'] * 1e3:9.1f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
