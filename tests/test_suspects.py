"""Which rows kill: the search for them by itself, with pretended workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import floor, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.suspects import Suspect, Suspects
from pipeline.errors import WorkerError
from pipeline.records import RowRange, Shard

SHARD = Shard(0, "in.parquet", "in", 100, 8)


def _shard(index: int, num_rows: int) -> Shard:
    return Shard(index, "in.parquet", "in", index * 1000, num_rows)


@dataclass
class Search:
    """Runs shards, one attempt after the other, as a driver with one worker would.

    Attributes:
        killers: (shard, row) that end every worker that runs them.
        accidents: attempts that are lost for a reason that is in no row.
        num_saved: rows that a worker commits before it is lost, at most.
    """

    shards: list[Shard]
    killers: set[tuple[int, int]]
    accidents: set[int] = field(default_factory=set)
    num_saved: int = 0
    suspects: Suspects = field(default_factory=Suspects)
    missing: dict[int, list[int]] = field(default_factory=dict)
    failed: list[tuple[int, int]] = field(default_factory=list)
    num_attempts: int = 0
    num_losses: int = 0
    in_a_row: int = 0
    most_in_a_row: int = 0

    def run(self) -> None:
        self.missing = {shard.index: list(range(shard.num_rows)) for shard in self.shards}
        for shard in self.shards:
            self._attempt(shard, RowRange(0, shard.num_rows))
        while self.suspects:
            if self.suspects.are_all_held:
                self._succeed()
            suspect = self.suspects.next()
            assert suspect is not None
            self.suspects.run(suspect, 0)
            self._attempt(suspect.shard, suspect.rows)

    def _attempt(self, shard: Shard, rows: RowRange) -> None:
        self.num_attempts += 1
        assert self.num_attempts < 10_000, "it goes round in circles"
        todo = [row for row in self.missing[shard.index] if row in rows]
        kill = [row for row in todo if (shard.index, row) in self.killers]
        if rows.error is not None:
            self.failed += [(shard.index, row) for row in todo]
            self._commit(shard, todo)
        elif kill or self.num_attempts in self.accidents:
            self._commit(shard, [row for row in todo if row not in kill][: self.num_saved])
            self.num_losses += 1
            self.in_a_row += 1
            self.most_in_a_row = max(self.in_a_row, self.most_in_a_row)
            self.suspects.lost(shard, self.missing[shard.index], 0, "killed")
            return
        elif todo:
            self._commit(shard, todo)
            self._succeed()
        self.suspects.answered(0, is_complete=True)

    def _commit(self, shard: Shard, rows: list[int]) -> None:
        for row in rows:
            self.missing[shard.index].remove(row)  # raises if it is not there: once only

    def _succeed(self) -> None:
        self.in_a_row = 0
        self.suspects.retry_held()


SIZES = st.lists(st.integers(1, 70), min_size=1, max_size=3)


@given(st.data(), SIZES, st.integers(0, 4))
def test_exactly_the_rows_that_kill_are_blamed(
    data: st.DataObject, sizes: list[int], num_saved: int
) -> None:
    """Each is found at the price of a few workers; every row is done, or blamed, once."""
    shards = [_shard(index, size) for index, size in enumerate(sizes)]
    rows = [(shard.index, row) for shard in shards for row in range(shard.num_rows)]
    killers = data.draw(st.sets(st.sampled_from(rows), max_size=6))
    search = Search(shards, killers, num_saved=num_saved)
    search.run()
    assert sorted(search.failed) == sorted(killers)
    assert not any(search.missing.values())
    assert search.num_losses <= sum(floor(log2(sizes[shard])) + 4 for shard, _ in killers)


@given(st.data(), SIZES)
def test_accidents_blame_no_row(data: st.DataObject, sizes: list[int]) -> None:
    """Two workers that are lost at any two moments, or at the same rows, make no row an error."""
    shards = [_shard(index, size) for index, size in enumerate(sizes)]
    accidents = data.draw(st.sets(st.integers(1, 12), max_size=2))
    search = Search(shards, set(), accidents)
    search.run()
    assert not search.failed
    assert not any(search.missing.values())


@pytest.mark.parametrize("num_rows", [1, 2, 3, 32, 512])
def test_a_search_succeeds_between_its_losses(num_rows: int) -> None:
    """Wherever in a shard a killer is, workers are not lost often in a row: see `Losses`."""
    for row in range(num_rows):
        search = Search([_shard(0, num_rows)], {(0, row)})
        search.run()
        assert search.most_in_a_row <= 4
        assert search.num_losses <= log2(num_rows) + 4


def test_four_killers_and_nothing_else_are_found() -> None:
    """The hardest case that the limit of losses allows for."""
    search = Search([_shard(0, 4)], {(0, row) for row in range(4)})
    search.run()
    assert len(search.failed) == 4
    assert search.most_in_a_row <= 11


def _running(suspects: Suspects, worker: int = 0) -> Suspect:
    suspect = suspects.next()
    assert suspect is not None
    suspects.run(suspect, worker)
    return suspect


def test_the_way_of_one_row() -> None:
    """Beside others, alone, cut, held back, tried again, blamed: in this order, and no shorter."""
    suspects = Suspects()
    suspects.lost(SHARD, range(8), 3, "first")
    assert _running(suspects, 4) == Suspect(SHARD, RowRange(0, 8), worker=3)
    assert suspects.next() is None, "one attempt at a shard at a time"

    suspects.lost(SHARD, range(8), 4, "second")
    assert _running(suspects, 5) == Suspect(SHARD, RowRange(0, 1), worker=4)
    suspects.lost(SHARD, range(8), 5, "third")
    assert [suspect.row_id for suspect in suspects.held] == ["in#100"]

    assert _running(suspects).rows == RowRange(1, 5)
    suspects.answered(0, is_complete=True)
    suspects.retry_held()
    assert _running(suspects, 6) == Suspect(SHARD, RowRange(0, 1), worker=5, num_losses=1)
    suspects.lost(SHARD, [0, 5, 6, 7], 6, "fourth")
    blamed = _running(suspects)
    assert blamed.rows.error == (
        "killed: 2 workers were lost while they ran this row alone (the last one: fourth)"
    )
    suspects.answered(0, is_complete=True)
    assert _running(suspects).rows == RowRange(5, 8)
    suspects.answered(0, is_complete=True)
    assert not suspects


def test_what_was_committed_is_not_suspected() -> None:
    """Only rows that are missing are cut, and none of them means that the shard is done."""
    suspects = Suspects()
    suspects.lost(SHARD, [], 0, "killed")
    assert not suspects
    suspects.lost(SHARD, [2, 6, 7], 0, "killed")
    _running(suspects)
    suspects.lost(SHARD, [6, 7], 0, "killed")
    assert _running(suspects).rows == RowRange(6, 7)
    suspects.lost(SHARD, [7], 0, "killed")
    assert _running(suspects).rows == RowRange(7, 8)
    suspects.lost(SHARD, [], 0, "killed")
    assert not suspects


def test_a_row_left_over_is_not_blamed_for_the_others() -> None:
    """A worker lost with several rows of which one is left was not lost with that one alone."""
    suspects = Suspects()
    suspects.lost(SHARD, range(8), 0, "killed")
    _running(suspects)
    suspects.lost(SHARD, [3], 0, "killed")
    assert not suspects.held
    assert _running(suspects) == Suspect(SHARD, RowRange(3, 4), worker=0)


def test_an_overtaken_attempt_runs_again() -> None:
    """Another attempt's commit clears nobody."""
    suspects = Suspects()
    suspects.lost(SHARD, range(8), 0, "killed")
    first = _running(suspects)
    suspects.answered(0, is_complete=False)
    assert _running(suspects) == first


def test_a_piece_of_its_shard_is_not_the_suspect() -> None:
    """A worker that had other rows of the same shard is lost: the suspect runs on, unblamed."""
    suspects = Suspects()
    suspects.lost(SHARD, [3], 0, "killed")
    _running(suspects, 1)
    suspects.lost(SHARD, [3, 4], 1, "killed")
    suspect = _running(suspects, 1)
    suspects.lost(replace(SHARD, chosen=((4, 5),)), [4], 2, "killed")
    assert not suspects.held
    assert suspects.describe(1, SHARD) == "row in#103"
    assert suspects.answered(1, is_complete=True) == suspect
    assert suspects.next() is not None


def test_an_error_that_kills_too_names_the_file() -> None:
    """Where not even an error can be written, no row is at fault."""
    shard = _shard(0, 1)
    suspects = Suspects()
    suspects.lost(shard, [0], 0, "killed")
    for _ in range(2):
        _running(suspects)
        suspects.lost(shard, [0], 0, "killed")
        suspects.retry_held()
    for _ in range(2):
        assert _running(suspects).rows.error
        suspects.lost(shard, [0], 0, "killed")
    _running(suspects)
    with pytest.raises(WorkerError, match=r"in\.parquet"):
        suspects.lost(shard, [0], 0, "killed")
