"""Write a checkpoint in any format from parameters in memory."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.dtypes import parse_dtype
from conversion.plan import DEFAULT_SHARD_SIZE, ReadParameter, documents_of, json_bytes, make_plan
from conversion.write import write_plan
from opt_common.config import OPTConfig
from opt_common.hub import GENERATION_CONFIG_FILE, QUANTIZED
from opt_common.params import Parameter
from opt_common.quantization import STORAGES, StoredPart, stored_table


def save_checkpoint(
    directory: str | os.PathLike[str],
    config: OPTConfig,
    table: Sequence[Parameter],
    read: ReadParameter,
    *,
    format: str = "safetensors",  # the word users know from save_pretrained
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    generation_config: Mapping[str, Any] | None = None,
    bare: bool = False,
    model_parts: int | None = None,
) -> None:
    """Write a checkpoint that Hugging Face's classes of the format load, or one of metaseq.

    A directory that does not exist appears whole or not at all. In one that exists, files of the same names are
    replaced; nothing else in it is touched, and while they are replaced it holds no weights that load.

    Args:
        directory: where to; made, with its parents, if it does not exist.
        config: the model's configuration.
        table: the parameters to write, from `parameter_table(config, head=…)`.
        read: gives each parameter; called once for each file that has some of it. For "quantized" it is asked for the
            parts of quantised matrices, each an `opt_common.quantization.StoredPart`.
        format: "safetensors", "torch", "tf", "flax", "metaseq", "keras-hub" or "quantized".
        dtype: floating-point type of the file; None keeps that of each array, which is asked for once more than
            `read` is otherwise called.
        max_shard_size: longest weight file, as bytes or as "5GB", "500MB", "1GiB"; default `DEFAULT_SHARD_SIZE`.
        generation_config: contents of `generation_config.json`, or None for no such file.
        bare: write the names and the class of a decoder without a head. A table without the head of an untied
            configuration always is one.
        model_parts: number of metaseq's model-parallel parts; None means one file without a number.

    Raises:
        CheckpointError: if the directory holds other weights, the disk is too small, a number is too large for `dtype`,
            or an argument makes no sense; nothing has been changed then.
        OSError: if the disk is full or not writable; nothing has been changed then.
    """
    stored = None if dtype is None else parse_dtype(dtype).numpy
    if format == QUANTIZED and config.quantization is not None:
        table = stored_table(table, STORAGES[config.quantization])
    plain = (parameter for parameter in table if not isinstance(parameter, StoredPart))
    dtypes = {parameter.name: stored or read(parameter).dtype for parameter in plain}
    limit = max_shard_size if max_shard_size is not None else DEFAULT_SHARD_SIZE
    plan = make_plan(
        config, table, dtypes, format_name=format, max_shard_size=limit, bare=bare, model_parts=model_parts
    )
    beside = {} if generation_config is None else {GENERATION_CONFIG_FILE: json_bytes(generation_config)}
    write_plan(Path(directory), plan, read, documents_of(plan, beside))
