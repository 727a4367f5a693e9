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
from typing import Any, Literal

from opt_common.errors import OPTError
from opt_common.hub import BUNDLED_MODEL
from opt_common.pretrained import MODEL_DTYPES
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
        load: makes the language model of a directory or hub id; takes `from_pretrained`'s keywords.
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
            _generate(program, arguments)
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
    prompts: list[str] = arguments.prompts or [DEFAULT_PROMPT]
    inputs = tokenizer(prompts, padding=True, return_tensors=program.tensors)
    ids = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    for prompt, text in zip(prompts, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
        print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) if arguments.json else text)


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
        help="continue prompts with their likeliest tokens",
        description="Continue each prompt with its likeliest tokens.",
        epilog=epilogue,
        formatter_class=layout,
    )
    generate.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help=f'a text to continue (default "{DEFAULT_PROMPT}")'
    )
    generate.add_argument(
        "--model",
        default=BUNDLED_MODEL,
        metavar="PATH_OR_ID",
        help=f"a directory or a hub id, in any format (default {BUNDLED_MODEL}, which comes with this package)",
    )
    generate.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=DEFAULT_NEW_TOKENS,
        metavar="N",
        help=f"append at most N tokens (default {DEFAULT_NEW_TOKENS})",
    )
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
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number
