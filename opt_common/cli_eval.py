"""The command `eval` of `opt-torch`, `opt-tf` and `opt-flax`: perplexity, in full precision and in few bits."""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from opt_common.cli_model import source_of
from opt_common.config import QUANTIZATIONS
from opt_common.encoding import tensor_maker
from opt_common.errors import InputError
from opt_common.evaluation import Batch, batches, layer_errors, perplexity, windows
from opt_common.states import to_numpy
from opt_common.texts import read_texts, write_document
from opt_common.tokenizer import OPTTokenizer

if TYPE_CHECKING:
    from opt_common.cli import Program

HELD_OUT = Path(__file__).with_name("opt_tiny") / "held_out.jsonl"
"""Sixty stories of the kind that the bundled model has learnt, none of which it has seen."""

DESCRIPTION = """\
Perplexity of a language model on texts, and what weights in few bits change: its perplexity, and in the first texts how
far the hidden states after each layer move (norm of the difference over the norm).
"""

EPILOGUE = """\
examples:
  {name} eval
  {name} eval --quantization int8-dynamic --outliers 64
  {name} eval --model facebook/opt-125m --input test.txt --window 2048 --batch-size 1 --quantization none
"""


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare what `eval` takes, apart from the model."""
    command.add_argument(
        "--input",
        metavar="FILE",
        help='a text, or (.jsonl) one in each line, as a string or an object with a "text"; - is standard input '
        "(default: 60 little stories that come with this package)",
    )
    command.add_argument(
        "--window", type=int, metavar="N", help="tokens that are read at once (default: as many as the model can)"
    )
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows read at once (default 8)")
    command.add_argument(
        "--quantization",
        nargs="+",
        choices=("none", *QUANTIZATIONS),
        default=["int8-dynamic"],
        metavar="SCHEME",
        help=f"weights in few bits to compare: {', '.join(QUANTIZATIONS)}, or none (default int8-dynamic)",
    )
    command.add_argument(
        "--outliers",
        type=float,
        metavar="FACTOR",
        help="first multiply one channel in a hundred of each layer norm by this and divide the matrices' columns by "
        "it: the model computes the same, but rounding it is harder, as it is in large OPT models",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What one way to hold the weights gives.

    Attributes:
        weights: its name.
        perplexity: of all texts.
        change: of the perplexity, as a share of that in full precision.
        layer_errors: how far hidden states have moved, after the embeddings and after each layer.
    """

    weights: str
    perplexity: float
    change: float
    layer_errors: tuple[float, ...]


def run(program: "Program", arguments: argparse.Namespace) -> None:
    """Evaluate what the command line names, and print a table.

    Raises:
        InputError: for numbers that make no sense, or texts that can't be read.
    """
    for name in ("window", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < (2 if name == "window" else 1):
            raise InputError(f"--{name.replace('_', '-')} is {value}, which is too small.")
    if arguments.outliers is not None and not 0 < arguments.outliers < float("inf"):
        raise InputError(f"--outliers is {arguments.outliers}, expected a number above 0, such as 64.")
    texts = read_texts(arguments.input or str(HELD_OUT), field="text", whole=True)
    source = source_of(arguments)
    tokenizer = OPTTokenizer.from_pretrained(arguments.model, **source)
    dtype = arguments.dtype or "float32"
    schemes = [scheme for scheme in dict.fromkeys(arguments.quantization) if scheme != "none"]
    with _model(program, arguments, source) as (path, options):
        plain = program.load(path, dtype=dtype, **options)
        positions = plain.config.max_position_embeddings
        cut = windows((tokenizer(text)["input_ids"] for text in texts), min(arguments.window or positions, positions))
        if not cut:
            raise InputError("The texts have less than two tokens: nothing has a probability. Give longer ones.")
        whole = list(batches(cut, min(arguments.batch_size, len(cut)), plain.config.pad_token_id))
        expected, states = _evaluate(program, plain, whole, dtype)
        found = [Figures(weights=dtype, perplexity=expected, change=0.0, layer_errors=(0.0,) * len(states))]
        del plain
        for scheme in schemes:
            model = program.load(path, dtype=dtype, quantization=scheme, **options)
            value, moved = _evaluate(program, model, whole, scheme)
            errors = tuple(layer_errors(moved, states, whole[0].attention_mask))
            found.append(Figures(weights=scheme, perplexity=value, change=value / expected - 1, layer_errors=errors))
            del model
    print(_table(found))
    print(
        f"\nPerplexity per token: {sum(batch.scored for batch in whole)} tokens, in {len(cut)} windows of at most "
        f"{max(map(len, cut))} with nothing read across; a window's first token (a text's </s>) is not scored."
    )
    if arguments.json:
        document = {
            "framework": program.framework,
            "model": arguments.model,
            "outliers": arguments.outliers,
            "tokens": sum(batch.scored for batch in whole),
            "figures": [dataclasses.asdict(one) for one in found],
        }
        write_document(arguments.json, document)


@contextlib.contextmanager
def _model(
    program: "Program", arguments: argparse.Namespace, source: dict[str, Any]
) -> Generator[tuple[str, dict[str, Any]]]:
    """Where the model is, and how it is fetched; one with outliers lies on the disk for as long as it is used."""
    if arguments.outliers is None:
        yield arguments.model, source
        return
    with tempfile.TemporaryDirectory(prefix="opt-eval-") as directory:
        program.write_outliers(arguments.model, Path(directory), arguments.outliers, **source)
        yield directory, {}


def _evaluate(
    program: "Program", model: Any, whole: Sequence[Batch], name: str
) -> tuple[float, list[npt.NDArray[Any]]]:
    """The perplexity, and the hidden states of the first batch."""
    from tqdm import tqdm

    tensor = tensor_maker(program.tensors)
    losses, states = list[float](), list[npt.NDArray[Any]]()
    for batch in tqdm(whole, desc=name, unit="batch", disable=not sys.stderr.isatty(), leave=False):
        given = {field.name: tensor(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
        with program.inference():
            output = model(**given, output_hidden_states=not states)
        losses.append(float(to_numpy(output.loss)))
        if not states:
            states = [to_numpy(state) for state in output.hidden_states]
    return perplexity(losses, [batch.scored for batch in whole]), states


def _table(found: Sequence[Figures]) -> str:
    """Markdown: the perplexities, then the layers."""
    lines = ["| weights | perplexity | change |", "| --- | ---: | ---: |"]
    for one in found:
        change = f"{100 * one.change:+.2f} %" if one is not found[0] else ""
        lines.append(f"| {one.weights} | {one.perplexity:.4f} | {change} |")
    if len(found) > 1:
        lines += ["", f"| layer |{''.join(f' {one.weights} |' for one in found[1:])}"]
        lines.append(f"| --- |{' ---: |' * (len(found) - 1)}")
        for layer, errors in enumerate(zip(*(one.layer_errors for one in found[1:]), strict=True)):
            lines.append(f"| {layer or 'embeddings'} |{''.join(f' {error:.2g} |' for error in errors)}")
    return "\n".join(lines)
