"""One attention layer's part of a `SlotCache`: the buffers, and what the model sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from pipeline.attention import BANDS
from pipeline.bands import Band


@dataclass
class Window:
    """The part of the buffers that is in use: slots [0, num_rows), columns [first, end).

    Attributes:
        bands: of the rows, by length; None as long as nobody has asked for them.
    """

    num_rows: int = 0
    first: int = 0
    end: int = 0
    bands: Sequence[Band] | None = None

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
    _buffers: list[Tensor]

    def __init__(self, window: Window, num_slots: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._window = window
        self._num_slots = num_slots
        self._capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers; the heads and their sizes are those of the first states."""
        self._allocate(key_states, value_states)
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
        keys, values = self.keys[rows, :, columns], self.values[rows, :, columns]
        if key_states.shape[-2] == 1:
            setattr(keys, BANDS, window.bands)
        return keys, values

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

    def move(self, slot: int, row: int, columns: slice) -> None:
        """Copies another slot's row into a slot, to the same columns."""
        for states in self._buffers:
            states[:, slot, :, columns] = states[:, row, :, columns]

    def copy(self, slot: int, columns: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of one slot, as they are now."""
        keys, values = self.read(slice(slot, slot + 1), columns)
        return keys.clone(), values.clone()

    def resize(self, num_slots: int, capacity: int) -> None:
        """Moves the window to the front of new buffers."""
        self._num_slots, self._capacity = num_slots, capacity
        if self.is_initialized:
            states = self.read(*self._slices())
            self._allocate(*states)
            self.write(0, 0, *states)

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

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        """Makes buffers for states such as these.

        Keys and values lie in one, so that a row moves by one copy, unless their sizes differ.
        """
        shapes = [
            (self._num_slots, states.shape[1], self._capacity, states.shape[3])
            for states in (keys, values)
        ]
        if shapes[0] == shapes[1]:
            self._buffers = [keys.new_zeros(2, *shapes[0])]
        else:
            self._buffers = [keys.new_zeros(1, *shape) for shape in shapes]
        # Whether there is one buffer or two. Detached, as autograd forbids some writing to views.
        keys, values = self._buffers[0][0], self._buffers[-1][-1]
        self.keys, self.values = keys.detach(), values.detach()
