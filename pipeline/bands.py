"""Rows of similar length side by side, so that attention need not read what its mask hides.

A row sees the columns from its own start on, yet attention over a batch reads the columns of the
longest row for all of them. A band is a run of consecutive rows that is done by itself, over the
columns of its own longest. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MIN_SAVED = 512
"""Columns, summed over rows, that a further band must save: about what its call costs."""
NUM_GROUPS = 4
"""Groups of equal size into which rows are sorted by length; within one, any order will do."""
NUM_STEPS = 8
"""Decode steps within which moving rows must pay off: about as many come between two refills."""


class Band(NamedTuple):
    """Rows from `first` to before `end`, none of which sees the first `num_hidden` columns."""

    first: int
    end: int
    num_hidden: int


def bands_of(lengths: Sequence[int]) -> list[Band]:
    """Cuts rows into bands, in their order, as long as a cut saves enough."""
    longest = max(lengths, default=0)
    return [Band(first, end, longest - length) for first, end, length in _cut(lengths, 0)]


def grouped_order(lengths: Sequence[int]) -> list[int] | None:
    """An order in which long rows come first, if it is worth moving rows for it.

    Returns:
        for each place the row to be there; None to leave them where they are.
    """
    order = _grouped(lengths)
    sorted_lengths = [lengths[row] for row in order]
    num_saved = _num_columns(lengths) - _num_columns(sorted_lengths)
    num_moved = sum(lengths[row] for place, row in enumerate(order) if place != row)
    # A column is moved by being read and written, and attended to by being read.
    return order if num_saved * NUM_STEPS > 2 * num_moved else None


def _cut(lengths: Sequence[int], offset: int) -> list[tuple[int, int, int]]:
    """First row, end and longest length of each band; rows are counted from `offset`."""
    longest = max(lengths, default=0)
    num_saved, cut = _best_cut(lengths, longest)
    if num_saved < MIN_SAVED:
        return [(offset, offset + len(lengths), longest)]
    return _cut(lengths[:cut], offset) + _cut(lengths[cut:], offset + cut)


def _best_cut(lengths: Sequence[int], longest: int) -> tuple[int, int]:
    """How many columns the best cut saves, and how many rows are before it."""
    after: list[int] = []  # the longest from each place on, from the last to the first
    for length in reversed(lengths):
        after.append(max(length, after[-1] if after else 0))
    after.reverse()
    best, before = (0, 0), 0
    for cut in range(1, len(lengths)):
        before = max(before, lengths[cut - 1])
        num_saved = cut * (longest - before) + (len(lengths) - cut) * (longest - after[cut])
        best = max(best, (num_saved, cut))
    return best


def _grouped(lengths: Sequence[int]) -> list[int]:
    """Rows in groups by length, moving none that is in its group already."""
    ranked = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    order: list[int] = []
    for group in range(NUM_GROUPS):
        first = len(ranked) * group // NUM_GROUPS
        end = len(ranked) * (group + 1) // NUM_GROUPS
        arriving = [row for row in ranked[first:end] if not first <= row < end]
        staying = set(ranked[first:end])
        order += [place if place in staying else arriving.pop() for place in range(first, end)]
    return order


def _num_columns(lengths: Sequence[int]) -> int:
    """Columns that are read for rows in this order, summed over the rows."""
    return sum((end - first) * longest for first, end, longest in _cut(lengths, 0))
