"""How many rows the memory for keys and values takes, and how large their buffers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline.memory_limit import MemoryLimit
from pipeline.slots import SlotCache

CPU_CACHE_BYTES = 2 * 2**30
"""Without a GPU, where nothing says how much of the machine's memory is meant for it."""
FREE_SHARE = 0.75
"""Of what a GPU has left beside the weights; the rest is for prompts that are being prefilled and
for a forward pass's own tensors."""
PREFILL_SHARE = 8
"""Keys and values of prompts that are being prefilled take an eighth beside those in slots."""
COLUMN_STEP = 64
"""Capacities are multiples of this."""
SPARE_SHARE = 4
"""A quarter more columns than the longest row has, so that the window seldom has to move."""
GROWTH = 2
"""Times as many columns as needed, where memory allows: new buffers take a step's time."""
MOVE_SHARE = 8
"""The window moves to the front if that frees an eighth of the columns."""
BUCKET_STEP = 64
"""Steps of fixed shapes have this many columns, or a multiple…"""
BUCKET_SHARE = 4
"""…at most a quarter more than are needed: few steps to record, and little attention wasted."""


def default_cache_bytes(devices: Sequence[torch.device]) -> dict[torch.device, int]:
    """Memory for keys and values on each device, once the weights are loaded."""
    return {device: _share_of_free(device) for device in devices}


def _share_of_free(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * FREE_SHARE)


def num_columns(length: int) -> int:
    """The capacity for rows of up to `length` tokens."""
    wanted = length + length // SPARE_SHARE + 1
    return -(-wanted // COLUMN_STEP) * COLUMN_STEP


def bucket(length: int) -> int:
    """The columns of a step of fixed shapes that sees at least `length`."""
    octave = 1 << (length - 1).bit_length() >> 1
    step = max(BUCKET_STEP, octave // BUCKET_SHARE)
    return -(-length // step) * step


class Room:
    """Keeps slots times columns within a number of tokens, and moves a cache's window about.

    The limit is for rows that run together: one alone may take whatever memory there is.

    Args:
        num_slots: most rows, however short they are.
        num_bytes: for keys and values, in all layers, or on each device that has some.
        limit: what running out of memory has taught.

    Attributes:
        num_moves: times a window was moved, within its buffers or to other ones.
        is_for_one: a single row runs, in buffers that are no larger than it needs.
    """

    def __init__(
        self, num_slots: int, num_bytes: int | Mapping[torch.device, int], limit: MemoryLimit
    ) -> None:
        self.num_slots = num_slots
        self.num_moves = 0
        self.is_for_one = False
        self._num_bytes = num_bytes
        self._budget: int | None = None
        self._limit = limit

    @property
    def max_tokens(self) -> int | None:
        """Slots times columns; None until the size of a token is known, or memory has run out."""
        known = [tokens for tokens in (self._budget, self._limit.max_tokens) if tokens is not None]
        return min(known, default=None)

    def set_token_bytes(self, token_bytes: Mapping[torch.device, int]) -> None:
        """Takes note of what one token takes on each device, in the layers that are there."""
        if isinstance(self._num_bytes, int):
            self._budget = self._num_bytes // sum(token_bytes.values())
        else:
            self._budget = min(self._num_bytes[device] // n for device, n in token_bytes.items())

    @property
    def max_prefill_tokens(self) -> int | None:
        """Of prompts that are prefilled together, padding and prefix included; None if unknown."""
        return None if self.max_tokens is None else self.max_tokens // PREFILL_SHARE

    def halve(self, num_rows: int, length: int, num_allocated: int) -> None:
        """Takes note that so many rows, the longest of this length, are twice too many.

        Args:
            num_allocated: slots times columns of the buffers that there were.
        """
        self._limit.lower(max(num_rows * num_columns(length), num_allocated) // 2)

    def num_rows(self, length: int, num_beside: int = 0) -> int:
        """How many rows run together if the longest has `length` tokens; at least 1.

        Args:
            num_beside: tokens of prompts that are prefilled beside them.
        """
        if self.is_for_one:
            return 1
        if self.max_tokens is None:
            return self.num_slots
        return min(self.num_slots, max(1, self._left_beside(num_beside) // num_columns(length)))

    def _left_beside(self, num_beside: int) -> int:
        """Slots times columns, beside so many tokens: all, while these stay within their share."""
        assert self.max_tokens is not None, "the size of a token is known from the first prompt on"
        return self.max_tokens - max(0, num_beside - self.max_tokens // PREFILL_SHARE)

    def make_way(self, cache: SlotCache, length: int) -> None:
        """Makes the cache smaller where a prompt of this length does not fit beside it."""
        if self.max_tokens is None or self.is_for_one or not cache.num_slots:
            return
        if cache.num_slots * cache.capacity > self._left_beside(length):
            self.resize(cache, max(cache.window.length, length), num_beside=length)

    def make_for(self, cache: SlotCache, num_rows: int, length: int, num_beside: int = 0) -> None:
        """Makes the cache one that can hold so many rows, the longest of this length.

        Args:
            num_beside: as in `num_rows`.
        """
        if num_rows > cache.num_slots or length > cache.capacity:
            self.resize(cache, length, num_beside)
        if cache.window.num_rows > 0 and cache.window.end < length:
            self._move_end(cache, length)

    def make_column(self, cache: SlotCache, in_buckets: bool = False) -> bool:
        """Sees to it that the window can grow; False if that takes other buffers.

        Args:
            in_buckets: steps see the columns from the buffers' first on, so the window is also
                moved to stay in a small bucket.
        """
        window = cache.window
        limit = min(bucket(window.length + 1), cache.capacity) if in_buckets else cache.capacity
        if window.end < limit:
            return True
        if window.first * MOVE_SHARE < window.end:
            return window.end < cache.capacity
        self._move_end(cache, window.length)
        return True

    def resize(self, cache: SlotCache, length: int, num_beside: int = 0) -> None:
        """Gives the cache buffers for rows of up to `length`, and as many as then can run.

        Args:
            num_beside: as in `num_rows`.
        """
        num_slots = self.num_rows(length, num_beside)
        needed = num_columns(length)
        wanted = max(GROWTH * needed, cache.capacity)
        most = needed if self.is_for_one else self._left_beside(num_beside) // num_slots
        capacity = max(needed, min(wanted, most))
        cache.resize(num_slots, capacity)
        self.num_moves += 1

    def _move_end(self, cache: SlotCache, end: int) -> None:
        cache.move_end(end)
        self.num_moves += 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device, in one of its libraries or on the host."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in text
        for sign in (
            "out of memory",
            "not enough memory",
            "alloc_failed",
            "bad_alloc",
            "can't allocate memory",
        )
    )
