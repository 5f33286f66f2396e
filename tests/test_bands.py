from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pipeline.bands import MIN_SAVED, Band, bands_of, grouped_order

lengths_of_rows = st.lists(st.integers(1, 900), max_size=64)


@given(lengths_of_rows)
def test_bands_hide_no_column_that_a_row_sees(lengths: list[int]) -> None:
    """They follow one another over all rows, and leave out only what all their rows lack."""
    bands = bands_of(lengths)
    assert [band.first for band in bands] + [len(lengths)] == [0] + [band.end for band in bands]
    longest = max(lengths, default=0)
    for band in bands:
        assert band.num_hidden == longest - max(lengths[band.first : band.end], default=0)


@given(lengths_of_rows)
def test_every_cut_pays(lengths: list[int]) -> None:
    """What bands save together is at least the price of each cut."""
    bands = bands_of(lengths)
    num_saved = sum((band.end - band.first) * band.num_hidden for band in bands)
    assert num_saved >= MIN_SAVED * (len(bands) - 1)


def test_a_long_row_is_a_band_of_its_own() -> None:
    """One row of many tokens among short ones does not make them read its columns."""
    assert bands_of([500, *[20] * 31]) == [Band(0, 1, 0), Band(1, 32, 480)]


@given(lengths_of_rows)
def test_an_order_has_every_row_once_and_groups_them_by_length(lengths: list[int]) -> None:
    """No row of an earlier quarter is shorter than one of a later quarter."""
    order = grouped_order(lengths)
    if order is None:
        return
    assert sorted(order) == list(range(len(lengths)))
    ends = [len(order) * group // 4 for group in range(5)]
    for first, end in itertools.pairwise(ends):
        staying = set(order[first:end]) & set(range(first, end))
        assert all(order[place] == place for place in staying)
    groups = [[lengths[row] for row in order[a:b]] for a, b in itertools.pairwise(ends)]
    groups = [group for group in groups if group]
    for one, next_one in itertools.pairwise(groups):
        assert min(one) >= max(next_one)


def test_rows_are_moved_only_when_it_pays() -> None:
    """Not for a few columns, and not if they stand well, whichever end the long ones are at."""
    assert grouped_order([40, 50, 40, 50]) is None
    assert grouped_order([*[800] * 8, *[30] * 24]) is None
    assert grouped_order([*[30] * 24, *[800] * 8]) is None
    lengths = [30, 30, 30, 800] * 8
    order = grouped_order(lengths)
    assert order is not None
    assert set(order[:8]) == set(range(3, 32, 4))
