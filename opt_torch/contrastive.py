"""Which candidate contrastive search takes, in PyTorch: `opt_common.contrastive`, on the device of the states."""

import torch
from torch import Tensor


def preferred(states_RSE: Tensor, context_RS: Tensor, new_RE: Tensor, logprobs_BK: Tensor, alpha: Tensor) -> Tensor:
    """The candidate to take for each text, (B,); see `opt_common.contrastive.preferred`."""
    similarity_RS = (directions(states_RSE) @ directions(new_RE)[..., None])[..., 0]
    penalty_R = torch.where(context_RS, similarity_RS, -torch.inf).amax(1)
    weight, logprobs_BK = alpha.to(penalty_R.dtype), logprobs_BK.to(penalty_R.dtype)
    value_BK = (1 - weight) * logprobs_BK.exp() - weight * penalty_R.reshape(logprobs_BK.shape)
    possible_BK = (logprobs_BK > -torch.inf) & ~value_BK.isnan()
    return torch.where(possible_BK, value_BK, -torch.inf).argmax(1)


def rows_of(places_B: Tensor, size: int) -> Tensor:
    """The rows of the candidates that are taken, (B,), of `size` candidates for each text."""
    return torch.arange(len(places_B), device=places_B.device) * size + places_B


def directions(vectors: Tensor) -> Tensor:
    """Vectors (…, E) of length 1, at least float32; those of length 0 stay as they are."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    lengths = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(lengths > 0, lengths, 1)
