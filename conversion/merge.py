"""A base checkpoint with an adapter in its weights, tensor by tensor: what `opt-convert merge-adapter` writes."""

import contextlib
import dataclasses
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.adapter import Adapter, checked_adapter, open_adapter
from conversion.checkpoint import Checkpoint, checked_parameters
from conversion.identity import Identity, identities
from conversion.plan import ReadParameter
from conversion.tensors import Array, fetch, to_dtype
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError
from opt_common.hub import QUANTIZED
from opt_common.lora import STORED_PREFIX, AdaptedLayer, AdapterTable
from opt_common.params import Head, Parameter, parameter_table
from opt_common.quantization import StoredPart, stored_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """The parameters of one model, wherever they come from.

    Attributes:
        config: the model's configuration.
        head: what stands on the decoder.
        table: the parameters; of quantised matrices that stay so, their parts.
        dtypes: the type of each, by canonical name; parts have their own.
        read: gives each, in the canonical layout and in that type.
        identities: what the file system noted of the files before they were opened.
    """

    config: OPTConfig
    head: Head | None
    table: tuple[Parameter, ...]
    dtypes: Mapping[str, np.dtype[Any]]
    read: ReadParameter
    identities: Mapping[Path, Identity]


def weights_of(checkpoint: Checkpoint, *, dequantize: bool = False) -> Weights:
    """The parameters of a checkpoint as they are.

    Args:
        checkpoint: what holds them.
        dequantize: whether matrices that are quantised become the numbers that they stand for, in float32.

    Raises:
        CheckpointError: if they do not fit its configuration, or they are quantised and that is not asked for.
    """
    where = checkpoint.files[0].parent
    if dequantize and checkpoint.storage is None:
        raise CheckpointError(f"{where} holds no quantised weights. Leave out --dequantize (dequantize=True).")
    if checkpoint.storage is not None and not dequantize:
        raise CheckpointError(
            f"{where} is quantised ({checkpoint.storage}), and this format holds numbers. Use --dequantize "
            f"(dequantize=True) for the numbers that its integers stand for, or --to {QUANTIZED} for a copy."
        )
    table = parameter_table(checkpoint.config, head=checkpoint.head)
    checked_parameters(checkpoint, table, other_heads=False)
    return Weights(
        config=checkpoint.config.replace(quantization=None) if dequantize else checkpoint.config,
        head=checkpoint.head,
        table=table,
        dtypes={parameter.name: checkpoint.info(parameter.name).dtype for parameter in table},
        read=lambda parameter: checkpoint.read(parameter.name),
        identities=checkpoint.identities,
    )


def quantized_weights_of(checkpoint: Checkpoint, *, dequantize: bool = False) -> Weights:
    """The same of a quantised checkpoint, whose matrices stay their parts.

    Raises:
        CheckpointError: if they do not fit its configuration, or are not quantised, or are asked not to be.
    """
    if dequantize or checkpoint.storage is None:
        raise CheckpointError(
            f"--to {QUANTIZED} copies quantised weights as they are: leave out --dequantize."
            if dequantize
            else f"{checkpoint.files[0].parent} is not quantised, and --to {QUANTIZED} rounds nothing. Load it with "
            f"quantization=…, and save_pretrained."
        )
    table = parameter_table(checkpoint.config, head=checkpoint.head)
    checked_parameters(checkpoint, table, other_heads=False)
    kept = {parameter.name for parameter in table if checkpoint.storage_of(parameter.name) is None}

    def read(parameter: Parameter) -> Array:
        if isinstance(parameter, StoredPart):
            return checkpoint.stored_part(parameter.whole.name, parameter.index)
        return checkpoint.read(parameter.name)

    return Weights(
        config=checkpoint.config,
        head=checkpoint.head,
        table=stored_table(table, checkpoint.storage),
        dtypes={name: checkpoint.info(name).dtype for name in kept},
        read=read,
        identities=checkpoint.identities,
    )


@contextlib.contextmanager
def merged_weights(checkpoint: Checkpoint, directory: str | os.PathLike[str]) -> Generator[Weights]:
    """The parameters of a base checkpoint with an adapter merged into them.

    An adapted weight becomes `weight + scaling * B A`, computed in float32, or in float64 where the base is in it, and
    rounded once to the base's type. Biases and modules that the adapter stores whole take the place of the base's; a
    head that the base has not is the adapter's.

    Raises:
        ConfigError: if the adapter asks for what is not supported.
        CheckpointError: if base or adapter is damaged, they do not fit each other, or the base is quantised.
    """
    if checkpoint.storage is not None:
        raise CheckpointError(
            f"{checkpoint.files[0].parent} is quantised ({checkpoint.storage}), so that nothing can be merged into it. "
            "Merge into the checkpoint that it was rounded from."
        )
    found = identities([Path(directory)])
    with open_adapter(directory) as adapter:
        config, head = _config_of(checkpoint, adapter), adapter.head or checkpoint.head
        adapted, names = checked_adapter(adapter, config, None if adapter.bare else head or "lm")
        table = parameter_table(config, head=head)
        absent = [parameter for parameter in adapted.others if parameter.name not in checkpoint.names]
        checked_parameters(checkpoint, [row for row in table if row not in absent], new=absent)
        usual = checkpoint.info(table[0].name).dtype
        dtypes = {row.name: checkpoint.info(row.name).dtype if row.name in checkpoint.names else usual for row in table}
        yield Weights(
            config=config,
            head=head,
            table=table,
            dtypes=dtypes,
            read=_reader(checkpoint, adapter, adapted, names, dtypes),
            identities={**checkpoint.identities, **found},
        )


def _config_of(checkpoint: Checkpoint, adapter: Adapter) -> OPTConfig:
    """The base's configuration, with as many labels as a classifier in the adapter has."""
    score = adapter.tensors.get(f"{STORED_PREFIX}score.weight")
    labels = checkpoint.config.num_labels if score is None or not score.shape else score.shape[0]
    return checkpoint.config if labels == checkpoint.config.num_labels else checkpoint.config.replace(num_labels=labels)


def _reader(
    checkpoint: Checkpoint,
    adapter: Adapter,
    adapted: AdapterTable,
    names: Mapping[Parameter, str],
    dtypes: Mapping[str, np.dtype[Any]],
) -> ReadParameter:
    layers = {layer.weight.name: layer for layer in adapted.layers}
    whole = {parameter.name: name for parameter, name in names.items()}

    def read(parameter: Parameter) -> Array:
        name = parameter.name
        array = adapter.read(whole[name]) if name in whole else checkpoint.read(name)
        if name in layers:
            a, b = (adapter.read(names[matrix]) for matrix in layers[name].matrices)
            array = _merged(array, a, b, layers[name])
        return to_dtype(array, dtypes[name], name)

    return read


def _merged(weight: Array, a: Array, b: Array, layer: AdaptedLayer) -> Array:
    wide = np.dtype(np.float64 if weight.dtype == np.float64 else np.float32)
    merged = b.astype(wide) @ a.astype(wide)
    merged *= wide.type(layer.scaling)
    merged += fetch(weight).astype(wide, copy=False)
    return merged
