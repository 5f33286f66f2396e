"""The left-padded KV cache with slots. It knows no model, no request and no token.

Every row ends at the same column `end` of one buffer per layer, (slots, KV heads, capacity, head
size), and begins where its length says. So a decode step writes one column for all rows in place,
a new row is copied in so that it ends at `end`, and a row that has ended is overwritten by the
last one: rows always fill the first slots. Columns left of a row's start hold what was there
before; the attention mask hides them. They must be finite, as zero times NaN is NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pipeline.bands import bands_of
from pipeline.slot_layer import SlotLayer, Window
from pipeline.transfer import to_device


class SlotCache(Cache):
    """The layers of a model, and where each row begins.

    Args:
        num_slots: most rows.
        capacity: most columns.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int, num_slots: int, capacity: int) -> None:
        self.window = Window()
        self.num_slots = num_slots
        self.capacity = capacity
        self._starts: list[int] = []
        self._starts_on_device: Tensor | None = None
        layers: list[Any] = [SlotLayer(self.window, num_slots, capacity) for _ in range(num_layers)]
        super().__init__(layers=layers)

    @property
    def num_token_bytes(self) -> int:
        """What one column of one slot takes in all layers; known once something is in."""
        return sum(self.token_bytes.values())

    @property
    def token_bytes(self) -> dict[torch.device, int]:
        """The same, for each device that has layers."""
        devices = Counter[torch.device]()
        for layer in self.layers:
            devices[layer.keys.device] += layer.num_token_bytes
        return devices

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [self.window.end - start for start in self._starts]

    def place(self, lengths: Sequence[int], num_new: int) -> None:
        """Makes rows of these lengths, of which the last `num_new` columns are still to come."""
        longest = max(lengths)
        self.window.end = longest - num_new
        self._set_starts([longest - length for length in lengths])

    def fill(self, prefix: SlotCache) -> None:
        """Copies the first row of another cache to the start of every row, up to `end`."""
        for row, length in enumerate(self.lengths):
            columns = slice(prefix.window.first, prefix.window.first + length)
            for mine, layer in zip(self.layers, prefix.layers, strict=True):
                if length > 0:
                    mine.write(row, self._starts[row], *layer.read(slice(0, 1), columns))

    def model_inputs(self, num_new: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What a forward pass over the next columns needs beside the tokens.

        Returns:
            attention_mask: (rows, window and new columns) bool.
            position_ids: (rows, new columns) int64; 0 for columns before a row's start.
        """
        if num_new == 1 and self.window.bands is None:
            self.window.bands = bands_of(self.lengths)
        starts = self.starts_on(device)
        columns = torch.arange(self.window.first, self.window.end + num_new, device=device)
        return columns >= starts, (columns[-num_new:] - starts).clamp_(min=0)

    def starts_on(self, device: torch.device) -> Tensor:
        """The column at which each row begins, (rows, 1) int64; the same tensor until one does."""
        if self._starts_on_device is None:
            self._starts_on_device = to_device(self._starts, device)[:, None]
        return self._starts_on_device

    def advance(self, num_new: int) -> None:
        """Takes the columns that a forward pass has written into the window."""
        self.window.end += num_new

    def append(self, other: SlotCache, rows: Sequence[int]) -> None:
        """Copies rows of another cache, perhaps one of them several times, into free slots.

        There must be room for their longest left of `end`; an empty cache makes it so.
        """
        window, theirs = self.window, other.window
        if not self._starts:
            window.end = theirs.length
        columns = slice(theirs.first, theirs.end)
        is_all = list(rows) == list(range(theirs.num_rows))
        chosen = slice(0, theirs.num_rows) if is_all else list(rows)
        for mine, layer in zip(self.layers, other.layers, strict=True):
            states = layer.read(chosen, columns)
            mine.write(window.num_rows, window.end - theirs.length, *states)
        lengths = other.lengths
        self._set_starts(self._starts + [window.end - lengths[row] for row in rows])

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Frees all other slots; the last rows move into the gaps.

        Returns:
            for each slot now in use, the one whose row it has.
        """
        order = _dense_order(rows)
        lengths = self.lengths
        moves = [(slot, row) for slot, row in enumerate(order) if slot != row]
        for layer in self.layers:
            for slot, row in moves:
                layer.move(slot, row, self._columns(lengths[row]))
        self._set_starts([self._starts[row] for row in order])
        return order

    def reorder(self, rows: Sequence[int]) -> None:
        """Puts the rows into another order; `rows` says for each slot whose row it gets."""
        columns = [self._columns(length) for length in self.lengths]
        rings = _rings(rows)
        for layer in self.layers:
            for ring in rings:
                # Only one row at a time is kept elsewhere: fresh memory costs more than copying.
                held = layer.copy(ring[0], columns[ring[0]])
                for slot, row in pairwise(ring):
                    layer.move(slot, row, columns[row])
                layer.write(ring[-1], columns[ring[0]].start, *held)
        self._set_starts([self._starts[row] for row in rows])

    def _columns(self, length: int) -> slice:
        return slice(self.window.end - length, self.window.end)

    def blank(self, row: int) -> None:
        """Fills a row's slot with zeros: what follows it there must find nothing but numbers."""
        for layer in self.layers:
            layer.blank(row)

    def move_end(self, end: int) -> None:
        """Moves the window within the buffers, so that it ends at column `end`."""
        distance = end - self.window.end
        for layer in self.layers:
            layer.shift(distance)
        self._move(distance)

    def resize(self, num_slots: int, capacity: int) -> None:
        """Moves the window to the front of buffers of another size."""
        # First: where memory runs out, this is what there was too little for.
        self.num_slots, self.capacity = num_slots, capacity
        for layer in self.layers:
            layer.resize(num_slots, capacity)
        self._move(-self.window.first)

    def _move(self, distance: int) -> None:
        self.window.end += distance
        self._set_starts([start + distance for start in self._starts])

    def _set_starts(self, starts: list[int]) -> None:
        self._starts = starts
        self._starts_on_device = None
        self.window.bands = None
        self.window.num_rows = len(starts)
        self.window.first = min(starts, default=self.window.end)


def _dense_order(rows: Sequence[int]) -> list[int]:
    """Rows in the first slots, moving none that is there already."""
    staying = set(rows)
    later = sorted(row for row in rows if row >= len(rows))
    return [slot if slot in staying else later.pop() for slot in range(len(rows))]


def _rings(rows: Sequence[int]) -> list[list[int]]:
    """A permutation as rings of slots, in which each gets the row of the next."""
    rings = []
    left = {slot: row for slot, row in enumerate(rows) if slot != row}
    while left:
        slot, row = left.popitem()
        ring = [slot]
        while row != ring[0]:
            ring.append(row)
            row = left.pop(row)
        rings.append(ring)
    return rings
