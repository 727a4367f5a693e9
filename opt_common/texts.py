"""What commands read and write: texts from files, standard input or lines of JSON, and JSON documents."""

import json
import sys
from pathlib import Path
from typing import Any, cast

from opt_common.errors import InputError, OPTError


def read_texts(
    path: str, *, field: str, whole: bool = False, json_lines: bool = False, error: type[OPTError] = InputError
) -> list[str]:
    """The texts of a file.

    Args:
        path: of the file; "-" is standard input. A name that ends in .jsonl means lines of JSON.
        field: what the text is called in a line's object.
        whole: whether a file without JSON is one text, not one a line.
        json_lines: whether lines are JSON whatever the name.
        error: class of what is raised.

    Raises:
        OPTError: for a file that cannot be read or holds no text.
    """
    name = "standard input" if path == "-" else path
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{name} cannot be read: {problem}.") from None
    # Not splitlines(): that would also split at separators which JSON leaves as they are.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise error(f"{name} holds no {field}. Write {'some' if whole else 'one in each line'}.")
    if json_lines or path.endswith(".jsonl"):
        return [_text_of(line, field, f"{name}, line {number}", error) for number, line in lines]
    return [text] if whole else [line.rstrip("\r") for _, line in lines]


def _text_of(line: str, field: str, where: str, error: type[OPTError]) -> str:
    try:
        value: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as problem:
        raise error(f"{where}: not readable as JSON: {problem}.") from None
    text: Any = cast(dict[str, Any], value).get(field) if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise error(f'{where}: expected a string or an object with a "{field}", got {line[:80]}.')
    return text


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as problem:
        raise InputError(f"{path} cannot be written: {problem}.") from None
