"""How other libraries read a file that our reader has accepted: what a correct load is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from conversion.checkpoint import READERS
from conversion.dtypes import BY_NAME, BY_SAFETENSORS
from opt_common.hub import FORMATS

Arrays = Mapping[str, np.ndarray]


def difference(kind: str, directory: Path) -> str:
    """What another library reads otherwise than our reader; nothing where it agrees, or can't be asked.

    HDF5's own library is not asked: files such as these make it loop for ever.
    """
    format_name = kind.partition(" ")[0]
    if format_name not in _LIBRARIES or not (path := directory / FORMATS[format_name].single).is_file():
        return ""
    reader = READERS[format_name](path)
    try:
        theirs = _LIBRARIES[format_name](path)
    except Exception as error:  # each library has its own
        return f"the other library refuses the file: {error!r:.300}"
    if theirs is None:
        return ""
    for name in reader.tensors:
        mine, other = reader.read(name), theirs.get(name)
        if other is None:
            return f"{name!r} is not among what the other library finds: {sorted(theirs)}"
        if mine.dtype != other.dtype or mine.shape != other.shape or mine.tobytes() != other.tobytes():
            return f"{name!r} is {mine.dtype} {mine.shape}; the other library reads {other.dtype} {other.shape}"
    return ""


def _by_safetensors(path: Path) -> Arrays:
    import safetensors

    return {
        name: np.frombuffer(found["data"], BY_SAFETENSORS[found["dtype"]].numpy).reshape(found["shape"])
        for name, found in safetensors.deserialize(path.read_bytes())
    }


def _by_msgpack(path: Path) -> Arrays:
    def array(code: int, data: bytes) -> np.ndarray:
        shape, dtype, numbers = msgpack.unpackb(data)
        return np.frombuffer(numbers, BY_NAME[{"V2": "bfloat16"}.get(dtype, dtype)].numpy).reshape(shape)

    def flat(tree: Any, path: tuple[str, ...]) -> dict[str, np.ndarray]:
        if isinstance(tree, np.ndarray):
            return {"/".join(path): tree}
        if "__msgpack_chunked_array__" in tree:
            chunks = [tree["chunks"][str(index)].reshape(-1) for index in range(len(tree["chunks"]))]
            shape = [tree["shape"][str(index)] for index in range(len(tree["shape"]))]
            return {"/".join(path): np.concatenate(chunks).reshape(shape)}
        return {name: item for key, inner in tree.items() for name, item in flat(inner, (*path, key)).items()}

    return flat(msgpack.unpackb(path.read_bytes(), ext_hook=array), ())


def _by_pytorch(path: Path) -> Arrays | None:
    import torch

    try:
        state = torch.load(path, weights_only=True)
    except Exception:  # it is stricter than our reader in what is beside the tensors
        return None
    found: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:
            found[str(name)] = tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            found[str(name)] = tensor.detach().numpy()
    return found


_LIBRARIES: Mapping[str, Callable[[Path], Arrays | None]] = {
    "safetensors": _by_safetensors,
    "flax": _by_msgpack,
    "torch": _by_pytorch,
}
