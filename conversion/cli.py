"""The program `opt-convert`. argparse, so that there is one dependency less to install and to keep up with."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from conversion.convert import Conversion, PlannedConversion, convert, merge_adapter, plan_conversion
from conversion.doctor import PROBLEM, Diagnosis, doctor
from conversion.function import FRAMEWORKS, REFERENCE
from conversion.inspect import Inspection, inspect
from conversion.plan import TARGETS
from conversion.report import show_verification
from conversion.target import no_room
from conversion.verify import ALL, Verification, verify
from opt_common.errors import OPTError
from opt_common.hub import QUANTIZED

OK, FAILED, USAGE, DIFFERENT, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes; `_EPILOGUE` says them to users."""

_NAME_WIDTH = 50
"""Columns that the names of tensors take, or more where one is longer."""

_EPILOGUE = """\
exit codes:
  0    done
  1    failed; one sentence on standard error says why
  2    the command line is wrong
  3    verify, convert --verify or doctor found a problem or a difference
  130  interrupted; one sentence on standard error says what is left

A SRC is a directory, a weight file beside its config.json, or a hub id such as facebook/opt-125m. Besides the formats
that are written, SRC may be what a framework saved: a state dict of PyTorch, .weights.h5 or .keras of Keras 3, a
checkpoint of Orbax. metaseq's files need no config.json where they say themselves what it would; of several parts or
shards, any one names them all.
With --json, standard output holds one JSON document and nothing else.
"""

_EXAMPLES = {
    "convert": """\
examples:
  opt-convert convert facebook/opt-125m opt-125m-flax --to flax
  opt-convert convert my-model my-model-half --to safetensors --dtype bfloat16
  opt-convert convert my-model my-model-tf --to tf --max-shard-size 2GB
  opt-convert convert facebook/opt-30b opt-30b-tf --to tf --dry-run
  opt-convert convert facebook/opt-30b opt-30b-tf --to tf --resume
  opt-convert convert my-model my-model-flax --to flax --verify
  opt-convert convert opt-13b/reshard-model_part-0.pt opt-13b-hf --to safetensors
  opt-convert convert my-model my-model-metaseq --to metaseq --model-parts 2
  opt-convert convert my-model-int8 my-model --to safetensors --dequantize
  opt-convert convert facebook/opt-125m opt-125m-preset --to keras-hub
""",
    "doctor": """\
examples:
  opt-convert doctor my-model
  opt-convert doctor facebook/opt-350m --json
""",
    "inspect": """\
examples:
  opt-convert inspect opt-125m-flax
  opt-convert inspect my-model/tf_model.h5 --json
""",
    "merge-adapter": """\
examples:
  opt-convert merge-adapter facebook/opt-125m my-adapter my-model --to safetensors
  opt-convert merge-adapter my-base my-adapter my-model-flax --to flax --dtype float32
""",
    "verify": """\
examples:
  opt-convert verify my-model
  opt-convert verify opt-125m-flax facebook/opt-125m
  opt-convert verify my-model --framework all
  opt-convert verify my-model --json > my-model.verified.json
  opt-convert verify my-copy my-model.verified.json
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its arguments; default those of the process.

    Returns:
        The exit code. A wrong command line ends the process with code 2, as argparse does.
    """
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return arguments.run(arguments)
    except OPTError as error:
        return _failed(str(error))
    except BrokenPipeError:
        # Whoever read the output has had enough; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}. {_left(error)}")
    except MemoryError as error:
        return _failed(f"The memory is too small for the largest tensor. {_left(error)}")
    except KeyboardInterrupt as error:
        _failed(f"Interrupted. {_left(error)}")
        return INTERRUPTED


def _left(error: BaseException) -> str:
    """What an interrupted command has left, by the notes of its error."""
    return " ".join(getattr(error, "__notes__", ())) or "Nothing was left half-written."


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"opt-convert: warning: {message}", file=sys.stderr)


def _failed(message: str) -> int:
    print(f"opt-convert: {message}", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opt-convert",
        description="Convert, inspect and verify OPT checkpoints of any format, without any framework.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_EXAMPLES[name] + "\n" + _EPILOGUE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("src", metavar="SRC", help="directory, weight file or hub id")
        return command

    command = add("convert", _run_convert, "write a checkpoint in another format; every bit stays as it is")
    _add_target(command, *TARGETS, QUANTIZED)
    command.add_argument(
        "--dequantize",
        action="store_true",
        help="of a SRC in few bits write the numbers, in float32, that its integers stand for",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be written and how much of the disk it takes; write nothing",
    )
    command.add_argument("--verify", action="store_true", help="compare DST with SRC afterwards, as the command verify")
    _add_framework(command)
    _add_common(command)

    command = add("merge-adapter", _run_merge_adapter, "write a base model with a LoRA adapter merged into its weights")
    command.add_argument("adapter", metavar="ADAPTER", help="directory that PEFT or save_adapter wrote")
    _add_target(command, *TARGETS)
    _add_common(command)

    command = add("doctor", _run_doctor, "look for what is known to be wrong with checkpoints that are about")
    _add_common(command)

    command = add("inspect", _run_inspect, "say what is in a checkpoint")
    _add_common(command)

    command = add(
        "verify", _run_verify, "check that a checkpoint is whole, and that it holds the same model as another"
    )
    command.add_argument(
        "other",
        metavar="OTHER",
        nargs="?",
        help="directory, weight file or hub id to compare with, or a .json that verify --json printed of one",
    )
    command.add_argument("--against", metavar="OTHER", help="another way to name OTHER")
    _add_framework(command)
    command.add_argument(
        "--function",
        action=argparse.BooleanOptionalAction,
        help="also compute both models in NumPy (default: up to 200 million parameters)",
    )
    _add_common(command)
    return parser


def _add_target(command: argparse.ArgumentParser, *formats: str) -> None:
    """What every command that writes a checkpoint takes."""
    command.add_argument("dst", metavar="DST", help="new directory; it appears whole or not at all")
    command.add_argument("--to", required=True, choices=formats, help="format of the new weights")
    command.add_argument("--dtype", help="store float32, float16, bfloat16 or float64; default: as they are")
    command.add_argument("--max-shard-size", metavar="SIZE", help="longest weight file: 5GB (default), 500MB, 1GiB")
    command.add_argument(
        "--model-parts", metavar="N", type=int, help="metaseq: N model-parallel files; default: one file, restored.pt"
    )
    command.add_argument("--force", action="store_true", help="replace files of the same names in an existing DST")
    command.add_argument(
        "--resume", action="store_true", help="go on with what an interrupted run of the same command left beside DST"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def _add_framework(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--framework",
        action="append",
        default=[],
        choices=(REFERENCE, *FRAMEWORKS, ALL),
        help="compute the same ids there too, and hold it against the NumPy reference; all: whatever is installed; "
        "may be repeated",
    )


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", metavar="PATH", help="configuration of SRC; default: config.json beside its weights"
    )
    command.add_argument("--json", action="store_true", help="print one JSON document")
    hub = command.add_argument_group("where SRC is a hub id")
    hub.add_argument("--revision", help="branch, tag or commit")
    hub.add_argument("--cache-dir", metavar="DIR", help="the hub's cache")
    hub.add_argument("--token", help="access token")
    hub.add_argument("--offline", action="store_true", help="use the cache only")


def _hub(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "revision": arguments.revision,
        "cache_dir": arguments.cache_dir,
        "token": arguments.token,
        "local_files_only": arguments.offline,
    }


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, default=str))


def _run_convert(arguments: argparse.Namespace) -> int:
    options = {**_writing_options(arguments), "dequantize": arguments.dequantize}
    if arguments.dry_run:
        return _show_plan(plan_conversion(arguments.src, arguments.dst, arguments.to, **options), arguments)
    options.update(resume=arguments.resume, progress=not arguments.quiet)
    result = convert(arguments.src, arguments.dst, arguments.to, **options)
    verification = None
    if arguments.verify:
        verification = verify(
            arguments.src,
            result.target,
            frameworks=arguments.framework,
            config=arguments.config,
            **_hub(arguments),
        )
    _show_conversion(result, verification, arguments)
    return OK if verification is None or verification.holds else DIFFERENT


def _run_merge_adapter(arguments: argparse.Namespace) -> int:
    options = _writing_options(arguments)
    options.update(resume=arguments.resume, progress=not arguments.quiet)
    result = merge_adapter(arguments.src, arguments.adapter, arguments.dst, arguments.to, **options)
    _show_conversion(result, None, arguments)
    return OK


def _writing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": arguments.dtype,
        "max_shard_size": arguments.max_shard_size,
        "model_parts": arguments.model_parts,
        "config": arguments.config,
        "force": arguments.force,
        **_hub(arguments),
    }


def _show_conversion(result: Conversion, verification: Verification | None, arguments: argparse.Namespace) -> None:
    for warning in result.warnings:
        _show_warning(warning)
    if arguments.json:
        document = vars(result)
        _print_json(document if verification is None else {**document, "verification": verification.to_dict()})
    elif not arguments.quiet:
        print(
            f"{result.source_format} -> {result.target_format}: {result.tensors} tensors, "
            f"{_bytes(result.total_bytes)}, in {result.target}"
        )
        for name in result.files:
            print(f"  {name}")
        if verification is not None:
            show_verification(verification)


def _show_plan(plan: PlannedConversion, arguments: argparse.Namespace) -> int:
    for warning in plan.warnings:
        _show_warning(warning)
    if arguments.json:
        _print_json(plan.to_dict())
    else:
        print(f"{plan.source_format} -> {plan.target_format}, would be in {plan.target}; nothing was written")
        for name in plan.files:
            held = [tensor.bytes for tensor in plan.tensors if tensor.file == name]
            print(f"  {name:40}" + (f" {_plural(len(held), 'tensor'):>12} {_bytes(sum(held)):>9}" if held else ""))
        print(f"needs {_bytes(plan.needed_bytes)} of the disk, which has {_bytes(plan.free_bytes)} free")
    return OK if plan.fits else _failed(no_room(plan.target, plan.needed_bytes, plan.free_bytes))


def _run_doctor(arguments: argparse.Namespace) -> int:
    result = doctor(arguments.src, config=arguments.config, **_hub(arguments))
    if arguments.json:
        _print_json(result.to_dict())
    else:
        _show_diagnosis(result)
    return OK if result.healthy else DIFFERENT


def _show_diagnosis(result: Diagnosis) -> None:
    print(f"{result.source}: {', '.join(result.formats) or 'no weights that could be read'}")
    for finding in result.findings:
        print(f"\n  {finding.severity} {finding.state}: {finding.what}")
        print(f"    where  {finding.where}\n    do     {finding.remedy}")
    problems = sum(finding.severity == PROBLEM for finding in result.findings)
    print("nothing known to be bad was found" if not result.findings else f"\n{_plural(problems, 'problem')}")


def _run_inspect(arguments: argparse.Namespace) -> int:
    result = inspect(arguments.src, config=arguments.config, **_hub(arguments))
    if arguments.json:
        _print_json(result.to_dict())
    else:
        _show_inspection(result)
    return OK


def _run_verify(arguments: argparse.Namespace) -> int:
    if arguments.other is not None and arguments.against is not None:
        return _failed("OTHER is named twice. Name it once.")
    result = verify(
        arguments.src,
        arguments.other if arguments.against is None else arguments.against,
        function=arguments.function,
        frameworks=arguments.framework,
        config=arguments.config,
        **_hub(arguments),
    )
    if arguments.json:
        _print_json(result.to_dict())
    else:
        show_verification(result)
    return OK if result.holds else DIFFERENT


def _show_inspection(result: Inspection) -> None:
    config = result.config
    print(f"source      {result.source}")
    print(f"format      {result.format}, {_plural(len(result.files), 'file')}")
    print(
        f"parameters  {result.parameters:,} in {_plural(len(result.tensors), 'tensor')}, {_bytes(result.total_bytes)}"
    )
    print(f"class       {result.architecture}")
    print(f"dtypes      {', '.join(f'{name} ×{count}' for name, count in result.dtypes.items())}")
    print(
        f"model       {config['num_hidden_layers']} layers, hidden {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads, ffn {config['ffn_dim']}, vocabulary {config['vocab_size']}, "
        f"positions {config['max_position_embeddings']}, "
        f"{'pre' if config['do_layer_norm_before'] else 'post'}-norm, "
        f"head {'tied' if config['tie_word_embeddings'] else 'untied'}"
    )
    print()
    groups = result.grouped()
    width = max((_NAME_WIDTH, *(len(pattern) for pattern, _, _ in groups)))
    for pattern, tensor, count in groups:
        many = f"  ×{count}" if count > 1 else ""
        print(f"  {pattern:{width}} {tensor.dtype:9} {list(tensor.shape)}{many}")
    if result.problem is not None:
        print(f"\nThis checkpoint would not load. {result.problem}")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
