"""Read and write LoRA adapters in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from conversion.dtypes import BY_NUMPY
from conversion.formats import safetensors_file, torch_file
from conversion.plan import ReadParameter
from conversion.tensors import Array, Reader, TensorInfo, TensorSpec
from conversion.write import staged
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError, join_problems
from opt_common.lora import ADAPTER_CONFIG_FILE, STORED_PREFIX, AdapterTable, LoraConfig, adapter_table
from opt_common.params import HEAD_MODULES, Head, Parameter

WEIGHTS_FILE = "adapter_model.safetensors"
_READERS = {WEIGHTS_FILE: safetensors_file.open_reader, "adapter_model.bin": torch_file.open_reader}
"""Weight file -> how to open it; the first is what PEFT writes today, the second what it wrote until 2023."""


class Adapter:
    """An open adapter. Close it, or use it in a `with` statement.

    Attributes:
        lora: its configuration.
        path: its weight file.
        tensors: dtype and shape of every tensor, by the name in the file.
    """

    def __init__(self, directory: Path) -> None:
        self.lora = LoraConfig.from_json_file(directory / ADAPTER_CONFIG_FILE)
        found = [name for name in _READERS if (directory / name).is_file()]
        if not found:
            raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}. Name a directory that an adapter was saved to.")
        self.path = directory / found[0]
        self._reader: Reader = _READERS[found[0]](self.path)
        self.tensors: Mapping[str, TensorInfo] = self._reader.tensors

    @property
    def head(self) -> Head | None:
        """The head whose tensors the adapter has; None for none."""
        for name in self.tensors:
            module = name.removeprefix(STORED_PREFIX).partition(".")[0]
            if module in HEAD_MODULES:
                return HEAD_MODULES[module]
        return None

    @property
    def bare(self) -> bool:
        """Whether it was trained on a decoder without a head."""
        return any(name.startswith(f"{STORED_PREFIX}decoder.") for name in self.tensors)

    def read(self, name: str) -> Array:
        """A tensor in PyTorch's layout and the stored dtype, read-only."""
        return self._reader.read(name)

    def close(self) -> None:
        """Let go of the file."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Open an adapter that PEFT or this package wrote.

    Raises:
        ConfigError: if `adapter_config.json` is absent, or asks for what this package doesn't support.
        CheckpointError: if the weights are absent, damaged or hostile.
    """
    return Adapter(Path(directory))


def checked_adapter(
    adapter: Adapter, config: OPTConfig, head: Head | None
) -> tuple[AdapterTable, Mapping[Parameter, str]]:
    """Hold an adapter against a model.

    Returns:
        What the adapter consists of, and the name in the file of each of its tensors.

    Raises:
        ConfigError: if the adapter's configuration adapts nothing in such a model.
        CheckpointError: naming every missing, unexpected and mis-shaped tensor, and every one that isn't floating.
    """
    table = adapter_table(config, adapter.lora, head)
    names = {parameter: _name_in(adapter, table.stored_name(parameter)) for parameter in table.parameters}
    # PEFT stores an adapted head's own weight too.
    copies = {layer.weight: f"{STORED_PREFIX}{layer.module}.base_layer.weight" for layer in table.layers}
    names |= {weight: name for weight, name in copies.items() if name in adapter.tensors}
    expected = set(names.values())
    problems = [f"missing: {name}." for name in names.values() if name not in adapter.tensors]
    problems += [f"unexpected: {name}." for name in adapter.tensors if name not in expected]
    for parameter, name in names.items():
        info = adapter.tensors.get(name)
        if info is not None and info.shape != parameter.shape:
            problems.append(f"shape: {name} is {list(info.shape)}, expected {list(parameter.shape)}.")
        if info is not None and not BY_NUMPY[info.dtype].floating:
            problems.append(f"dtype: {name} is {info.dtype}, expected a floating-point type.")
    if problems:
        raise CheckpointError(f"{adapter.path} does not fit the model. {join_problems(problems)}")
    return table, names


def save_adapter(directory: str | os.PathLike[str], lora: LoraConfig, table: AdapterTable, read: ReadParameter) -> None:
    """Write an adapter that PEFT reads. The files appear whole or not at all; others in the directory stay.

    Args:
        directory: where to; made if it does not exist.
        lora: its configuration.
        table: what it consists of.
        read: gives each of its tensors, in PyTorch's layout.

    Raises:
        OSError: if the disk is full or not writable.
    """
    directory = Path(directory).resolve()
    by_name = {table.stored_name(parameter): parameter for parameter in table.parameters}
    specs = [TensorSpec(name=name, info=_info(read(parameter))) for name, parameter in sorted(by_name.items())]
    with staged(directory, WEIGHTS_FILE) as place:
        safetensors_file.write(place / WEIGHTS_FILE, specs, lambda name: read(by_name[name]))
        (place / ADAPTER_CONFIG_FILE).write_text(lora.to_json(), encoding="utf-8")


def _info(array: Array) -> TensorInfo:
    return TensorInfo(array.dtype, array.shape)


def _name_in(adapter: Adapter, name: str) -> str:
    """The name that a file has for a tensor: PEFT before 0.14 left `base_layer` out of biases."""
    older = name.replace(".base_layer.", ".")
    return older if name not in adapter.tensors and older in adapter.tensors else name
