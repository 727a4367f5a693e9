"""Reading a JSON file that nobody vouches for: of a limited size, without keys that occur twice."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 4_000_000
"""Longest file that is read unless a caller allows more. Parsed JSON takes up to some twenty times its length."""


class UnreadableError(Exception):
    """A file that is there, but is no JSON; the text says why."""


def read_json(path: Path, *, most: int = MAX_BYTES) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: if there is none.
        UnreadableError: if it is no regular file, too long, not UTF-8, no JSON, or an object in it has a key twice.
    """
    try:
        size = path.stat().st_size
        # Before it is opened: opening a pipe would wait for its writer.
        if not path.is_file():
            raise UnreadableError("it is not a regular file")
        if size > most:
            raise UnreadableError(f"it has {size} bytes, expected {most} at most")
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None


def parse_json(data: bytes) -> Any:
    """What JSON says; how long it may be is for the caller to know.

    Raises:
        UnreadableError: if it is not UTF-8, no JSON, or an object in it has a key twice.
    """
    try:
        text = data.decode()
        content = json.loads(text, object_pairs_hook=unique)
        if "\\ud" in text or "\\uD" in text:
            # Half of a character can stand in JSON, but neither be printed nor written.
            json.dumps(content, ensure_ascii=False).encode()
        return content
    # ValueError: all of the above, or an integer of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise UnreadableError(str(error)) from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some keys and values; for `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: if a key occurs twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result
