"""Which guesses of a smaller model are kept, in PyTorch: `opt_common.assisted`, on the device of the scores."""

import torch
from torch import Tensor

from opt_torch.processors import choose, softmax


def checked(scores_BV: Tensor, shares_BV: Tensor, guessed_B: Tensor, uniforms_B: Tensor, chances_B: Tensor) -> Tensor:
    """The guess where it holds, another token where it does not; see `opt_common.assisted.checked`."""
    probabilities_BV = softmax(scores_BV)
    shares_BV = torch.where(guessed_B[:, None] >= 0, shares_BV.to(scores_BV.dtype), 0)
    places_B1 = guessed_B.long().clamp(min=0)[:, None]
    guess_B, share_B = (array_BV.gather(1, places_B1)[:, 0] for array_BV in (probabilities_BV, shares_BV))
    holds_B = (guessed_B >= 0) & (chances_B.to(share_B.dtype) * share_B < guess_B)
    left_BV = torch.where(probabilities_BV > shares_BV, probabilities_BV - shares_BV, 0)
    left_BV = torch.where(left_BV.sum(1, keepdim=True) > 0, left_BV, probabilities_BV)
    others_B = choose(left_BV.log(), uniforms_B)
    tokens_B = torch.where(holds_B, guessed_B.to(others_B.dtype), others_B)
    return torch.where(scores_BV.amax(1) > -torch.inf, tokens_B, -1)
