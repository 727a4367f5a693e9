"""The key and value cache of a decoder: a value that goes in, and a new one that comes out."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.typing import DTypeLike

from opt_common.config import OPTConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the tokens a decoder has seen.

    A cache is a value: what was handed out stays right whatever is computed from it afterwards, so one prefix can be
    continued in many ways. It is a pytree and passes through `jax.jit`, where its capacity must suffice: a compiled
    function can't make room.

    Attributes:
        keys: L arrays (B, S, N, H), S the capacity; slots from `length` on hold nothing.
        values: likewise.
        length: number of tokens held; a traced integer inside `jax.jit`.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: int | Array

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
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """An empty cache with room for `capacity` tokens a row."""
        shape_BSNH = (batch_size, capacity, config.num_attention_heads, config.head_dim)
        keys, values = (
            tuple(jnp.zeros(shape_BSNH, dtype=dtype) for _ in range(config.num_hidden_layers)) for _ in range(2)
        )
        return cls(keys, values, 0)

    def with_room(self, new_tokens: int) -> Self:
        """The same cache with at least `new_tokens` free slots."""
        if isinstance(self.length, Tracer):
            return self
        cache = dataclasses.replace(self, length=int(self.length))
        needed = cache.length + new_tokens
        if needed <= self.capacity:
            return cache
        # Doubling makes the copies of a long continuation cost no more than the continuation.
        capacity = max(needed, 2 * self.capacity)

        def moved(buffer_BSNH: Array) -> Array:
            return jnp.pad(buffer_BSNH, ((0, 0), (0, capacity - self.capacity), (0, 0), (0, 0)))

        return dataclasses.replace(
            cache,
            keys=tuple(map(moved, self.keys)),
            values=tuple(map(moved, self.values)),
        )

    def extended(self, keys: tuple[Array, ...], values: tuple[Array, ...], new_tokens: int) -> Self:
        """The cache after `new_tokens` more tokens, given each layer's buffers with those tokens appended."""
        length = self.length + new_tokens
        return dataclasses.replace(self, keys=keys, values=values, length=length)

    def reordered(self, rows_B: Array) -> Self:
        """A cache whose rows are those of this one that `rows_B` names, (B,) integers, each as often as it is named."""
        keys, values = (tuple(buffer_BSNH[rows_B] for buffer_BSNH in part) for part in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)

    def gathered(self, slots_BS: Array, length: int) -> Self:
        """A cache of `length` tokens: in each slot what this one has in the slot that `slots_BS` names, (B, S)."""
        rows_B1 = jnp.arange(len(slots_BS))[:, None]
        keys, values = (
            tuple(buffer_BSNH[rows_B1, slots_BS] for buffer_BSNH in part) for part in (self.keys, self.values)
        )
        return dataclasses.replace(self, keys=keys, values=values, length=length)

    def cropped(self, length: int | Array) -> Self:
        """The cache as it was when it held its first `length` tokens."""
        return dataclasses.replace(self, length=length)


def append(buffer_BSNH: Array, new_BTNH: Array, offset: int | Array) -> Array:
    """Write new keys or values at slot `offset`, into a copy unless the compiler may reuse the old buffer."""
    return lax.dynamic_update_slice_in_dim(buffer_BSNH, new_BTNH.astype(buffer_BSNH.dtype), offset, axis=1)
