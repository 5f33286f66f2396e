"""How many rows the memory for keys and values takes, and how large their buffers are."""

from __future__ import annotations

import torch

from pipeline.slots import SlotCache

CPU_CACHE_BYTES = 2 * 2**30
"""Without a GPU, where nothing says how much of the machine's memory is meant for it."""
FREE_SHARE = 0.85
"""Of what a GPU has left beside the weights; the rest is for a forward pass's own tensors."""
COLUMN_STEP = 64
"""Capacities are multiples of this."""
SPARE_SHARE = 4
"""A quarter more columns than the longest row has, so that the window seldom has to move."""
GROWTH = 2
"""Times as many columns as needed, where memory allows: new buffers take a step's time."""
MOVE_SHARE = 8
"""The window moves to the front if that frees an eighth of the columns."""


def default_cache_bytes(device: torch.device) -> int:
    """Memory for keys and values, once the weights are loaded."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * FREE_SHARE)


def num_columns(length: int) -> int:
    """The capacity for rows of up to `length` tokens."""
    wanted = length + length // SPARE_SHARE + 1
    return -(-wanted // COLUMN_STEP) * COLUMN_STEP


class Room:
    """Keeps slots times columns within a number of tokens, and moves a cache's window about.

    The limit is for rows that run together: one alone may take whatever memory there is.

    Args:
        num_slots: most rows, however short they are.
        num_bytes: for keys and values, in all layers.

    Attributes:
        max_tokens: slots times columns; None until the size of a token is known, or memory has
            run out.
        num_moves: times a window was moved, within its buffers or to other ones.
    """

    def __init__(self, num_slots: int, num_bytes: int) -> None:
        self.num_slots = num_slots
        self.max_tokens: int | None = None
        self.num_moves = 0
        self._num_bytes = num_bytes

    def set_token_bytes(self, num_token_bytes: int) -> None:
        """Takes note of what one token takes in all layers."""
        self._lower(self._num_bytes // num_token_bytes)

    def halve(self, num_rows: int, length: int) -> None:
        """Takes note that so many rows, the longest of this length, are twice too many."""
        self._lower(num_rows * num_columns(length) // 2)

    def num_rows(self, length: int) -> int:
        """How many rows run together if the longest has `length` tokens; at least 1."""
        if self.max_tokens is None:
            return self.num_slots
        return min(self.num_slots, max(1, self.max_tokens // num_columns(length)))

    def make_for(self, cache: SlotCache, num_rows: int, length: int) -> None:
        """Makes the cache one that can hold so many rows, the longest of this length."""
        if num_rows > cache.num_slots or length > cache.capacity:
            self.resize(cache, length)
        if cache.window.num_rows > 0 and cache.window.end < length:
            self._move_end(cache, length)

    def make_column(self, cache: SlotCache) -> bool:
        """Sees to it that the window can grow; False if that takes other buffers."""
        if cache.window.end < cache.capacity:
            return True
        if cache.window.first * MOVE_SHARE < cache.capacity:
            return False
        self._move_end(cache, cache.window.length)
        return True

    def resize(self, cache: SlotCache, length: int) -> None:
        """Gives the cache buffers for rows of up to `length`, and as many as then can run."""
        assert self.max_tokens is not None, "the size of a token is known from the first prompt on"
        num_slots = self.num_rows(length)
        needed = num_columns(length)
        wanted = max(GROWTH * needed, cache.capacity)
        capacity = max(needed, min(wanted, self.max_tokens // num_slots))
        cache.resize(num_slots, capacity)
        self.num_moves += 1

    def _move_end(self, cache: SlotCache, end: int) -> None:
        cache.move_end(end)
        self.num_moves += 1

    def _lower(self, max_tokens: int) -> None:
        if self.max_tokens is None or max_tokens < self.max_tokens:
            self.max_tokens = max_tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device, in one of its libraries or on the host."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in text
        for sign in ("out of memory", "not enough memory", "alloc_failed", "can't allocate memory")
    )
