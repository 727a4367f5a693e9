"""Which model a command of `opt-torch`, `opt-tf` and `opt-flax` takes, and how it is fetched."""

import argparse
from typing import Any

from opt_common.hub import BUNDLED_MODEL
from opt_common.pretrained import MODEL_DTYPES


def add_model(command: argparse.ArgumentParser) -> None:
    """Declare the options that name a model."""
    command.add_argument(
        "--model",
        default=BUNDLED_MODEL,
        metavar="PATH_OR_ID",
        help=f"a directory or a hub id, in any format (default {BUNDLED_MODEL}, which comes with this package)",
    )
    command.add_argument(
        "--dtype",
        choices=(*MODEL_DTYPES, "auto"),
        default=None,
        help=f"dtype of the arithmetic (default {MODEL_DTYPES[0]}; auto: as stored)",
    )
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub repository")
    command.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")
    command.add_argument("--token", help="access token of the hub")
    command.add_argument("--offline", action="store_true", help="use only what is already there")


def source_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `from_pretrained`, of model and tokenizer, that say how they are fetched."""
    return {
        "revision": arguments.revision,
        "cache_dir": arguments.cache_dir,
        "token": arguments.token,
        "local_files_only": arguments.offline,
    }
