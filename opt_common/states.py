"""Logits, hidden states and greedy tokens of given ids, from a framework's model to a file.

What `opt-convert verify --framework` calls, each framework in a process of its own, to hold them to each other.
"""

from pathlib import Path
from typing import Any

import numpy as np

from opt_common.encoding import tensor_maker

LOGITS = ("logits", "start_logits", "end_logits")
"""Fields of the output records that are kept, if the class has them."""


def write_states(model: Any, tensors: str, inputs: Path, outputs: Path) -> None:
    """Compute a model.

    Args:
        model: of any class and framework.
        tensors: what `tensor_maker` calls the framework's arrays.
        inputs: an .npz with `ids` and `mask` (B, T), `prompt` and `prompt_mask` (B, S), and `steps`.
        outputs: the .npz to write: `hidden_states.N`, the logits of the class, and of a language model `greedy`
            (B, steps): the likeliest tokens after the prompt, which no end-of-text token ends.
    """
    with np.load(inputs) as held:
        given = {name: held[name] for name in held.files}
    tensor = tensor_maker(tensors)
    found = model(input_ids=tensor(given["ids"]), attention_mask=tensor(given["mask"]), output_hidden_states=True)
    results = {name: to_numpy(getattr(found, name)) for name in LOGITS if getattr(found, name, None) is not None}
    results |= {f"hidden_states.{index}": to_numpy(state) for index, state in enumerate(found.hidden_states)}
    if getattr(found, "logits", None) is not None and found.logits.ndim == 3:
        results["greedy"] = _greedy(model, tensor, given["prompt"], given["prompt_mask"], int(given["steps"]))
    np.savez(outputs, **results)


def _greedy(model: Any, tensor: Any, prompt_BS: Any, mask_BS: Any, steps: int) -> Any:
    """The likeliest tokens after a prompt, computed anew for each: nothing but the model's own function takes part."""
    B, S = prompt_BS.shape
    # Of one shape all the way, so that nothing is compiled twice; what is not there yet is masked.
    ids_BT = np.concatenate([prompt_BS, np.zeros((B, steps), prompt_BS.dtype)], axis=1)
    mask_BT = np.concatenate([mask_BS, np.zeros((B, steps), mask_BS.dtype)], axis=1)
    for position in range(S, S + steps):
        logits_BTV = to_numpy(model(input_ids=tensor(ids_BT), attention_mask=tensor(mask_BT)).logits)
        ids_BT[:, position] = logits_BTV[:, position - 1].argmax(-1)
        mask_BT[:, position] = 1
    return ids_BT[:, S:]


def to_numpy(value: Any) -> Any:
    """An array of any framework, in NumPy."""
    # PyTorch's tensors carry their gradient's history, which NumPy does not take.
    return np.asarray(value.detach() if hasattr(value, "detach") else value)
