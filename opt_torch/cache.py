"""The key and value cache of a decoder: a value that goes in, and a new one that comes out."""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from opt_common.config import OPTConfig


@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the tokens a decoder has seen.

    A cache behaves as a value: what was handed out stays right whatever is computed from it afterwards, so one prefix
    can be continued in many ways. Inside, new tokens are written in place while nobody else has.

    Attributes:
        keys: L tensors (B, S, N, H), S the capacity; slots from `length` on hold nothing.
        values: likewise.
        length: number of tokens held; inside a step that is recorded a tensor, see `recorded_step.py`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: int
    # Tokens written into these buffers by anyone: one cell, shared by every cache on the same buffers.
    written: list[int] = dataclasses.field(default_factory=lambda: [0], repr=False)

    @property
    def capacity(self) -> int:
        """S, number of slots."""
        return self.keys[0].shape[1]

    @classmethod
    def allocate(
        cls,
        config: OPTConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Self:
        """An empty cache with room for `capacity` tokens a row."""
        shape_BSNH = (batch_size, capacity, config.num_attention_heads, config.head_dim)
        keys, values = (
            tuple(torch.zeros(shape_BSNH, dtype=dtype, device=device) for _ in range(config.num_hidden_layers))
            for _ in range(2)
        )
        return cls(keys, values, 0)

    def with_room(self, new_tokens: int) -> Self:
        """The same cache with at least `new_tokens` free slots that nobody else writes to."""
        if isinstance(self.length, Tensor):
            return self
        needed = self.length + new_tokens
        if needed <= self.capacity and self.written[0] <= self.length:
            return self
        # Doubling makes the copies of a long continuation cost no more than the continuation.
        capacity = self.capacity if needed <= self.capacity else max(needed, 2 * self.capacity)

        def moved(buffer_BSNH: Tensor) -> Tensor:
            B, _, N, H = buffer_BSNH.shape
            new_BSNH = buffer_BSNH.new_zeros((B, capacity, N, H))
            new_BSNH[:, : self.length] = buffer_BSNH[:, : self.length]
            return new_BSNH

        return dataclasses.replace(
            self,
            keys=tuple(map(moved, self.keys)),
            values=tuple(map(moved, self.values)),
            written=[self.length],
        )

    def extended(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], new_tokens: int) -> Self:
        """The cache after `new_tokens` more tokens, given each layer's buffers with those tokens appended."""
        length = self.length + new_tokens
        if isinstance(length, int):
            self.written[0] = max(self.written[0], length)
        return dataclasses.replace(self, keys=keys, values=values, length=length)

    def reordered(self, rows_B: Tensor) -> Self:
        """A cache whose rows are those of this one that `rows_B` names, (B,) integers, each as often as it is named."""
        keys, values = (
            tuple(buffer_BSNH.index_select(0, rows_B) for buffer_BSNH in part) for part in (self.keys, self.values)
        )
        return dataclasses.replace(self, keys=keys, values=values, written=[self.length])

    def gathered(self, slots_BS: Tensor, length: int) -> Self:
        """A cache of `length` tokens: in each slot what this one has in the slot that `slots_BS` names, (B, S)."""
        rows_B1 = torch.arange(len(slots_BS), device=slots_BS.device)[:, None]
        keys, values = (
            tuple(buffer_BSNH[rows_B1, slots_BS] for buffer_BSNH in part) for part in (self.keys, self.values)
        )
        return dataclasses.replace(self, keys=keys, values=values, length=length, written=[length])

    def cropped(self, length: int) -> Self:
        """The cache as it was when it held its first `length` tokens."""
        return dataclasses.replace(self, length=length)


def append(buffer_BSNH: Tensor, new_BTNH: Tensor, offset: int | Tensor) -> Tensor:
    """Write new keys or values at slot `offset`: in place, or into a copy where gradients flow through the old ones."""
    T = new_BTNH.shape[1]
    if isinstance(offset, Tensor):
        new_BTNH = new_BTNH.to(buffer_BSNH.dtype)
        return buffer_BSNH.index_copy_(1, offset + torch.arange(T, device=offset.device), new_BTNH)
    if torch.is_grad_enabled() and (new_BTNH.requires_grad or buffer_BSNH.requires_grad):
        return torch.cat((buffer_BSNH[:, :offset], new_BTNH, buffer_BSNH[:, offset + T :]), dim=1)
    buffer_BSNH[:, offset : offset + T] = new_BTNH
    return buffer_BSNH
