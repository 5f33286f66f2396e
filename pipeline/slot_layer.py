"""One attention layer's part of a `SlotCache`: the buffers, and what the model sees of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


@dataclass
class Window:
    """The part of the buffers that is in use: slots [0, num_rows), columns [first, end)."""

    num_rows: int = 0
    first: int = 0
    end: int = 0

    @property
    def length(self) -> int:
        """Columns from the start of the longest row to the common end."""
        return self.end - self.first


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer; what a model's layer sees is a view.

    Sliding-window layers use it too: all columns are kept and the mask does the sliding, by column,
    which is by position, as every row is without a gap and ends at the same column.

    Args:
        window: shared by the layers of a cache.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, window: Window, num_slots: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._window = window
        self._num_slots = num_slots
        self._capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers; the heads and their sizes are those of the first states."""
        self.keys = self._buffer(key_states)
        self.values = self._buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes new columns at the window's end; returns the window with them, as views.

        Args:
            key_states: (rows, KV heads, new columns, head size), and so the values.
        """
        window = self._window
        stop = window.end + key_states.shape[-2]
        self.write(0, window.end, key_states, value_states)
        rows = slice(0, window.num_rows)
        columns = slice(window.first, stop)
        return self.keys[rows, :, columns], self.values[rows, :, columns]

    def write(self, slot: int, column: int, keys: Tensor, values: Tensor) -> None:
        """Copies states into consecutive slots and columns, from the given ones on."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        slots = slice(slot, slot + keys.shape[0])
        columns = slice(column, column + keys.shape[-2])
        self.keys[slots, :, columns] = keys
        self.values[slots, :, columns] = values

    def read(self, slots: slice | list[int], columns: slice) -> tuple[Tensor, Tensor]:
        """Keys and values; views if `slots` is a slice."""
        return self.keys[slots, :, columns], self.values[slots, :, columns]

    def resize(self, num_slots: int, capacity: int) -> None:
        """Moves the window to the front of new buffers."""
        self._num_slots, self._capacity = num_slots, capacity
        if self.is_initialized:
            keys, values = self.read(*self._slices())
            self.keys = self._moved(keys)
            self.values = self._moved(values)

    def shift(self, distance: int) -> None:
        """Moves the window to the right, or to the left if negative."""
        keys, values = self.read(*self._slices())
        # Cloned, as the two places overlap.
        self.write(0, self._window.first + distance, keys.clone(), values.clone())

    def blank(self, slot: int) -> None:
        """Fills a slot with zeros."""
        self.keys[slot].zero_()
        self.values[slot].zero_()

    @property
    def num_token_bytes(self) -> int:
        """What one column of one slot takes."""
        states = (self.keys[0, :, 0], self.values[0, :, 0])
        return sum(state.numel() * state.element_size() for state in states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a query sees, and the first of them, counted from the window's."""
        return self._window.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of the window: what transformers takes for the length so far."""
        return self._window.length

    def get_max_length(self) -> int:
        """No limit: who owns the cache sees to it that there is room."""
        return -1

    def _slices(self) -> tuple[slice, slice]:
        window = self._window
        return slice(0, window.num_rows), slice(window.first, window.end)

    def _buffer(self, like: Tensor) -> Tensor:
        return like.new_zeros(self._num_slots, like.shape[1], self._capacity, like.shape[3])

    def _moved(self, states: Tensor) -> Tensor:
        buffer = self._buffer(states)
        buffer[: states.shape[0], :, : states.shape[2]] = states
        return buffer
