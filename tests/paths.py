"""Where the tests find data that is not Python."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository."""

OWN_GOLDENS = Path(__file__).parent / "goldens"
"""This repository's golden data."""

GOLDENS = Path(os.environ.get("OPT_GOLDENS") or OWN_GOLDENS)
"""The golden data: this repository's, or a directory that `goldens/regenerate.py` wrote, named by `OPT_GOLDENS`."""

VOCAB_DIR = Path(os.environ["OPT_VOCAB_DIR"]) if os.environ.get("OPT_VOCAB_DIR") else None
"""A directory with OPT's own `vocab.json` and `merges.txt`, which this repository has not; None if not named."""
