"""What the programs `opt-torch`, `opt-tf` and `opt-flax` have in common: everything but the model class.

argparse of the standard library: one dependency less to install and to keep up with.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from opt_common.errors import GenerationError, OPTError
from opt_common.generation_config import DEFAULT_TOP_K
from opt_common.hub import BUNDLED_MODEL
from opt_common.params import ARCHITECTURES
from opt_common.pretrained import MODEL_DTYPES
from opt_common.states import write_states
from opt_common.tokenizer import OPTTokenizer

OK, FAILED, INTERRUPTED = 0, 1, 130
"""Exit codes; argparse itself ends with 2 on a wrong command line."""

DEFAULT_PROMPT = "Once upon a time"
DEFAULT_NEW_TOKENS = 60

_EPILOGUE = """\
examples:
  {name} generate
  {name} generate "Once upon a time" "One day" --max-new-tokens 40
  {name} generate "Hello, my dog is" --model facebook/opt-125m --json
  {name} generate "One day" --sample --seed 7 --top-p 0.9 --num-return-sequences 3
  {name} generate --input prompts.jsonl --json --repetition-penalty 1.2
  {name} generate "One day" --set 'bad_words_ids=[[5, 17], [9]]'

exit codes:
  0  done
  1  failed; one sentence on standard error says why
  2  the command line is wrong
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One framework's program.

    Attributes:
        name: what it is called.
        framework: the framework's name.
        tensors: what the tokenizer calls the framework's arrays.
        load: makes the model of a directory or hub id; takes `from_pretrained`'s keywords, and `architecture`, the
            name of PyTorch's class for it, which without it is that of a language model.
    """

    name: str
    framework: str
    tensors: Literal["pt", "tf", "jax"]
    load: Callable[..., Any]


def run(program: Program, argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        program: whose command it is.
        argv: its arguments; None means those of the process.

    Returns:
        The exit code. A wrong command line ends the process with code 2, as argparse does.
    """
    arguments = _parser(program).parse_args(argv)
    try:
        with warnings.catch_warnings():
            # A warning is for people: its sentence, without the line of code it comes from.
            warnings.showwarning = functools.partial(_show_warning, program.name)
            arguments.run(program, arguments)
            sys.stdout.flush()
    except OPTError as error:
        print(f"{program.name}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print(f"{program.name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return OK


def _show_warning(name: str, message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"{name}: {message}", file=sys.stderr)


def _generate(program: Program, arguments: argparse.Namespace) -> None:
    source = {
        "revision": arguments.revision,
        "cache_dir": arguments.cache_dir,
        "token": arguments.token,
        "local_files_only": arguments.offline,
    }
    model = program.load(arguments.model, dtype=arguments.dtype, **source)
    tokenizer = OPTTokenizer.from_pretrained(arguments.model, padding_side="left", **source)
    prompts = _prompts(arguments)
    inputs = tokenizer(prompts, padding=True, return_tensors=program.tensors)
    ids = model.generate(**inputs, **_settings(arguments))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    copies = len(texts) // len(prompts)
    for number, text in enumerate(texts):
        prompt = prompts[number // copies]
        print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) if arguments.json else text)


def _states(program: Program, arguments: argparse.Namespace) -> None:
    model = program.load(arguments.model, dtype=arguments.dtype, architecture=arguments.architecture)
    write_states(model, program.tensors, Path(arguments.inputs), Path(arguments.outputs))


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `generate` that a command line names."""
    named = {name: getattr(arguments, name) for name in _OPTIONS}
    settings: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    settings = {"do_sample": arguments.sample} | settings | dict(arguments.set)
    if "max_length" not in settings:
        settings.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    return settings


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The texts to continue, from the command line or from a file of them.

    Raises:
        GenerationError: for a file that cannot be read or holds no prompt.
    """
    if arguments.input is None:
        return arguments.prompts or [DEFAULT_PROMPT]
    if arguments.prompts:
        raise GenerationError("Prompts are given both as arguments and by --input. Give them one way.")
    name = "standard input" if arguments.input == "-" else arguments.input
    try:
        text = sys.stdin.read() if arguments.input == "-" else Path(arguments.input).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"{name} cannot be read: {error}.") from None
    # Not splitlines(): that would also split at separators which JSON leaves as they are.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise GenerationError(f"{name} holds no prompt. Write one in each line.")
    if not (arguments.json_lines or arguments.input.endswith(".jsonl")):
        return [line.rstrip("\r") for _, line in lines]
    return [_prompt_of(line, f"{name}, line {number}") for number, line in lines]


def _prompt_of(line: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise GenerationError(f"{where}: not readable as JSON: {error}.") from None
    prompt: Any = cast(dict[str, Any], value).get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise GenerationError(f'{where}: expected a string or an object with a "prompt", got {line[:80]}.')
    return prompt


def _parser(program: Program) -> argparse.ArgumentParser:
    epilogue = _EPILOGUE.format(name=program.name)
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        program.name,
        description=f"OPT language models in {program.framework}.",
        epilog=epilogue,
        formatter_class=layout,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="continue prompts",
        description="Continue each prompt, with its likeliest tokens or (--sample) with tokens drawn by probability.",
        epilog=epilogue,
        formatter_class=layout,
    )
    generate.set_defaults(run=_generate)
    generate.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help=f'a text to continue (default "{DEFAULT_PROMPT}")'
    )
    generate.add_argument(
        "--model",
        default=BUNDLED_MODEL,
        metavar="PATH_OR_ID",
        help=f"a directory or a hub id, in any format (default {BUNDLED_MODEL}, which comes with this package)",
    )
    _add_input(generate)
    _add_settings(generate)
    generate.add_argument(
        "--dtype",
        choices=(*MODEL_DTYPES, "auto"),
        default=None,
        help=f"dtype of the arithmetic (default {MODEL_DTYPES[0]}; auto: as stored)",
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object a prompt, in a line each")
    generate.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub repository")
    generate.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")
    generate.add_argument("--token", help="access token of the hub")
    generate.add_argument("--offline", action="store_true", help="use only what is already there")
    states = commands.add_parser(
        "states",
        help="logits and hidden states of given ids, as `opt-convert verify --framework` compares them",
        description="Compute given ids, and write logits, hidden states and greedy tokens to a file.",
    )
    states.set_defaults(run=_states)
    states.add_argument("model", metavar="DIRECTORY", help="a checkpoint of any format")
    states.add_argument("inputs", metavar="INPUTS", help="an .npz with ids, mask, prompt, prompt_mask and steps")
    states.add_argument("outputs", metavar="OUTPUTS", help="the .npz to write")
    states.add_argument("--architecture", choices=tuple(ARCHITECTURES.values()), default=ARCHITECTURES["lm"])
    states.add_argument("--dtype", choices=MODEL_DTYPES, default="float64", help="dtype of the arithmetic")
    return parser


def _add_input(generate: argparse.ArgumentParser) -> None:
    generate.add_argument(
        "--input", metavar="FILE", help="read prompts from a file, one a line; - is standard input, .jsonl JSON lines"
    )
    generate.add_argument(
        "--json-lines",
        action="store_true",
        help='lines of --input are JSON: a string or an object with a "prompt" (as in a file named .jsonl)',
    )


_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_new_tokens": (int, f"append at most this many tokens (default {DEFAULT_NEW_TOKENS})"),
    "min_new_tokens": (int, "let no text end before it has this many new tokens"),
    "repetition_penalty": (float, "make tokens that the text has less likely, by this factor"),
    "no_repeat_ngram_size": (int, "repeat no sequence of this many tokens"),
    "seed": (int, "with --sample: what decides the draws; the same text from the same seed in every framework"),
    "num_return_sequences": (int, "with --sample: continue each prompt this many times"),
    "temperature": (float, "with --sample: below 1 sharper, above 1 flatter"),
    "top_k": (int, f"with --sample: draw from this many best tokens (default {DEFAULT_TOP_K}, 0: all)"),
    "top_p": (float, "with --sample: draw from the likeliest tokens that sum to this probability"),
    "min_p": (float, "with --sample: leave out tokens below this share of the likeliest one's probability"),
    "typical_p": (float, "with --sample: draw from the most typical tokens that sum to this probability"),
    "epsilon_cutoff": (float, "with --sample: leave out tokens below this probability"),
    "eta_cutoff": (float, "with --sample: the same, lowered where the distribution is broad"),
}
"""Settings with an option of their own: type and help. The others go by --set."""


def _add_settings(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("--sample", action="store_true", help="draw tokens by their probability")
    for name, (kind, text) in _OPTIONS.items():
        generate.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=text)
    generate.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=JSON",
        help="any setting of a generation_config.json, such as min_length=20 or suppress_tokens=[5]; may be repeated",
    )


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        return name, json.loads(value if equals else "")
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"expected NAME=JSON, such as suppress_tokens=[5], got {text}") from None
