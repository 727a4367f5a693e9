"""Loading and saving Keras models, from and to any checkpoint format; the formats themselves are in `conversion`."""

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import tensorflow as tf

from conversion import checked_parameters, open_checkpoint, save_checkpoint
from opt_common.config import OPTConfig
from opt_common.generation import GenerationConfig
from opt_common.hub import resolve
from opt_common.params import Parameter, parameter_table
from opt_common.pretrained import choose_dtype


class Pretrained:
    """What every model class can do with checkpoints."""

    head: ClassVar[Literal["lm"] | None]
    config: OPTConfig
    generation_config: GenerationConfig

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: str | tf.DType | None = None,
        attn_implementation: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a checkpoint.

        Args:
            path_or_id: a directory, or the id of a repository on the Hugging Face Hub. Any format will do: safetensors,
                `pytorch_model.bin`, `tf_model.h5` or `flax_model.msgpack`, in one file or sharded.
            revision: branch, tag or commit of the repository.
            dtype: dtype of parameters and arithmetic; None means float32, "auto" the one the checkpoint is stored in.
            attn_implementation: one of `opt_tf.attention.IMPLEMENTATIONS`; None means "eager".
            cache_dir: where downloads are kept; None means the Hub client's own place.
            token: the Hub's access token.
            local_files_only: whether to use only what is already there.

        Raises:
            CheckpointError: if there is no such checkpoint, it is damaged, or its tensors do not fit its configuration.
            ConfigError: if its configuration is none of an OPT model.
        """
        directory = resolve(
            path_or_id,
            prefer="tf",
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        with open_checkpoint(directory, prefer="tf") as checkpoint:
            config = checkpoint.config
            table = parameter_table(config, head=cls.head)
            checked_parameters(checkpoint, table)
            requested = dtype.name if isinstance(dtype, tf.DType) else dtype
            stored = checkpoint.info(table[0].name).dtype.name
            name = choose_dtype(requested, stored)
            # Built with zeros, which cost next to nothing: every weight is replaced at once.
            model = cast(Any, cls)(config, attn_implementation=attn_implementation, dtype=name, new_weights=False)
            for parameter in table:
                array = checkpoint.read(parameter.name)
                assign(model, parameter, to_array(array, parameter, name))
        if cls.head == "lm":
            model.generation_config = GenerationConfig.from_directory(Path(directory), config)
        return model

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        format: str = "safetensors",
        dtype: str | None = None,
        max_shard_size: str | int = "5GB",
    ) -> None:
        """Write a checkpoint that this package and Hugging Face `transformers` read.

        Args:
            directory: where to; made if it does not exist.
            format: "safetensors", "torch", "tf" or "flax".
            dtype: dtype to store; None means the model's.
            max_shard_size: largest size of one file, such as "5GB" or "500MiB"; larger models are sharded.

        Raises:
            CheckpointError: if the checkpoint cannot be written or the directory holds another one.
        """
        table = parameter_table(self.config, head=self.head)
        save_checkpoint(
            directory,
            self.config,
            table,
            lambda parameter: to_numpy(find(self, parameter), parameter),
            format=format,
            dtype=dtype or find(self, table[0]).dtype,
            max_shard_size=max_shard_size,
            generation_config=self.generation_config.to_dict() if self.head == "lm" else None,
            bare=self.head is None,
        )


def find(model: Any, parameter: Parameter) -> Any:
    """The model's own variable for a row of the parameter table."""
    module, leaf = local_place(model, parameter)
    return getattr(module, leaf)


def assign(model: Any, parameter: Parameter, array: np.ndarray) -> None:
    """Put an array, in Keras' layout, where a row of the parameter table says."""
    find(model, parameter).assign(array)


def local_place(model: Any, parameter: Parameter) -> tuple[Any, str]:
    """The submodule of a model that holds a parameter, and the parameter's name there."""
    path = parameter.path("keras")
    *modules, leaf = path if model.head == "lm" else path[1:]
    module = model
    for name in modules:
        module = module[int(name)] if name.isdecimal() else getattr(module, name)
    return module, leaf


def to_array(array: np.ndarray, parameter: Parameter, dtype: str) -> np.ndarray:
    """An array in Keras' layout from one in the canonical layout."""
    return (array.T if parameter.transposed("keras") else array).astype(tf.as_dtype(dtype).as_numpy_dtype)


def to_numpy(variable: Any, parameter: Parameter) -> np.ndarray:
    """An array in the canonical layout from a variable in Keras'."""
    host_array = variable.value.numpy()
    return host_array.T if parameter.transposed("keras") else host_array
