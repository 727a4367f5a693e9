"""Presets of KerasHub: `keras_hub.models.OPTCausalLM.from_preset` loads them, `save_to_preset` writes them.

A preset is a directory: `config.json` (of KerasHub's own kind), `model.weights.h5` or shards of it, and the tokenizer.
The architecture is that of the pre-norm models with biases; `limits` says what it can't hold.

KerasHub numbers positions from 0 and has no rows for `opt_common.config.POSITION_OFFSET`: row 0 is never used, and row
1 at padding only, which nothing attends to. What is written has them in a group of its own, and the whole configuration
in `metadata.json`; KerasHub passes over both. Where they are absent, as in KerasHub's own files, the rows are zeros.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from conversion.dtypes import BY_NAME
from conversion.formats.hdf5_file import allocate, fill, h5py
from conversion.formats.keras_variables import KerasVariables, Variable
from conversion.tensors import Array, ReadNative, TensorInfo, TensorSpec, damaged, fetch, frozen, joined, map_file
from opt_common.config import POSITION_OFFSET, OPTConfig
from opt_common.errors import CheckpointError
from opt_common.native_files import read_json
from opt_common.params import LEAVES, Head, Parameter, Scheme, module_kind

SCHEME: Scheme = "keras"

WEIGHTS = "model.weights.h5"
"""The file of a preset that is written."""

TOKENIZER_ASSETS = {"vocab.json": "assets/tokenizer/vocabulary.json", "merges.txt": "assets/tokenizer/merges.txt"}
"""Files of a tokenizer -> where a preset has them."""

_KERAS_HUB_VERSION = "0.32.0"  # whose layout this is; KerasHub notes it, and reads those of any release
_KERAS_VERSION = "3.15.1"
_LAYER = "transformer_decoder"


_LISTED, _VARIABLES = "layers", "vars"
_FRONT_ROWS = "opt_models/embed_positions/vars/0"
_CONFIG_KEY = "opt_config"
_BACKBONE = "keras_hub>OPTBackbone"
_BFLOAT16 = BY_NAME["bfloat16"].numpy


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a preset has a module of OPT.

    Attributes:
        module: the module inside the decoder, or inside a decoder layer.
        groups: KerasHub's groups, inside the model or inside a decoder layer.
        heads: the axis of the stored kernel that is split into heads, None for a kernel that is not.
        in_layer: whether it is in each decoder layer.
    """

    module: str
    groups: str
    heads: int | None = None
    in_layer: bool = True


_PLACES = (
    _Place("embed_tokens", "token_and_position_embedding/token_embedding", in_layer=False),
    _Place("embed_positions", "token_and_position_embedding/position_embedding", in_layer=False),
    _Place("final_layer_norm", "layer_normalization", in_layer=False),
    _Place("self_attn/k_proj", "_self_attention_layer/key_dense", heads=1),
    _Place("self_attn/v_proj", "_self_attention_layer/value_dense", heads=1),
    _Place("self_attn/q_proj", "_self_attention_layer/query_dense", heads=1),
    _Place("self_attn/out_proj", "_self_attention_layer/output_dense", heads=0),
    _Place("self_attn_layer_norm", "_self_attention_layer_norm"),
    _Place("fc1", "_feedforward_intermediate_dense"),
    _Place("fc2", "_feedforward_output_dense"),
    _Place("final_layer_norm", "_feedforward_layer_norm"),
)
"""THE table of a preset's layers."""


class KerasHubReader:
    """An open weight file of a preset.

    Attributes:
        config: the configuration that the preset's `config.json` means.
    """

    def __init__(self, path: Path) -> None:
        self.config: OPTConfig | None = config_of(path.parent)
        self._held = KerasVariables(path, map_file(path))
        self.scheme: Scheme = SCHEME
        self._stored: dict[str, Variable] = {}
        self._front: Variable | None = None
        tensors: dict[str, TensorInfo] = {}
        for variable in self._held.variables:
            place, name = _meaning(variable)
            if name == _FRONT_ROWS:
                self._front = variable
                continue
            if name in self._stored:
                raise damaged(path, f"{name} is there twice")
            self._stored[name] = variable
            shape = _joined(variable.info.shape, place, self.config, path)
            tensors[name] = TensorInfo(variable.info.dtype, shape)
        self.tensors: Mapping[str, TensorInfo] = tensors
        table = tensors.get("model/decoder/embed_positions/embeddings")
        rows = None if table is None else TensorInfo(table.dtype, (POSITION_OFFSET, *table.shape[1:]))
        if self._front is not None and self._front.info != rows:
            raise damaged(path, f"{_FRONT_ROWS} does not fit the position table")

    def read(self, name: str) -> Array:
        array = self._held.read(self._stored[name])
        info = self.tensors[name]
        if array.ndim == len(info.shape) and array.shape != info.shape:
            rows = np.zeros((POSITION_OFFSET, *array.shape[1:]), array.dtype)
            if self._front is not None:
                rows[:] = fetch(self._held.read(self._front))
            array = frozen(joined([rows.reshape(-1), array.reshape(-1)], array.dtype))
        return array.reshape(info.shape)

    def close(self) -> None:
        self._held.close()


def open_reader(path: Path) -> KerasHubReader:
    """Open a weight file of a preset and validate it against the size of the file.

    Raises:
        CheckpointError: for anything but what KerasHub writes of an `OPTBackbone`.
    """
    return KerasHubReader(path)


def config_of(directory: Path) -> OPTConfig:
    """The configuration of a preset.

    Raises:
        CheckpointError: if it is of another model.
        ConfigError: if it is one that no model can have.
    """
    described = read_json(directory / "config.json")
    stated: Any = described.get("config")
    if described.get("registered_name") != _BACKBONE or not isinstance(stated, dict):
        raise CheckpointError(
            f"{directory} is a preset of {described.get('registered_name')!r:.80}, expected {_BACKBONE}."
        )
    stated = cast("dict[str, Any]", stated)
    fields = {
        "vocab_size": "vocabulary_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "hidden_size": "hidden_dim",
        "ffn_dim": "intermediate_dim",
        "max_position_embeddings": "max_sequence_length",
    }
    if missing := [name for name in fields.values() if name not in stated]:
        raise CheckpointError(f"{directory / 'config.json'} lacks {', '.join(missing)}. Fetch the file again.")
    values = {field: stated[name] for field, name in fields.items()}
    metadata = directory / "metadata.json"
    written: Any = read_json(metadata).get(_CONFIG_KEY) if metadata.is_file() else None
    if isinstance(written, dict):
        ours = cast("dict[str, Any]", written)
        # What KerasHub computes with is what KerasHub's configuration says.
        if all(ours.get(field) == value for field, value in values.items()):
            return OPTConfig.from_dict(ours)
    dropout = stated.get("dropout", 0.1)
    # KerasHub's attention drops out as its other layers do.
    values |= {"dropout": dropout, "attention_dropout": dropout, "architectures": ["OPTForCausalLM"]}
    return OPTConfig.from_dict(values)


def limits(config: OPTConfig, head: Head | None) -> list[str]:
    """What about a model KerasHub's architecture can't hold, a sentence each."""
    found = {
        "It is post-norm, as OPT-350m.": not config.do_layer_norm_before,
        "It has projections around its decoder, as OPT-350m.": config.has_projection,
        "It has no final layer norm.": config.do_layer_norm_before and not config.has_final_layer_norm,
        "Its linear layers have no biases, as Galactica-30b's.": not config.enable_bias,
        "Its layer norms have no weights, as Galactica-30b's.": not config.layer_norm_elementwise_affine,
        f"Its activation is {config.activation_function}; KerasHub's is relu.": config.activation_function != "relu",
        "Its head is not the token table.": head == "lm" and not config.tie_word_embeddings,
        "It has no language model's head but another.": head not in ("lm", None),
    }
    return [sentence for sentence, holds in found.items() if holds]


@dataclasses.dataclass(frozen=True)
class NativeTensor:
    """Path in the file and shape there of a parameter, or of the part of it in a window of the canonical array."""

    path: str
    shape: tuple[int, ...]
    window: tuple[slice, ...] = (slice(None),)


def native_tensors(parameter: Parameter, config: OPTConfig) -> tuple[NativeTensor, ...]:
    """Where a preset has a parameter of a model that KerasHub can hold: the position table in two places."""
    *_, leaf = parameter.path(SCHEME)
    inner = "/".join(parameter.path(SCHEME)[2:-1])
    in_layer = inner.startswith(f"{_LISTED}/")
    number, module = (int(inner.split("/")[1]), inner.split("/", 2)[2]) if in_layer else (0, inner)
    place = next(place for place in _PLACES if (place.module, place.in_layer) == (module, in_layer))
    layer = (f"{_LAYER}_{number}" if number else _LAYER,) if in_layer else ()
    path = "/".join((_LISTED, *layer, place.groups, _VARIABLES, str(_leaves(module).index(leaf))))
    shape = parameter.shape[::-1] if parameter.transposed(SCHEME) else parameter.shape
    if module == "embed_positions":
        rows, *others = shape
        return (
            NativeTensor(path, (rows - POSITION_OFFSET, *others), (slice(POSITION_OFFSET, None),)),
            NativeTensor(_FRONT_ROWS, (POSITION_OFFSET, *others), (slice(None, POSITION_OFFSET),)),
        )
    split = (config.num_attention_heads, config.head_dim)
    if place.heads is not None and len(shape) > 1:
        shape = (*shape[: place.heads], *split, *shape[place.heads + 1 :])
    elif place.heads == 1:
        shape = split
    return (NativeTensor(path, shape),)


def stored_bytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes in a file."""
    return info.nbytes


def write(path: Path, tensors: Sequence[TensorSpec], read: ReadNative) -> None:
    """Write the weights of a preset, one tensor at a time; the same tensors give the same bytes."""
    with h5py().File(path, "x", libver=("earliest", "v108")) as file:
        offsets: dict[str, int] = {}
        for tensor in tensors:
            # Keras 3 stores bfloat16 as it is, as two bytes that HDF5 knows nothing about, with a note.
            pair = tensor.info.dtype == _BFLOAT16
            dataset = allocate(file, tensor.name, tensor.info.shape, np.dtype("V2") if pair else tensor.info.dtype)
            if pair:
                dataset.attrs["dtype"] = _BFLOAT16.name
            offsets[tensor.name] = dataset.id.get_offset() or 0
    fill(path, offsets, tensors, read)


def documents(config: OPTConfig, dtype: str | None, parameters: int, *, tokenizer: bool) -> dict[str, dict[str, Any]]:
    """Contents of the JSON files of a preset.

    Args:
        config: the model's configuration.
        dtype: dtype of the weights, None where they have several.
        parameters: number of elements of all weights.
        tokenizer: whether the preset has the files of `TOKENIZER_ASSETS`.
    """
    backbone = {
        "name": "opt_backbone",
        "trainable": True,
        "dtype": _policy(dtype or "float32"),
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "hidden_dim": config.hidden_size,
        "intermediate_dim": config.ffn_dim,
        "dropout": config.dropout,
        "max_sequence_length": config.max_position_embeddings,
    }
    metadata = {
        "keras_version": _KERAS_VERSION,
        "keras_hub_version": _KERAS_HUB_VERSION,
        "parameter_count": parameters,
        "tasks": ["CausalLM"],
        _CONFIG_KEY: config.to_dict(),
    }
    files = {"config.json": _serialized("backbone", "OPTBackbone", backbone), "metadata.json": metadata}
    if tokenizer:
        settings = {
            "name": "opt_tokenizer",
            "trainable": True,
            "dtype": _policy("int32"),
            "config_file": "tokenizer.json",
            "sequence_length": None,
            "add_prefix_space": False,
            "unsplittable_tokens": ["<pad>", "</s>"],
        }
        files["tokenizer.json"] = _serialized("tokenizer", "OPTTokenizer", settings)
    return files


def _policy(dtype: str) -> dict[str, Any]:
    return {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}


def _serialized(module: str, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "module": f"keras_hub.src.models.opt.opt_{module}",
        "class_name": name,
        "config": config,
        "registered_name": f"keras_hub>{name}",
    }


def _leaves(module: str) -> list[str]:
    """Names of the variables of a module, in the order in which Keras' layers make them."""
    kind = module_kind(module.rpartition("/")[2])
    return [LEAVES[key].keras for key in (f"{kind}.weight", f"{kind}.bias") if key in LEAVES]


def _meaning(variable: Variable) -> tuple[_Place | None, str]:
    """The place of a variable in the table, and its name after OPT's modules; of an unknown one, its path."""
    steps, number = variable.steps, variable.number
    groups = [step.group for step in steps]
    unknown = "/".join([*groups, _VARIABLES, str(number)])
    if not groups or groups[0] != _LISTED:
        return None, unknown
    in_layer = len(groups) > 1 and groups[1].startswith(_LAYER)
    inner = "/".join(groups[2:] if in_layer else groups[1:])
    for place in _PLACES:
        leaves = _leaves(place.module)
        if (place.groups, place.in_layer) == (inner, in_layer) and number < len(leaves):
            layer = [_LISTED, str(steps[1].number)] if in_layer else []
            return place, "/".join(["model", "decoder", *layer, place.module, leaves[number]])
    return None, unknown


def _joined(shape: tuple[int, ...], place: _Place | None, config: OPTConfig, path: Path) -> tuple[int, ...]:
    """The shape that the rest of the package knows: heads joined, position rows complete."""
    if place is None:
        return shape
    if place.module == "embed_positions" and len(shape) > 1:
        return (shape[0] + POSITION_OFFSET, *shape[1:])
    if place.heads is None or len(shape) < 2:
        return shape
    axis = place.heads if len(shape) > 2 else 0
    split = shape[axis : axis + 2]
    if split != (config.num_attention_heads, config.head_dim):
        expected = f"{config.num_attention_heads} heads of {config.head_dim}"
        raise damaged(path, f"{place.groups} is split into {list(split)}, but its config.json says {expected}")
    return (*shape[:axis], math.prod(split), *shape[axis + 2 :])
