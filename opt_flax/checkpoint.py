"""Loading and saving Flax models, from and to any checkpoint format; the formats themselves are in `conversion`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from conversion import Checkpoint, checked_parameters, open_checkpoint, save_checkpoint
from opt_common.config import OPTConfig
from opt_common.generation import GenerationConfig
from opt_common.hub import resolve
from opt_common.lora import LoraConfig, check_whole
from opt_common.params import Head, Parameter, parameter_table
from opt_common.pretrained import choose_dtype, choose_format, split_table, with_labels
from opt_common.quantization import StoredPart, choose_quantization, is_quantized, never_quantized
from opt_flax.quantized import AVAILABLE


class Pretrained:
    """What every model class can do with checkpoints."""

    head: ClassVar[Head | None]
    config: OPTConfig
    generation_config: GenerationConfig
    lora_config: LoraConfig | None = None
    lora_merged: bool = False

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: str | DTypeLike | None = None,
        attn_implementation: str | None = None,
        quantization: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        new_head: bool = False,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        problem_type: str | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Self:
        """Load a checkpoint, in evaluation mode.

        Args:
            path_or_id: a directory, a weight file, or the id of a repository on the Hugging Face Hub. Any format does:
                safetensors, `pytorch_model.bin`, `tf_model.h5` or `flax_model.msgpack`, in one file or sharded, and
                what a framework saved itself (a state dict, `.weights.h5`, `.keras`, Orbax).
            revision: branch, tag or commit of the repository.
            dtype: dtype of parameters and arithmetic; None means float32, "auto" the one the checkpoint is stored in.
            attn_implementation: one of `opt_flax.attention.IMPLEMENTATIONS`; None means "xla".
            quantization: "int8-dynamic" rounds the matrices while they are read, for speed and memory on a CPU; see
                `opt_common.quantization`. None means what the configuration says, mostly nothing. A checkpoint that
                was saved in few bits stays in as many.
            cache_dir: where downloads are kept; None means the Hub client's own place.
            token: the Hub's access token.
            local_files_only: whether to use only what is already there.
            new_head: whether to start with a new head, whatever the checkpoint has. Without it, a checkpoint of another
                class is refused where its head is missing: nothing is drawn at random unasked.
            num_labels: outputs of a sequence classifier, in place of what the configuration says.
            id2label: name of each output, likewise.
            label2id: output of each name, likewise.
            problem_type: one of `opt_common.config.PROBLEM_TYPES`, likewise.
            rngs: source of dropout's random numbers, should the model be trained; None means `nnx.Rngs(0)`.

        Raises:
            CheckpointError: if there is no such checkpoint, it is damaged, or its tensors do not fit its configuration.
            ConfigError: if its configuration is none of an OPT model.
        """
        directory = resolve(
            path_or_id,
            prefer="flax",
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        with open_checkpoint(directory, prefer="flax") as checkpoint:
            config = with_labels(checkpoint.config, num_labels, id2label, label2id, problem_type)
            config = choose_quantization(config, quantization, checkpoint.storage, AVAILABLE)
            table, new = split_table(config, cls.head, new_head=new_head)
            checked_parameters(checkpoint, table, new=new)
            requested = dtype if dtype is None or isinstance(dtype, str) else jnp.dtype(dtype).name
            stored = checkpoint.info(never_quantized(table).name).dtype.name
            name = choose_dtype(requested, stored)
            # Built without storage, so that no memory is spent on weights that are replaced at once.
            model = nnx.eval_shape(
                lambda: cast(Any, cls)(config, attn_implementation=attn_implementation, dtype=name, rngs=nnx.Rngs(0))
            )
            for parameter in table:
                if config.quantization is not None and is_quantized(parameter):
                    assign_quantized(model, parameter, checkpoint, name)
                    continue
                array = checkpoint.load(parameter.name)
                assign(model, parameter, to_array(array, parameter, name))
            rngs = rngs or nnx.Rngs(0)
            for parameter in new:
                array = to_array(new_values(config, parameter, rngs), parameter, name)
                assign(model, parameter, array)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.Dropout):
                module.rngs = rngs["dropout"].fork()
        if cls.head == "lm":
            model.generation_config = GenerationConfig.from_directory(Path(directory), config)
        model.eval()
        return model

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        format: str | None = None,
        dtype: str | None = None,
        max_shard_size: str | int = "5GB",
    ) -> None:
        """Write a checkpoint that this package and Hugging Face `transformers` read.

        Args:
            directory: where to; made if it does not exist.
            format: "safetensors", "torch", "tf", "flax", "metaseq", "keras-hub", or for a model in few bits
                "quantized", which only this package reads; any other holds the numbers that the integers stand for.
                None means "quantized" for such a model, else "safetensors".
            dtype: dtype to store what is not quantised in; None means the model's.
            max_shard_size: largest size of one file, such as "5GB" or "500MiB"; larger models are sharded.

        Raises:
            CheckpointError: if the checkpoint cannot be written, the directory holds another one, or the model has an
                adapter that isn't merged.
        """
        check_whole(self.lora_config, merged=self.lora_merged)
        config, format = choose_format(self.config, format)
        table = parameter_table(config, head=self.head)
        save_checkpoint(
            directory,
            config,
            table,
            lambda parameter: stored_value(self, parameter),
            format=format,
            dtype=dtype or find(self, never_quantized(table)).dtype.name,
            max_shard_size=max_shard_size,
            generation_config=self.generation_config.to_dict() if self.head == "lm" else None,
            bare=self.head is None,
        )


def find(model: Any, parameter: Parameter) -> nnx.Param[Array]:
    """The model's own variable for a row of the parameter table."""
    module, leaf = local_place(model, parameter)
    return getattr(module, leaf)


def assign(model: Any, parameter: Parameter, array: Array) -> None:
    """Put an array where a row of the parameter table says, in place of the one that is there."""
    module, leaf = local_place(model, parameter)
    setattr(module, leaf, nnx.Param(array))


def stored_value(model: Any, parameter: Parameter) -> np.ndarray:
    """What a checkpoint holds of a model for a row of its table: a parameter, or a part of a quantised matrix."""
    if isinstance(parameter, StoredPart):
        layer = local_place(model, parameter.whole)[0]
        return np.asarray(layer.stored(parameter.index))
    return to_numpy(find(model, parameter)[...], parameter)


def assign_quantized(model: Any, parameter: Parameter, checkpoint: Checkpoint, dtype: DTypeLike) -> None:
    """Give a layer in few bits its matrix, as it is stored, or rounded while it is read."""
    layer = local_place(model, parameter)[0]
    if checkpoint.storage is None:
        layer.assign_rounded(checkpoint.rows(parameter.name), dtype)
    else:
        layer.assign_stored(checkpoint.stored(parameter.name), dtype)


def local_place(model: Any, parameter: Parameter) -> tuple[Any, str]:
    """The submodule of a model that holds a parameter, and the parameter's name there."""
    path = parameter.path("nnx")
    *modules, leaf = path[1:] if model.head is None else path
    module = model
    for name in modules:
        module = module[int(name)] if name.isdecimal() else getattr(module, name)
    return module, leaf


def new_values(config: OPTConfig, parameter: Parameter, rngs: nnx.Rngs) -> np.ndarray:
    """What a new linear layer starts with: a normal weight of deviation `init_std`, and a bias of zeros."""
    if parameter.kind == "linear.bias":
        return np.zeros(parameter.shape, np.float32)
    return np.asarray(config.init_std * jax.random.normal(rngs.params(), parameter.shape))


def to_array(array: np.ndarray, parameter: Parameter, dtype: DTypeLike) -> Array:
    """An array on JAX's device, in Flax's layout, from one in the canonical layout."""
    return jnp.asarray(array.T if parameter.transposed("nnx") else array, dtype=dtype)


def to_numpy(array: Array, parameter: Parameter) -> np.ndarray:
    """An array in the canonical layout from one in Flax's."""
    host_array = np.asarray(array)
    return host_array.T if parameter.transposed("nnx") else host_array
