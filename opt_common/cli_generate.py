"""The command `generate` of `opt-torch`, `opt-tf` and `opt-flax`: prompts in, texts out."""

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opt_common.cli_model import source_of
from opt_common.cli_writer import Line, Writer
from opt_common.errors import GenerationError
from opt_common.generation_config import DEFAULT_TOP_K, GenerationConfig
from opt_common.texts import read_texts
from opt_common.tokenizer import OPTTokenizer

if TYPE_CHECKING:
    from opt_common.cli import Program

DEFAULT_PROMPT = "Once upon a time"
DEFAULT_NEW_TOKENS = 60
DEFAULT_BATCH_SIZE = 8

EPILOGUE = """\
examples:
  {name} generate
  {name} generate "Once upon a time" "One day" --max-new-tokens 40
  {name} generate "Hello, my dog is" --model facebook/opt-125m --json
  {name} generate "One day" --sample --seed 7 --top-p 0.9 --num-return-sequences 3
  {name} generate "One day" --num-beams 4 --stop-strings "."
  {name} generate "One day" --model facebook/opt-1.3b --assistant-model facebook/opt-125m
  {name} generate --input prompts.jsonl --batch-size 32 --json --repetition-penalty 1.2
  {name} generate --interactive --sample
  {name} generate "One day" --bad-words-ids '[[5, 17], [9]]'

exit codes:
  0    done
  1    failed; one sentence on standard error says why
  2    the command line is wrong
  130  interrupted; what was there by then has been printed
"""

# The command line


def add_options(generate: argparse.ArgumentParser) -> None:
    """Declare what `generate` takes, apart from the model."""
    generate.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help=f'a text to continue (default "{DEFAULT_PROMPT}")'
    )
    generate.add_argument(
        "--input", metavar="FILE", help="read prompts from a file, one a line; - is standard input, .jsonl JSON lines"
    )
    generate.add_argument(
        "--json-lines",
        action="store_true",
        help='lines of --input are JSON: a string or an object with a "prompt" (as in a file named .jsonl)',
    )
    generate.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help=f"prompts that are continued at once (default {DEFAULT_BATCH_SIZE})",
    )
    generate.add_argument(
        "--negative-prompt", metavar="TEXT", help="what --guidance-scale leads away from (default: the last token)"
    )
    form = generate.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object a text, in a line each")
    form.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show text as it is produced, one prompt at a time (default: for one prompt, on a terminal)",
    )
    form.add_argument("--interactive", action="store_true", help="read what to add to the text from the terminal")
    generate.add_argument(
        "--quiet",
        action="store_true",
        help="show no progress bar (on a terminal, there is one)",
    )
    _add_settings(generate)


def _add_settings(generate: argparse.ArgumentParser) -> None:
    """An option for each setting of `GenerationConfig`, explained by its docstring."""
    group = generate.add_argument_group(
        "settings", "those of the checkpoint's generation_config.json, unless given; lists are written as JSON"
    )
    for field in dataclasses.fields(GenerationConfig):
        if field.name in _NO_OPTION:
            continue
        names = [f"--{field.name.replace('_', '-')}", *(["--sample"] if field.name == "do_sample" else [])]
        text = _explanations().get(field.name, "").replace("%", "%%")
        text = _DEFAULTS.get(field.name, "{}").format(text)
        group.add_argument(*names, dest=f"setting_{field.name}", default=None, help=text, **_kind(field.type))
    group.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=JSON",
        help="the same as --NAME, for a value of any kind; may be repeated",
    )


_NO_OPTION = frozenset({"extra", "return_dict_in_generate", "output_scores", "output_logits"})
"""Fields that decide what a Python caller gets back, or are no setting."""

_DEFAULTS = {
    "max_new_tokens": f"{{}} (default {DEFAULT_NEW_TOKENS})",
    "top_k": f"{{}} (default {DEFAULT_TOP_K})",
}


def _kind(annotation: Any) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    kinds: dict[Any, dict[str, Any]] = {
        bool: {"action": argparse.BooleanOptionalAction},
        int: {"type": int, "metavar": "N"},
        float: {"type": float, "metavar": "X"},
        int | None: {"type": int, "metavar": "N"},
        float | None: {"type": float, "metavar": "X"},
        tuple[str, ...]: {"action": "append", "metavar": "TEXT"},
        Any: {"metavar": "PATH_OR_ID"},
    }
    return kinds.get(annotation, {"type": _json_or_text, "metavar": "JSON"})


def _explanations() -> Mapping[str, str]:
    """What the docstring says of each setting, in one line."""
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", inspect.getdoc(GenerationConfig) or "", re.MULTILINE)
    return {name: " ".join(text.split()).replace("`", "") for name, text in found}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        return name, json.loads(value if equals else "")
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"expected NAME=JSON, such as suppress_tokens=[5], got {text}") from None


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `generate` that a command line names."""
    named = {name.removeprefix("setting_"): value for name, value in vars(arguments).items() if "setting_" in name}
    settings = {name: value for name, value in named.items() if value is not None} | dict(arguments.set)
    if "max_length" not in settings:
        settings.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    return settings


# Prompts


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The texts to continue, from the command line or from a file of them.

    Raises:
        GenerationError: for a file that cannot be read or holds no prompt.
    """
    if arguments.input is None:
        return arguments.prompts or [DEFAULT_PROMPT]
    if arguments.prompts:
        raise GenerationError("Prompts are given both as arguments and by --input. Give them one way.")
    return read_texts(arguments.input, field="prompt", json_lines=arguments.json_lines, error=GenerationError)


# Running


def run(program: "Program", arguments: argparse.Namespace) -> None:
    """Continue prompts and print the texts."""
    source = source_of(arguments)
    settings = _settings(arguments)
    prompts = arguments.prompts if arguments.interactive else _prompts(arguments)
    if "assistant_model" in settings:
        # The revision is that of the model's own repository.
        options = {"dtype": arguments.dtype, **source, "revision": None}
        settings["assistant_model"] = program.load(settings["assistant_model"], **options)
    writer = Writer(
        model=program.load(arguments.model, dtype=arguments.dtype, **source),
        tokenizer=OPTTokenizer.from_pretrained(arguments.model, padding_side="left", **source),
        tensors=program.tensors,
        settings=settings,
        negative_prompt=arguments.negative_prompt,
    )
    if arguments.interactive:
        writer.converse(prompts)
        return
    streams = arguments.stream
    if streams is None:
        streams = sys.stdout.isatty() and not arguments.json and len(prompts) == 1 and writer.can_stream()
    if streams:
        for prompt in prompts:
            writer.stream(prompt)
        return
    size = arguments.batch_size or min(DEFAULT_BATCH_SIZE, len(prompts))
    if writer.options().guesses and arguments.batch_size is None:
        size = 1
    form = _json_line if arguments.json else _text
    for batch in _with_progress([prompts[at : at + size] for at in range(0, len(prompts), size)], arguments.quiet):
        for line in writer.texts(batch, rows=size):
            print(form(line), flush=True)


def _text(line: Line) -> str:
    return line.prompt + line.continuation


def _json_line(line: Line) -> str:
    fields: dict[str, Any] = {"prompt": line.prompt, "text": _text(line), "continuation": line.continuation}
    return json.dumps(fields if line.complete else {**fields, "complete": False}, ensure_ascii=False)


def _with_progress(batches: Sequence[list[str]], quiet: bool) -> Iterator[list[str]]:
    """The batches, with a bar on standard error if there are several, somebody looks, and texts go elsewhere."""
    from tqdm import tqdm

    hidden = quiet or len(batches) == 1 or not sys.stderr.isatty() or sys.stdout.isatty()
    with tqdm(total=sum(map(len, batches)), unit="prompt", disable=hidden) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
