"""A key-value cache that writes each new token in place, where transformers' own copies the whole cache.

Letters in shapes: b sequences, H heads, T tokens, D numbers per head.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 64
"""Room for tokens that is set aside at a time: the cache is copied once in so many tokens, not at every one."""


class GrowingLayer(DynamicLayer):
    """The keys and values of one layer, [b, H, T, D] each: views of buffers with room for more tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = key_states[:, :, :0], value_states[:, :, :0]
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = _with_room(self._buffers[0], start, end), _with_room(self._buffers[1], start, end)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        super().batch_select_indices(indices)
        self._buffers = self.keys, self.values


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model of this ``config``; layers that see a sliding window keep transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _with_room(states: Tensor, used: int, needed: int) -> Tensor:
    """A buffer of ``needed`` tokens and some to spare that starts with the first ``used`` of ``states``."""
    b, heads, _, numbers = states.shape
    buffer = states.new_empty(b, heads, needed + SPARE_TOKENS, numbers)
    buffer[:, :, :used] = states[:, :, :used]
    return buffer
