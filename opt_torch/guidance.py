"""What a prompt makes likelier than another one, in PyTorch: `opt_common.guidance`, on the device of the logits."""

from torch import Tensor

from opt_torch.processors import log_softmax


def guided(logits_BV: Tensor, unconditional_BV: Tensor, scale: Tensor) -> Tensor:
    """Scores of tokens, before the processors; see `opt_common.guidance.guided`."""
    unconditional_BV = log_softmax(unconditional_BV)
    weight = scale.to(unconditional_BV.dtype)
    return weight * (log_softmax(logits_BV) - unconditional_BV) + unconditional_BV
