"""What Keras 3 saves of this package's models: `save_weights("x.weights.h5")` and `save("x.keras")`, without Keras.

A `.keras` is a zip archive that holds such a `.weights.h5`, stored as it is, beside the description of the model. Of
that the class and the configuration are read; nothing that it names is imported.

Tensors are named after the modules around them and the leaf names of Keras: `model/decoder/layers/0/fc1/kernel`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from conversion.formats.keras_variables import KerasVariables, Step, Variable
from conversion.formats.zip_records import records
from conversion.tensors import Array, TensorInfo, damaged, map_file
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError
from opt_common.json_file import MAX_BYTES, UnreadableError, parse_json
from opt_common.native_files import KERAS_ARCHIVE
from opt_common.params import ARCHITECTURES, LEAVES, Scheme, module_kind

SCHEME: Scheme = "keras"

_DECODER = ("model", "decoder")
_LISTED = "layers"
_ARCHIVED_WEIGHTS, _ARCHIVED_CONFIG = "model.weights.h5", "config.json"
_MAX_CONFIG_BYTES = MAX_BYTES
_PACKAGE = "opt_tf>TF"


class KerasReader:
    """An open file of Keras'.

    Attributes:
        config: the configuration that a `.keras` holds; None for weights alone.
    """

    def __init__(self, path: Path) -> None:
        buffer = map_file(path)
        self.config: OPTConfig | None = None
        if path.name.endswith(KERAS_ARCHIVE):
            held = records(path, buffer)
            if missing := [name for name in (_ARCHIVED_WEIGHTS, _ARCHIVED_CONFIG) if name not in held]:
                raise damaged(path, f"the archive has no {', '.join(missing)}")
            start, size = held[_ARCHIVED_CONFIG]
            if size > _MAX_CONFIG_BYTES:
                raise damaged(path, f"its {_ARCHIVED_CONFIG} has {size} bytes")
            self.config = _config(path, buffer[start : start + size])
            start, size = held[_ARCHIVED_WEIGHTS]
            self._held = KerasVariables(path, memoryview(buffer)[start : start + size])
        else:
            self._held = KerasVariables(path, buffer)
        self.scheme: Scheme = SCHEME
        self._stored: dict[str, Variable] = {}
        for variable in self._held.variables:
            name = "/".join((*_modules(variable.steps), _leaf(variable)))
            if name in self._stored:
                raise damaged(path, f"{name} is there twice")
            self._stored[name] = variable
        self.tensors: Mapping[str, TensorInfo] = {name: held.info for name, held in self._stored.items()}

    def read(self, name: str) -> Array:
        return self._held.read(self._stored[name])

    def close(self) -> None:
        self._held.close()


def open_reader(path: Path) -> KerasReader:
    """Open a file, find its variables and validate them against the size of the file.

    Raises:
        CheckpointError: for anything but what Keras 3 writes of a model of `opt_tf`.
    """
    return KerasReader(path)


def _modules(steps: Sequence[Step]) -> list[str]:
    """The modules around a variable, as the model calls them."""
    if len(steps) < 2 or steps[0].group != _LISTED:
        return _numbered(steps)
    # Keras keeps the submodules of a model in a list of its own, where only their names tell them apart. A shard has
    # no name for a layer none of whose own variables it holds, as the one around the decoder.
    inner = _numbered(steps[2:])
    around = _DECODER[0] if inner[:1] == [_DECODER[1]] else steps[1].name or steps[1].group
    return [around, *inner]


def _numbered(steps: Sequence[Step]) -> list[str]:
    """The names of groups, in a list of layers the place of each."""
    result: list[str] = []
    for step in steps:
        if result and result[-1] == _LISTED:
            told = re.fullmatch(r"layers\.(\d{1,6})", step.name or "", re.ASCII)
            result.append(told[1] if told else str(step.number))
        else:
            result.append(step.group)
    return result


def _leaf(variable: Variable) -> str:
    """The leaf name of a variable, by its number and the kind of its layer; a name of its own where there is none."""
    modules = _modules(variable.steps)
    kind = module_kind(modules[-1]) if modules else "linear"
    leaves = [LEAVES[key].keras for key in (f"{kind}.weight", f"{kind}.bias") if key in LEAVES]
    return leaves[variable.number] if variable.number < len(leaves) else f"vars.{variable.number}"


def _config(path: Path, content: bytes) -> OPTConfig:
    """The configuration in the description of a model."""
    try:
        described: Any = parse_json(content)
    except UnreadableError as error:
        raise damaged(path, f"its {_ARCHIVED_CONFIG} is no JSON ({error})") from None
    described = cast("dict[str, Any]", described) if isinstance(described, dict) else {}
    name, options = described.get("registered_name"), described.get("config")
    values: Any = cast("dict[str, Any]", options).get("config") if isinstance(options, dict) else None
    architecture = str(name).removeprefix(_PACKAGE)
    if architecture not in ARCHITECTURES.values() or not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a {name!r:.80}, expected a model of opt_tf, such as {_PACKAGE}OPTForCausalLM."
        )
    # The class is what was saved; a configuration may still name that of the checkpoint it came from.
    return OPTConfig.from_dict({**cast("dict[str, Any]", values), "architectures": [architecture]})
