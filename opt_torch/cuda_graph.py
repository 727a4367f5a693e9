"""Decoding on a CUDA device: the kernels of one token, recorded once and launched at once for each token that follows.

Python takes longer to launch a token's kernels one by one than a GPU takes to run them. A recording (a CUDA graph) runs
the same kernels on the same memory: tokens, their number and the cache are where they were when it was made.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from opt_common.outputs import OPTModelOutput
from opt_torch import native
from opt_torch.cache import KVCache

if TYPE_CHECKING:
    from opt_torch.modeling import OPTDecoder

WARM_UPS = 2
"""Steps before the recording: libraries choose their kernels and find their memory in the first."""

LEAST_TOKENS = 16
"""New tokens from which a recording is made: it takes as long as a few steps."""

IMPLEMENTATIONS = ("sdpa", "eager")
"""Values of `attn_implementation` whose attention to a whole buffer, masked, is that to its first tokens."""


def suits(decoder: "OPTDecoder", tokens: int) -> bool:
    """Whether a decoder that continues by so many tokens is to be recorded: on a CUDA device, and nobody watches it."""
    device = decoder.embed_positions.weight.device
    return device.type == "cuda" and tokens >= LEAST_TOKENS and not native.watched() and is_plain(decoder)


def is_plain(decoder: "OPTDecoder") -> bool:
    """Whether a decoder is what this package built: a recording knows no hooks and no methods put in others' place."""
    return all(
        type(module).__module__.startswith(("opt_torch.", "torch.nn."))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        and getattr(module, "attn_implementation", IMPLEMENTATIONS[0]) in IMPLEMENTATIONS
        for module in decoder.modules()
    )


def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A function that runs a step's kernels again, and the tensor that it puts their result in."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile on the device is none of the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = step()
    return graph.replay, result


class RecordedStep:
    """A decoder's step of one more token a row, for one cache, to which it writes.

    Attributes:
        cache: the buffers.
        length: the number of tokens in them, where the recording looks for it.
        ids_B1: the new tokens, likewise.
        hidden_B1E: the last hidden states of the latest step.
    """

    def __init__(self, decoder: "OPTDecoder", cache: KVCache, mask_BS: Tensor | None) -> None:
        device = cache.keys[0].device
        self.ids_B1 = torch.zeros((len(cache.keys[0]), 1), dtype=torch.long, device=device)
        self.length = torch.tensor(cache.length, device=device)
        self.cache = dataclasses.replace(cache, length=cast(Any, self.length))

        def step() -> Any:
            return decoder(
                self.ids_B1, attention_mask=mask_BS, past_key_values=self.cache, use_cache=True
            ).last_hidden_state

        self.replay, self.hidden_B1E = record(step, device)

    def writes_to(self, cache: KVCache) -> bool:
        """Whether it is this cache's buffers that it writes to."""
        return all(own is other for own, other in zip(self.cache.keys, cache.keys, strict=True))

    def __call__(self, ids_B1: Tensor, cache: KVCache) -> OPTModelOutput:
        """The decoder's outputs for one more token a row; hidden states are overwritten by the next step."""
        self.ids_B1.copy_(ids_B1)
        self.length.fill_(cache.length)
        self.replay()
        return OPTModelOutput(
            last_hidden_state=self.hidden_B1E,
            past_key_values=cache.extended(cache.keys, cache.values, 1),
            hidden_states=None,
            attentions=None,
        )
