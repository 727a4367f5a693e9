"""What the last layer has learnt over an earlier one, in PyTorch: `opt_common.dola`, on the device of the logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opt_common.dola import RELATIVE_TOP
from opt_torch.processors import log_softmax

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


def early_logits(model: "OPTForCausalLM", hidden_states: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
    """What the head predicts of the last token in some layers' inputs, (B, C, V), at least float32."""
    decoder = model.model.decoder
    early = []
    for layer in layers:
        hidden_BD = hidden_states[layer][:, -1]
        early.append(model.logits(decoder.project_out(hidden_BD) if model.config.has_projection else hidden_BD))
    early_BCV = torch.stack(early, dim=1)
    return early_BCV.to(torch.promote_types(early_BCV.dtype, torch.float32))


def contrasted(final_BV: Tensor, early_BCV: Tensor) -> Tensor:
    """Scores of tokens, before the processors; see `opt_common.dola.contrasted`."""
    B, C, V = early_BCV.shape
    final_BV = log_softmax(final_BV)
    early_BCV = log_softmax(early_BCV.reshape(B * C, V)).reshape(B, C, V)
    mean_BCV = (final_BV.exp()[:, None] + early_BCV.exp()) / 2
    logs_BCV = torch.where(mean_BCV > 0, mean_BCV, 1).log()
    divergence_BC = (mean_BCV * (2 * logs_BCV - final_BV[:, None] - early_BCV)).sum(-1)
    furthest_B = divergence_BC.argmax(1)
    scores_BV = final_BV - early_BCV[torch.arange(B, device=furthest_B.device), furthest_B]
    unlikely_BV = final_BV < final_BV.amax(1, keepdim=True) + RELATIVE_TOP
    return torch.where(unlikely_BV, -torch.inf, scores_BV)
