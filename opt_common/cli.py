"""What the programs `opt-torch`, `opt-tf` and `opt-flax` have in common: everything but the model class.

argparse of the standard library: one dependency less to install and to keep up with.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from opt_common import cli_bench, cli_eval, cli_generate
from opt_common.cli_model import add_model
from opt_common.config import OPTConfig
from opt_common.errors import OPTError
from opt_common.params import ARCHITECTURES
from opt_common.pretrained import MODEL_DTYPES
from opt_common.states import write_states

OK, FAILED, INTERRUPTED = 0, 1, 130
"""Exit codes; argparse itself ends with 2 on a wrong command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One framework's program.

    Attributes:
        name: what it is called.
        framework: the framework's name.
        tensors: what the tokenizer calls the framework's arrays.
        load: makes the language model of a directory or hub id; takes `from_pretrained`'s keywords.
        inference: what models are called under when no gradient is wanted.
        trainer: makes a new language model of a configuration, and gives what does one step of AdamW on ids (B, T) and
            returns the loss. Arithmetic is in the dtype named, weights are float32 where that is a smaller one.
        write_random: writes a checkpoint with random weights to a directory.
        write_outliers: writes a checkpoint whose norms and matrices are scaled against each other to a directory.
    """

    name: str
    framework: str
    tensors: Literal["pt", "tf", "jax"]
    load: Callable[..., Any]
    inference: Callable[[], contextlib.AbstractContextManager[Any]]
    trainer: Callable[[OPTConfig, str], Callable[[Any], float]]
    write_random: Callable[[Path, OPTConfig], None]
    write_outliers: Callable[..., None]


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
            arguments.command(program, arguments)
            sys.stdout.flush()
    except OPTError as error:
        print(f"{program.name}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        print(f"{program.name}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{program.name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return OK


def _show_warning(name: str, message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"{name}: {message}", file=sys.stderr)


def _parser(program: Program) -> argparse.ArgumentParser:
    epilogue = cli_generate.EPILOGUE.format(name=program.name)
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
    generate.set_defaults(command=cli_generate.run)
    cli_generate.add_options(generate)
    add_model(generate)
    for name, module, text in (
        ("bench", cli_bench, "time a model on this machine"),
        ("eval", cli_eval, "perplexity of a model, and what weights in few bits cost"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=module.DESCRIPTION,
            epilog=module.EPILOGUE.format(name=program.name),
            formatter_class=layout,
        )
        command.set_defaults(command=module.run)
        module.add_options(command)
        add_model(command)
    _add_states(commands.add_parser("states", help="logits and hidden states of given ids, for opt-convert verify"))
    return parser


def _add_states(states: argparse.ArgumentParser) -> None:
    states.description = "Compute given ids, and write logits, hidden states and greedy tokens to a file."
    states.set_defaults(command=_states)
    states.add_argument("model", metavar="DIRECTORY", help="a checkpoint of any format")
    states.add_argument("inputs", metavar="INPUTS", help="an .npz with ids, mask, prompt, prompt_mask and steps")
    states.add_argument("outputs", metavar="OUTPUTS", help="the .npz to write")
    states.add_argument("--architecture", choices=tuple(ARCHITECTURES.values()), default=ARCHITECTURES["lm"])
    states.add_argument("--dtype", choices=MODEL_DTYPES, default="float64", help="dtype of the arithmetic")


def _states(program: Program, arguments: argparse.Namespace) -> None:
    model = program.load(arguments.model, dtype=arguments.dtype, architecture=arguments.architecture)
    write_states(model, program.tensors, Path(arguments.inputs), Path(arguments.outputs))
