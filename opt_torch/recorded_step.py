"""Decoding's step, recorded once and run again for each token that follows.

Python takes longer to call a token's kernels one by one than a GPU takes to run them, or a CPU if weights are of few
bits. A recording, on a CUDA device a graph and on a CPU a tape, runs the same kernels on the same memory: tokens, their
number and the cache are where they were when it was made.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from opt_common.native import MAX_ROWS
from opt_common.outputs import OPTModelOutput
from opt_torch import native
from opt_torch.cache import KVCache
from opt_torch.tape import Tape

if TYPE_CHECKING:
    from opt_torch.modeling import OPTAttention, OPTDecoder

WARM_UPS = 2
"""Steps before a graph is recorded: libraries choose their kernels and find their memory in the first."""

LEAST_TOKENS = 16
"""New tokens from which a recording is made: it takes as long as a few steps."""

IMPLEMENTATIONS = {"cuda": ("sdpa", "eager"), "cpu": ("sdpa",)}
"""Values of `attn_implementation` whose attention to a whole buffer, with a mask or up to a slot, costs little more."""


def suits(decoder: "OPTDecoder", cache: KVCache, tokens: int) -> bool:
    """Whether a decoder that continues by so many tokens is to be recorded, with this cache, and nobody watches it."""
    weight, keys_BSNH = decoder.embed_positions.weight, cache.keys[0]
    device = weight.device.type
    on_cpu = (
        native.PRODUCT is not None
        and len(keys_BSNH) <= MAX_ROWS
        and weight.dtype in native.EITHER
        and keys_BSNH.dtype is torch.float32
        and keys_BSNH.is_contiguous()
    )
    return (
        tokens >= LEAST_TOKENS
        and device in IMPLEMENTATIONS
        and (on_cpu or device != "cpu")
        and all(each.attn_implementation in IMPLEMENTATIONS[device] for each in attentions(decoder))
        and not native.watched()
        and is_plain(decoder)
    )


def attentions(decoder: "OPTDecoder") -> "list[OPTAttention]":
    """The attention of each layer."""
    return [cast(Any, layer).self_attn for layer in decoder.layers]


def is_plain(decoder: "OPTDecoder") -> bool:
    """Whether a decoder is what this package built: a recording knows no hooks and no methods put in others' place."""
    return not torch.nn.modules.module._has_any_global_hook() and all(
        type(module).__module__.startswith(("opt_torch.", "torch.nn."))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        for module in decoder.modules()
    )


def record_graph(step: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A function that runs a step's kernels again, and the tensor that it puts their result in, as it has once."""
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
        graph.replay()
    return graph.replay, result


def record_tape(step: Callable[[], Tensor], cache: KVCache, fixed: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The same on a CPU."""
    with Tape(fixed) as tape:
        result = step()
    return tape.replay([result, *cache.keys, *cache.values]), result


class RecordedStep:
    """A decoder's step of one more token a row, for one cache, to which it writes.

    Attributes:
        cache: the buffers.
        length: the number of tokens in them, where the recording looks for it.
        ids_B1: the new tokens, likewise.
        hidden_B1E: the last hidden states of the latest step.
    """

    def __init__(self, decoder: "OPTDecoder", cache: KVCache, mask_BS: Tensor | None, ids_B1: Tensor) -> None:
        """Record a step, which reads the first tokens."""
        device = cache.keys[0].device
        self.ids_B1 = ids_B1.clone()
        self.length = torch.tensor(cache.length, device=device)
        self.cache = dataclasses.replace(cache, length=cast(Any, self.length))

        def step() -> Any:
            return decoder(
                self.ids_B1, attention_mask=mask_BS, past_key_values=self.cache, use_cache=True
            ).last_hidden_state

        if device.type == "cuda":
            self.replay, self.hidden_B1E = record_graph(step, device)
        else:
            for each in attentions(decoder):
                if each.lays_together:
                    each.lay_together()
            self.replay, self.hidden_B1E = record_tape(step, self.cache, [] if mask_BS is None else [mask_BS])
        self.weight = decoder.embed_positions.weight
        self.place = self.weight.data_ptr()

    def serves(self, cache: KVCache) -> bool:
        """Whether it is this cache's buffers that it writes to, and the decoder was not moved or cast since."""
        return self.cache.keys[0] is cache.keys[0] and self.weight.data_ptr() == self.place

    def __call__(self, ids_B1: Tensor, cache: KVCache) -> OPTModelOutput:
        """The decoder's outputs for one more token a row."""
        self.ids_B1.copy_(ids_B1)
        self.length.fill_(cache.length)
        self.replay()
        return self.outputs(cache)

    def outputs(self, cache: KVCache) -> OPTModelOutput:
        """What the latest step gave to a cache; hidden states are overwritten by the next."""
        return OPTModelOutput(
            last_hidden_state=self.hidden_B1E,
            past_key_values=cache.extended(cache.keys, cache.values, 1),
            hidden_states=None,
            attentions=None,
        )
