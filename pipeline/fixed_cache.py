"""A `SlotCache` as a step of fixed shapes sees it: all slots, and the first columns of them.

Nothing here depends on how far the rows have come: that is in a tensor, so that a recorded step
can be replayed at any column.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from pipeline.slot_layer import SlotLayer
from pipeline.slots import SlotCache


class FixedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The buffers of a `SlotLayer`, written at a column that only the device knows.

    Args:
        layer: has its buffers already.
        column: (1,) int64, where the next keys and values go; below `width`.
        width: columns that attention sees, from the buffers' first one on.
    """

    is_compileable = True
    """Has transformers build the mask of a decode step without looking at what is in it."""
    is_sliding = False

    def __init__(self, layer: SlotLayer, column: Tensor, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer = layer
        self._column = column
        self._width = width
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to be done: the buffers are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the column; returns views of all slots.

        Args:
            key_states: (slots, KV heads, 1, head size), and so the values.
        """
        keys, values = self._layer.keys, self._layer.values
        keys.index_copy_(2, self._column, key_states)
        values.index_copy_(2, self._column, value_states)
        return keys[:, :, : self._width], values[:, :, : self._width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query sees, and the first of them."""
        return self._width, 0

    def get_seq_length(self) -> Any:
        """The column, as a tensor, as transformers' own static layers give it."""
        return self._column[0]

    def get_max_length(self) -> int:
        """No limit: who owns the cache sees to it that there is room."""
        return -1


def fixed_cache(cache: SlotCache, column: Tensor, width: int) -> Cache:
    """All layers of a cache; for the arguments see `FixedLayer`."""
    layers: list[Any] = [FixedLayer(layer, column, width) for layer in cache.layers]
    return Cache(layers=layers)
