"""Loading and saving PyTorch models, from and to any checkpoint format; the formats themselves are in `conversion`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from conversion import Checkpoint, checked_parameters, open_checkpoint, save_checkpoint
from opt_common.config import OPTConfig
from opt_common.errors import CheckpointError
from opt_common.generation import GenerationConfig
from opt_common.hub import resolve
from opt_common.lora import LoraConfig, check_whole
from opt_common.params import Head, Parameter, parameter_table
from opt_common.pretrained import choose_dtype, choose_format, split_table, with_labels
from opt_common.quantization import StoredPart, choose_quantization, is_quantized, never_quantized
from opt_torch.quantized import AVAILABLE


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
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
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
    ) -> Self:
        """Load a checkpoint, in evaluation mode.

        Args:
            path_or_id: a directory, a weight file, or the id of a repository on the Hugging Face Hub. Any format does:
                safetensors, `pytorch_model.bin`, `tf_model.h5` or `flax_model.msgpack`, in one file or sharded, and
                what a framework saved itself (a state dict, `.weights.h5`, `.keras`, Orbax).
            revision: branch, tag or commit of the repository.
            dtype: dtype of parameters and arithmetic; None means float32, "auto" the one the checkpoint is stored in.
            torch_dtype: the older name of `dtype`.
            device: where the parameters go; None means PyTorch's default.
            attn_implementation: one of `opt_torch.attention.IMPLEMENTATIONS`; None means "sdpa".
            quantization: "int8-dynamic", "int8" or "int4" rounds the matrices while they are read, for speed and memory
                on a CPU; see `opt_common.quantization`. None means what the configuration says, mostly nothing. A
                checkpoint that was saved in few bits stays in as many.
            cache_dir: where downloads are kept; None means the Hub client's own place.
            token: the Hub's access token.
            local_files_only: whether to use only what is already there.
            new_head: whether to start with a new head, whatever the checkpoint has. Without it, a checkpoint of another
                class is refused where its head is missing: nothing is drawn at random unasked.
            num_labels: outputs of a sequence classifier, in place of what the configuration says.
            id2label: name of each output, likewise.
            label2id: output of each name, likewise.
            problem_type: one of `opt_common.config.PROBLEM_TYPES`, likewise.

        Raises:
            CheckpointError: if there is no such checkpoint, it is damaged, or its tensors do not fit its configuration.
            ConfigError: if its configuration is none of an OPT model.
        """
        directory = resolve(
            path_or_id,
            prefer="torch",
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        with open_checkpoint(directory, prefer="torch") as checkpoint:
            config = with_labels(checkpoint.config, num_labels, id2label, label2id, problem_type)
            config = choose_quantization(config, quantization, checkpoint.storage, AVAILABLE)
            table, new = split_table(config, cls.head, new_head=new_head)
            checked_parameters(checkpoint, table, new=new)
            requested = dtype if dtype is not None else torch_dtype
            stored = checkpoint.info(never_quantized(table).name).dtype.name
            name = choose_dtype(None if requested is None else str(requested).removeprefix("torch."), stored)
            # Built without storage, so that no memory is spent on weights that are replaced at once.
            with torch.device("meta"):
                model = cast(Any, cls)(config, attn_implementation=attn_implementation)
            for parameter in table:
                if config.quantization is not None and is_quantized(parameter):
                    place = device or torch.get_default_device()
                    assign_quantized(model, parameter, checkpoint, place, getattr(torch, name))
                    continue
                # What needs no cast stays where it lies in the file: nothing is copied.
                stays = checkpoint.info(parameter.name).dtype.name == name
                tensor = to_tensor((checkpoint.borrow if stays else checkpoint.load)(parameter.name))
                assign(model, parameter, tensor.to(device or torch.get_default_device(), getattr(torch, name)))
            for parameter in new:
                tensor = new_values(config, parameter)
                assign(model, parameter, tensor.to(device or torch.get_default_device(), getattr(torch, name)))
        for module in model.modules():
            if hasattr(module, "lays_together"):
                module.lays_together = True
        if cls.head == "lm":
            model.tie_weights()
            model.generation_config = GenerationConfig.from_directory(Path(directory), config)
        return model.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, and of the arithmetic."""
        return self.position_table().dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.position_table().device

    def position_table(self) -> Tensor:
        """A parameter that every model has, and none rounds."""
        decoder = cast(Any, self).decoder if self.head is None else cast(Any, self).model.decoder
        return decoder.embed_positions.weight

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
            lambda parameter: to_numpy(stored_value(self, parameter)),
            format=format,
            dtype=dtype or str(self.dtype).removeprefix("torch."),
            max_shard_size=max_shard_size,
            generation_config=self.generation_config.to_dict() if self.head == "lm" else None,
            bare=self.head is None,
        )


def find(model: Any, parameter: Parameter) -> nn.Parameter:
    """The model's own variable for a row of the parameter table."""
    module, leaf = local_place(model, parameter)
    return getattr(module, leaf)


def assign(model: Any, parameter: Parameter, tensor: Tensor) -> None:
    """Put a tensor where a row of the parameter table says, in place of the one that is there."""
    module, leaf = local_place(model, parameter)
    module.register_parameter(leaf, nn.Parameter(tensor))


def stored_value(model: Any, parameter: Parameter) -> Tensor:
    """What a checkpoint holds of a model for a row of its table: a parameter, or a part of a quantised matrix."""
    if isinstance(parameter, StoredPart):
        layer: Any = local_place(model, parameter.whole)[0]
        return layer.stored(parameter.index)
    tensor = find(model, parameter)
    if not tensor.is_floating_point():
        raise CheckpointError("The model's base weights are quantised, which no checkpoint holds. Use save_adapter.")
    return tensor


def assign_quantized(
    model: Any, parameter: Parameter, checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Give a layer in few bits its matrix, as it is stored, or rounded while it is read."""
    layer: Any = local_place(model, parameter)[0]
    if checkpoint.storage is None:
        layer.assign_rounded(checkpoint.rows(parameter.name), device, dtype)
    else:
        layer.assign_stored([to_tensor(part) for part in checkpoint.stored(parameter.name)], device, dtype)


def local_place(model: Any, parameter: Parameter) -> tuple[nn.Module, str]:
    """The submodule of a model that holds a parameter, and the parameter's name there."""
    path = parameter.path("torch")
    *modules, leaf = path[1:] if model.head is None else path
    return model.get_submodule(".".join(modules)), leaf


def new_values(config: OPTConfig, parameter: Parameter) -> Tensor:
    """What a new linear layer starts with: a normal weight of deviation `init_std`, and a bias of zeros."""
    if parameter.kind == "linear.bias":
        return torch.zeros(parameter.shape)
    return torch.normal(0.0, config.init_std, parameter.shape)


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor of an array's numbers, in its memory where that may be written to; bfloat16 goes over bit by bit."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """An array of a tensor's numbers; bfloat16 goes over bit by bit."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
