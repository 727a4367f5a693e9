"""The key and value cache of a decoder: a value that goes in, and a new one that comes out."""

# TensorFlow's and Keras' annotations know neither symbolic shapes nor what an operation returns.
# pyright: reportArgumentType=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

import dataclasses
from typing import Any, Self

import keras
import tensorflow as tf

from opt_common.config import OPTConfig


@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the tokens a decoder has seen.

    A cache is a value: what was handed out stays right whatever is computed from it afterwards, so one prefix can be
    continued in many ways. It passes through `tf.function`, where its capacity must suffice: a compiled function can't
    make room.

    Attributes:
        keys: L tensors (B, S, N, H), S the capacity; slots from `length` on hold nothing.
        values: likewise.
        length: number of tokens held; a symbolic integer inside `tf.function`.
    """

    keys: tuple[tf.Tensor, ...]
    values: tuple[tf.Tensor, ...]
    length: int | tf.Tensor

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
        dtype: str | tf.DType = "float32",
    ) -> Self:
        """An empty cache with room for `capacity` tokens a row."""
        shape_BSNH = (batch_size, capacity, config.num_attention_heads, config.head_dim)
        keys, values = (
            tuple(tf.zeros(shape_BSNH, dtype=dtype) for _ in range(config.num_hidden_layers)) for _ in range(2)
        )
        return cls(keys, values, 0)

    def with_room(self, new_tokens: int) -> Self:
        """The same cache with at least `new_tokens` free slots."""
        if is_traced(self.length):
            return self
        cache = dataclasses.replace(self, length=int(self.length))
        needed = cache.length + new_tokens
        if needed <= self.capacity:
            return cache
        # Doubling makes the copies of a long continuation cost no more than the continuation.
        capacity = max(needed, 2 * self.capacity)

        def moved(buffer_BSNH: tf.Tensor) -> tf.Tensor:
            return tf.pad(buffer_BSNH, ((0, 0), (0, capacity - self.capacity), (0, 0), (0, 0)))

        return dataclasses.replace(
            cache,
            keys=tuple(map(moved, self.keys)),
            values=tuple(map(moved, self.values)),
        )

    def extended(self, keys: tuple[tf.Tensor, ...], values: tuple[tf.Tensor, ...], new_tokens: int) -> Self:
        """The cache after `new_tokens` more tokens, given each layer's buffers with those tokens appended."""
        length = self.length + new_tokens
        return dataclasses.replace(self, keys=keys, values=values, length=length)

    def reordered(self, rows_B: tf.Tensor) -> Self:
        """A cache whose rows are those of this one that `rows_B` names, (B,) integers, each as often as it is named."""
        keys, values = (
            tuple(tf.gather(buffer_BSNH, rows_B) for buffer_BSNH in part) for part in (self.keys, self.values)
        )
        return dataclasses.replace(self, keys=keys, values=values)

    def gathered(self, slots_BS: tf.Tensor, length: int) -> Self:
        """A cache of `length` tokens: in each slot what this one has in the slot that `slots_BS` names, (B, S)."""
        keys, values = (
            tuple(tf.gather(buffer_BSNH, slots_BS, axis=1, batch_dims=1) for buffer_BSNH in part)
            for part in (self.keys, self.values)
        )
        return dataclasses.replace(self, keys=keys, values=values, length=length)

    def cropped(self, length: int | tf.Tensor) -> Self:
        """The cache as it was when it held its first `length` tokens."""
        return dataclasses.replace(self, length=length)

    def in_variables(self) -> Self:
        """The cache in variables, where a compiled function writes without a copy: no value any more."""
        if self.is_in_variables:
            return self
        keys, values = (
            tuple(tf.Variable(buffer_BSNH, trainable=False) for buffer_BSNH in part)
            for part in (self.keys, self.values)
        )
        return dataclasses.replace(self, keys=keys, values=values)

    @property
    def is_in_variables(self) -> bool:
        """Whether a compiled function writes to the buffers themselves."""
        return isinstance(self.keys[0], tf.Variable)

    def in_tensors(self) -> Self:
        """The cache as a value, whether its buffers are variables or not."""
        keys, values = (tuple(map(tf.convert_to_tensor, part)) for part in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)

    def assign(self, cache: Self) -> None:
        """Give variables the numbers of another cache's buffers."""
        for variable, buffer_BSNH in zip(self.keys + self.values, cache.keys + cache.values, strict=True):
            variable.assign(buffer_BSNH)

    def __tf_flatten__(self) -> tuple[tuple[()], tuple[Any, ...]]:
        return (), (self.keys, self.values, self.length)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[()], components: tuple[Any, ...]) -> Self:
        return cls(*components)


def append(buffer_BSNH: tf.Tensor, new_BTNH: tf.Tensor, offset: int | tf.Tensor) -> tf.Tensor:
    """Write new keys or values at slot `offset`, into a copy unless the compiler may reuse the old buffer."""
    T = new_BTNH.shape[1]
    new_BTNH = tf.cast(new_BTNH, buffer_BSNH.dtype)
    if isinstance(offset, int):
        return tf.concat((buffer_BSNH[:, :offset], new_BTNH, buffer_BSNH[:, offset + T :]), axis=1)
    # Chosen slot by slot: XLA's update of a slice is slower, and only XLA has it.
    slots_S = tf.range(buffer_BSNH.shape[1]) - offset
    if T > 1:
        new_BTNH = tf.gather(new_BTNH, tf.clip_by_value(slots_S, 0, T - 1), axis=1)
    return tf.where(((slots_S >= 0) & (slots_S < T))[None, :, None, None], new_BTNH, buffer_BSNH)


def is_traced(value: Any) -> bool:
    """Whether a value is known only to the function being traced, not to Python."""
    return keras.backend.is_keras_tensor(value) or (tf.is_tensor(value) and not hasattr(value, "numpy"))
