"""Small valid checkpoints of every format, made once for each process."""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from conversion import convert, save_checkpoint
from conversion.metaseq_config import arguments_of
from opt_common.config import OPTConfig
from opt_common.hub import CONFIG_FILE, FORMATS
from opt_common.params import parameter_table

_SMALL = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "ffn_dim": 8, "num_attention_heads": 2}

CONFIGS: Mapping[str, tuple[OPTConfig, str]] = {
    "pre-norm": (OPTConfig(**_SMALL, max_position_embeddings=4), "float32"),
    "post-norm": (
        OPTConfig(**_SMALL, max_position_embeddings=4, word_embed_proj_dim=4, do_layer_norm_before=False),
        "float16",
    ),
    "untied": (OPTConfig(**_SMALL, max_position_embeddings=4, tie_word_embeddings=False), "bfloat16"),
}
"""Configuration and dtype of each model; together they have every tensor that an OPT model can have."""


@dataclasses.dataclass(frozen=True)
class Seed:
    """A valid checkpoint: its files by name, and the one that is to be spoilt."""

    files: Mapping[str, bytes]
    target: str

    @property
    def content(self) -> bytes:
        """The file that is to be spoilt."""
        return self.files[self.target]


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _write(directory: Path, name: str) -> None:
    config, dtype = CONFIGS[name]
    random = np.random.default_rng(0)
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    table = parameter_table(config)
    arrays = {row.name: random.standard_normal(row.shape).astype(kind) for row in table}
    save_checkpoint(directory, config, table, lambda row: arrays[row.name])


@functools.cache
def checkpoints(format_name: str, sharded: bool = False) -> tuple[Seed, ...]:
    """One checkpoint of each model in a format that this package writes; of shards, the first is to be spoilt."""
    found: list[Seed] = []
    with tempfile.TemporaryDirectory() as place:
        for name in CONFIGS:
            source, target = Path(place) / name, Path(place) / f"{name}-{format_name}"
            _write(source, name)
            convert(source, target, format_name, max_shard_size="1KB" if sharded else None)
            files = _files(target)
            weights = [file for file in files if file.endswith(Path(FORMATS[format_name].single).suffix)]
            found.append(Seed(files, weights[0]))
    return tuple(found)


@functools.cache
def metaseq() -> tuple[Seed, ...]:
    """metaseq's files without a `config.json`: one file, parts, a shard, and objects among the arguments."""
    import torch

    found: list[Seed] = []
    with tempfile.TemporaryDirectory() as place:
        for name, parts in (("pre-norm", None), ("post-norm", None), ("pre-norm", 2)):
            source, target = Path(place) / f"{name}-{parts}", Path(place) / f"{name}-{parts}-metaseq"
            _write(source, name)
            convert(source, target, "metaseq", model_parts=parts)
            files = {file: content for file, content in _files(target).items() if file != CONFIG_FILE}
            found.append(Seed(files, sorted(file for file in files if file.endswith(".pt"))[0]))
            if parts is None:
                namespace = argparse.Namespace(**arguments_of(CONFIGS[name][0], None), nested=argparse.Namespace(a=[1]))
                state = _metaseq_state(source)
                content = {"args": namespace, "cfg": None, "model": state, "optimizer_history": [{"loss": 0.5}]}
                torch.save(content, Path(place) / "x.pt")
                found.append(Seed({"restored.pt": (Path(place) / "x.pt").read_bytes()}, "restored.pt"))
                shard = Path(place) / "shard.pt"
                torch.save(_flattened(state, namespace), shard)
                name_of_shard = "checkpoint_last-model_part-0-shard0.pt"
                found.append(Seed({name_of_shard: shard.read_bytes()}, name_of_shard))
    return tuple(found)


def _metaseq_state(source: Path) -> dict[str, object]:
    """The tensors of a checkpoint under metaseq's names, projections apart."""
    import torch

    from conversion import open_checkpoint
    from conversion.canonical import to_metaseq

    with open_checkpoint(source) as checkpoint:
        rows = parameter_table(checkpoint.config)
        return {to_metaseq(row): torch.from_numpy(checkpoint.read(row.name).copy()) for row in rows}


def _flattened(state: dict[str, object], namespace: argparse.Namespace) -> dict[str, object]:
    """One shard of the tensors, laid end to end."""
    import torch

    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])  # pyright: ignore
    described = {
        "names": list(state),
        "shapes": [tuple(tensor.shape) for tensor in state.values()],  # pyright: ignore
        "numels": [tensor.numel() for tensor in state.values()],  # pyright: ignore
        "padding": 0,
    }
    metadata = {"param_metadata": [{"fsdp_path": "", "params": {"flat_param_0": described}}]}
    return {"args": namespace, "model": {"flat_param_0": flat}, "shard_metadata": metadata}


@functools.cache
def by_pytorch(old: bool) -> tuple[Seed, ...]:
    """What `torch.save` itself writes: with memo, attributes and versions; `old` in the container before 1.6."""
    import collections

    import torch

    from conversion import open_checkpoint

    found: list[Seed] = []
    with tempfile.TemporaryDirectory() as place:
        for name in ("pre-norm", "post-norm"):
            source, path = Path(place) / name, Path(place) / f"{name}.bin"
            _write(source, name)
            with open_checkpoint(source) as checkpoint:
                state = collections.OrderedDict(
                    (row.name, torch.from_numpy(checkpoint.read(row.name).copy()))
                    for row in parameter_table(checkpoint.config)
                )
            state._metadata = collections.OrderedDict({"": {"version": 1}})  # pyright: ignore
            torch.save(state, path, _use_new_zipfile_serialization=not old)
            config = (source / CONFIG_FILE).read_bytes()
            found.append(Seed({"pytorch_model.bin": path.read_bytes(), CONFIG_FILE: config}, "pytorch_model.bin"))
    return tuple(found)
