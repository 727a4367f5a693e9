"""Digests of tensors in canonical form: what a tensor is, whatever file, format and layout it comes from."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from conversion.checkpoint import Checkpoint
from conversion.dtypes import BY_NUMPY
from conversion.tensors import Array, contiguous
from opt_common.errors import CheckpointError
from opt_common.json_file import UnreadableError, read_json

_ROWS_BYTES = 64 << 20
_MAX_SAVED_BYTES = 50_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digest:
    """What a tensor is.

    Attributes:
        dtype: canonical name of its dtype.
        shape: canonical shape.
        sha256: of its numbers, little-endian, in C order of the canonical layout.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def digest(checkpoint: Checkpoint, name: str) -> tuple[Digest, bool]:
    """The digest of a tensor, and whether all its numbers are finite; read once."""
    array = checkpoint.read(name)
    found, finite = hashlib.sha256(), True
    for rows in row_blocks(array):
        found.update(rows.reshape(-1).view(np.uint8).data)
        finite = finite and bool(np.isfinite(rows).all())
    dtype = BY_NUMPY[array.dtype].name
    return Digest(dtype=dtype, shape=tuple(map(int, array.shape)), sha256=found.hexdigest()), finite


def row_blocks(array: Array) -> Iterator[Array]:
    """An array a few rows at a time, C-contiguous; the same rows for arrays of one shape."""
    step = max(1, _ROWS_BYTES // max(1, array[:1].size * 8))
    for start in range(0, len(array), step):
        yield contiguous(array[start : start + step])


def saved_digests(path: Path) -> Mapping[str, Digest]:
    """The digests in what `opt-convert verify --json` has printed.

    Raises:
        CheckpointError: if the file is something else.
    """
    try:
        document: Any = read_json(path, most=_MAX_SAVED_BYTES)
        digests = cast("dict[str, Any]", document)["digests"]
        return {
            str(name): Digest(dtype=str(entry["dtype"]), shape=tuple(entry["shape"]), sha256=str(entry["sha256"]))
            for name, entry in cast("dict[str, Any]", digests).items()
        }
    except (FileNotFoundError, UnreadableError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds no digests ({error}), expected what `opt-convert verify SRC --json` prints."
        ) from None
