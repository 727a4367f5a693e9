"""Files that the frameworks' own functions save, and the presets of KerasHub: how to tell them and what goes with them.

None of them is a format of the Hugging Face hub. In a directory they are looked for last, and where there is more than
one of them a user has to name it.
"""

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, cast

from opt_common import json_file
from opt_common.errors import CheckpointError
from opt_common.links import refuse_links_outside

KERAS = "keras"
"""Name of the format of Keras 3: `.weights.h5`, `.keras`, and shards with their `.weights.json`."""

KERAS_HUB = "keras-hub"
"""Name of the format of a preset of KerasHub: a directory."""

ORBAX = "orbax"
"""Name of the format of a checkpoint of Orbax: a directory."""

KERAS_WEIGHTS, KERAS_ARCHIVE, KERAS_INDEX = ".weights.h5", ".keras", ".weights.json"
"""How the names of Keras' files end."""

STATE_DICTS = ("model.pt", "model.pth", "state_dict.pt", "state_dict.pth")
"""Names under which a directory's PyTorch state dict is found unnamed; any other has to be named."""

_ORBAX_TREE = "_METADATA"
_ORBAX_MARKS = ("manifest.ocdbt", "_CHECKPOINT_METADATA", "commit_success.txt")
_CONFIG_FILE = "config.json"
_PLAIN_SHARD = re.compile(r"\w[\w.-]*\.weights\.h5", re.ASCII)


def native_weights(directory: Path, names: Set[str]) -> tuple[str, tuple[Path, ...]] | None:
    """The format and the files of what a framework saved in a directory; None if there is nothing of the kind.

    Args:
        directory: a directory that exists.
        names: names of the files in it.

    Raises:
        CheckpointError: if there is more than one, or a file that an index names is absent.
    """
    if (found := orbax_directory(directory)) is not None:
        return ORBAX, (found,)
    if is_keras_hub(directory):
        index = f"model{KERAS_INDEX}"
        name = f"model{KERAS_WEIGHTS}" if f"model{KERAS_WEIGHTS}" in names else index
        return KERAS_HUB, keras_files(directory / name)
    indexes = [name for name in names if name.endswith(KERAS_INDEX)]
    sharded = {path.name for name in indexes for path in keras_files(directory / name)}
    singles = [name for name in names if name.endswith((KERAS_WEIGHTS, KERAS_ARCHIVE)) and name not in sharded]
    candidates = sorted([*indexes, *singles, *(name for name in STATE_DICTS if name in names)])
    if len(candidates) > 1:
        raise CheckpointError(f"{directory} holds several checkpoints: {', '.join(candidates)}. Name one of them.")
    if not candidates:
        return None
    path = directory / candidates[0]
    return ("torch", (path,)) if path.name in STATE_DICTS else (KERAS, keras_files(path))


def keras_files(path: Path) -> tuple[Path, ...]:
    """The weight files that a file of Keras' stands for: itself, or the shards that an index names.

    Raises:
        CheckpointError: if an index is damaged, hostile or names absent files.
    """
    if not path.name.endswith(KERAS_INDEX):
        return (path,)
    weight_map: Any = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{path}: expected an object "weight_map" of layers and files. Fetch the file again.')
    shards: set[Any] = set()
    for value in cast("dict[str, Any]", weight_map).values():
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        shards.update(value if isinstance(value, str) else repr(value) for value in values)
    if bad := sorted(name for name in shards if not _PLAIN_SHARD.fullmatch(name)):
        raise CheckpointError(
            f"{path} names {', '.join(bad[:5])}, expected plain names of *{KERAS_WEIGHTS} files. "
            f"Don't trust this checkpoint."
        )
    if missing := sorted(name for name in shards if not (path.parent / name).is_file()):
        raise CheckpointError(f"{path} names files that are absent: {', '.join(missing[:5])}. Fetch them.")
    found = tuple(path.parent / name for name in sorted(shards))
    refuse_links_outside(path, found)
    return found


def is_keras_hub(directory: Path) -> bool:
    """Whether a directory is a preset of KerasHub, by the class that its configuration names."""
    path = directory / _CONFIG_FILE
    try:
        return path.is_file() and str(read_json(path).get("registered_name")).startswith("keras_hub>")
    except CheckpointError:
        return False


def orbax_directory(directory: Path) -> Path | None:
    """The directory that holds the arrays of an Orbax checkpoint: a directory itself, or the only one inside.

    A step of a `CheckpointManager` and a checkpoint of Orbax' later interface have one directory for each item.

    Raises:
        CheckpointError: if there is more than one inside.
    """
    if _is_orbax(directory):
        return directory
    if not any((directory / name).is_file() for name in _ORBAX_MARKS):
        return None
    items = sorted(path for path in directory.iterdir() if path.is_dir() and (path / _ORBAX_TREE).is_file())
    if len(items) > 1:
        names = ", ".join(path.name for path in items)
        raise CheckpointError(f"{directory} holds several items: {names}. Name the directory of one.")
    return items[0] if items else None


def home_of(path: Path) -> Path:
    """The directory of the configuration, the generation configuration and the tokenizer that go with weights.

    That is the directory of a file, and a directory itself. Orbax lets nobody put files into what it saves, so that
    they may lie in a directory above, up to that of a `CheckpointManager`.
    """
    if not path.is_dir():
        return path.parent
    if (path / _CONFIG_FILE).is_file() or orbax_directory(path) is None:
        return path
    above = (path.resolve().parent, path.resolve().parent.parent)
    return next((directory for directory in above if (directory / _CONFIG_FILE).is_file()), path)


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        content: Any = json_file.read_json(path)
    except (FileNotFoundError, json_file.UnreadableError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}. Fetch the file again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}. Fetch the file again.")
    return cast("dict[str, Any]", content)


def _is_orbax(directory: Path) -> bool:
    return (directory / _ORBAX_TREE).is_file() and any((directory / name).is_file() for name in _ORBAX_MARKS)
