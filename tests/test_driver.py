"""The driver against a crew that loses workers on demand: no Ray, no model."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.events import Event
from jobs.losses import MAX_FAILED_STARTS, MAX_LOSSES_IN_A_ROW
from jobs.stop import StopRequest
from pipeline.errors import StoppedError, TooManyFailedRowsError, WorkerError
from pipeline.records import RowRange, Shard
from pipeline.segments import Totals
from tests.fake_crew import ROWS, Answer, always_done, done, halves, lost, make_driver, make_shards


def _killed_by(*killers: str) -> Answer:
    """Whoever runs one of these rows is lost."""

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        is_error = only is not None and only.error is not None
        if not is_error and any(shard.row_id(row) in killers for row in rows):
            return lost()
        return always_done(worker, shard, rows, only)

    return answer


def test_every_shard_is_completed_once() -> None:
    """Without faults each shard is handed out once, in order, and counted once."""
    driver, crew, recorder = make_driver(always_done, make_shards(7))
    driver.run()
    assert crew.handed_shards == list(range(7))
    assert recorder.completed == list(range(7))
    assert recorder.totals.num_completions == 7 * ROWS


def test_the_shards_of_a_lost_worker_go_to_another_one() -> None:
    """A lost worker costs time and no shard: all it held is handed out again, elsewhere."""
    losses = iter([3])

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        if shard.index == 3 and next(losses, None) is not None:
            return lost()
        return done(shard, rows)

    driver, crew, recorder = make_driver(answer, make_shards(9))
    driver.run()
    assert sorted(recorder.completed) == list(range(9))
    again = [shard for shard, times in Counter(crew.handed_shards).items() if times == 2]
    assert 3 in again
    assert len(again) <= 2
    first, second = [worker for worker, shard, _ in crew.handed if shard == 3]
    assert first != second


def test_rows_that_kill_become_error_rows() -> None:
    """They are found in their shards, whatever ran beside them; all others are done once."""
    killers = {"in#10", "in#17", "in#39", "in#59"}
    driver, crew, recorder = make_driver(_killed_by(*killers), make_shards(6), max_failed=4)
    driver.run()
    assert recorder.failed == killers
    assert sorted(recorder.completed) == list(range(6))
    assert recorder.totals.num_completions == 6 * ROWS
    assert recorder.totals.error == 4
    assert crew.num_lost < 4 * 8


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("shard", [0, 1, 39])
def test_a_whole_shard_of_killers_is_got_through(num_workers: int, shard: int) -> None:
    """They are no reason to give up if other rows can be done, or could be when all are done."""
    killers = {f"in#{row}" for row in range(32 * shard, 32 * shard + 32)}
    driver, _, recorder = make_driver(
        _killed_by(*killers), make_shards(40, rows=32), num_workers=num_workers, max_failed=32
    )
    driver.run()
    assert recorder.failed == killers
    assert sorted(recorder.completed) == list(range(40))


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("num_good", [0, 40])
def test_workers_that_any_row_kills_end_the_run(num_workers: int, num_good: int) -> None:
    """No row is blamed for what lies in none, from the start or from some moment on."""
    good = iter(range(num_good))

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        return lost() if next(good, None) is None else done(shard, rows)

    driver, crew, recorder = make_driver(
        answer, make_shards(100), num_workers=num_workers, max_failed=1000
    )
    with pytest.raises(WorkerError, match="no row was done in between"):
        driver.run()
    assert not recorder.failed
    assert crew.num_lost == MAX_LOSSES_IN_A_ROW * num_workers


def test_a_broken_worker_costs_no_row() -> None:
    """What is lost on one worker is tried on another: a broken device is no row's fault."""

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        return lost() if worker == 1 else always_done(worker, shard, rows, only)

    driver, crew, recorder = make_driver(answer, make_shards(30))
    driver.run()
    assert crew.num_lost > 2
    assert not recorder.failed
    assert sorted(recorder.completed) == list(range(30))


def test_a_machine_that_goes_takes_no_run_with_it() -> None:
    """All of many workers are lost at once with rows in hand, and the run goes on."""
    left = iter(range(40))

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        return lost() if next(left, None) is not None else always_done(worker, shard, rows, only)

    driver, crew, recorder = make_driver(answer, make_shards(100), num_workers=20)
    driver.run()
    assert crew.num_lost == 40
    assert not recorder.failed
    assert sorted(recorder.completed) == list(range(100))


def test_rows_lost_with_a_node_run_beside_others_again() -> None:
    """Once: a row that takes its node with it every time is found like any other that kills."""
    first = iter([3])

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        is_error = only is not None and only.error is not None
        if (shard.index == 3 and next(first, None)) or ("in#55" in map(shard.row_id, rows)):
            return done(shard, rows, errors=len(rows)) if is_error else lost(with_node=True)
        return done(shard, rows)

    driver, crew, recorder = make_driver(answer, make_shards(9), max_failed=1)
    driver.run()
    assert [rows for _, shard, rows in crew.handed if shard == 3] == [None, None]
    of_killer = [rows for _, shard, rows in crew.handed if shard == 5]
    assert of_killer[:3] == [None, None, RowRange(0, ROWS)]
    assert recorder.failed == {"in#55"}
    assert sorted(recorder.completed) == list(range(9))


def test_what_others_have_completed_is_not_run_again() -> None:
    """A worker that was cut off had committed all of a shard, or another attempt has meanwhile."""
    first = iter([0])

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        if shard.index == 3 and next(first, None) is not None:
            recorder._missing[3].clear()
            recorder._missing[4].clear()
            return lost(with_node=True)
        return done(shard, rows)

    driver, crew, recorder = make_driver(answer, make_shards(5))
    driver.run()
    assert [rows for _, shard, rows in crew.handed if shard == 3] == [None]
    assert [rows for _, shard, rows in crew.handed if shard == 4] == [None]


def test_a_suspect_that_another_has_completed_is_not_run() -> None:
    """A late commit of a worker that was given up may do what was still to be looked into."""
    first = iter([0])

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        if next(first, None) is not None:
            return lost()
        recorder._missing[1].clear()
        return done(shard, rows)

    driver, crew, recorder = make_driver(answer, make_shards(2), num_workers=1)
    driver.run()
    assert crew.handed == [(0, 0, None), (0, 1, None), (0, 0, RowRange(0, ROWS))]


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 40),
    st.sets(st.integers(0, 239), max_size=6),
    st.booleans(),
)
def test_whatever_rows_kill_the_job_ends_well(
    num_workers: int, num_shards: int, num_rows: int, killers: set[int], releases: bool
) -> None:
    """Few or many workers, large or small shards: the killers fail and all others are done.

    Whether or not workers release rows to each other.
    """
    killers = {row for row in killers if row < num_shards * num_rows}
    names = {f"in#{row}" for row in killers}
    driver, _, recorder = make_driver(
        _killed_by(*names),
        make_shards(num_shards, rows=num_rows),
        num_workers=num_workers,
        max_failed=6,
        totals=Totals(stop=1),
        releases=releases,
    )
    driver.run()
    assert recorder.failed == names
    assert sorted(recorder.completed) == list(range(num_shards))


def test_a_worker_without_rows_gets_some_of_the_slowest() -> None:
    """Once all shards are handed out, what one has not begun with goes to another in pieces."""
    driver, crew, recorder = make_driver(always_done, make_shards(3), num_workers=3, releases=True)
    crew._shards_in_flight = 3
    all_places = crew.free_places
    crew.free_places = lambda: all_places() if crew.handed else iter([0, 0, 0])  # type: ignore[method-assign]
    driver.run()
    assert crew.num_released >= 2
    assert {worker for worker, _, _ in crew.handed} == {0, 1, 2}
    assert sorted(recorder.completed) == [0, 1, 2]


def test_rows_that_were_released_to_nobody_are_done() -> None:
    """Their worker had answered for its shard, and died before it could tell what it gave up."""
    answers = iter(["died"])

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        kept, _ = halves(rows)
        return done(shard, kept if next(answers, None) else rows)

    driver, crew, recorder = make_driver(answer, make_shards(1))
    driver.run()
    assert crew.handed_shards == [0, 0]
    assert recorder.completed == [0]


def test_the_last_row_of_a_job_can_be_blamed() -> None:
    """An earlier run did all rows but one, which kills: there is no other row to compare with."""
    driver, _, recorder = make_driver(
        _killed_by("in#0"), make_shards(1, rows=1), totals=Totals(stop=99), max_failed=1
    )
    driver.run()
    assert recorder.failed == {"in#0"}


def test_a_job_of_which_no_row_was_ever_done_blames_none() -> None:
    """With a single row, the model may as well be at fault; the row is named."""
    driver, crew, recorder = make_driver(_killed_by("in#0"), make_shards(1, rows=1), max_failed=1)
    with pytest.raises(WorkerError, match="in#0"):
        driver.run()
    assert not recorder.failed
    assert crew.num_lost <= 3


def test_a_retry_of_nothing_but_killers_comes_to_its_end() -> None:
    """Rows of the job were done, in the run before: so it is the rows."""
    driver, _, recorder = make_driver(
        _killed_by("in#0"), make_shards(1, rows=1), max_failed=1, num_generated_before=7
    )
    driver.run()
    assert recorder.failed == {"in#0"}


def test_commits_that_come_back_into_sight_are_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a lost worker are not counted until its loss has been looked at."""
    driver, _, _ = make_driver(always_done, make_shards(1))
    seen = iter([30, 0, 30, 31])
    monkeypatch.setattr(driver, "_committed", lambda: Totals(stop=next(seen)))
    has_generated = []
    for _ in range(4):
        driver._has_generated = False
        driver._look_for_success()
        has_generated.append(driver._has_generated)
    assert has_generated == [True, False, False, True]


def test_an_error_that_cannot_be_written_ends_the_run() -> None:
    """A worker that dies of reading the file does so for every row: the file is named."""

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        return lost() if shard.index == 1 else always_done(worker, shard, rows, only)

    driver, crew, recorder = make_driver(answer, make_shards(300), max_failed=1000)
    with pytest.raises(WorkerError, match=r"'in\.parquet' can be read"):
        driver.run()
    assert not recorder.failed
    assert crew.num_lost < 20


def test_a_worker_that_never_starts_ends_the_run() -> None:
    """Workers that are lost before they hold a row are tried a few times, and said why."""
    driver, crew, _ = make_driver(always_done, make_shards(3), num_workers=1)
    crew._members[0].is_ready = False
    events = iter(range(100))

    def wait(timeout: float) -> list[Event]:
        next(events)
        return [lost()]

    crew.start = lambda: None  # type: ignore[method-assign]
    crew.wait = wait  # type: ignore[method-assign]
    with pytest.raises(WorkerError, match=r"before they had begun with a row .*killed"):
        driver.run()
    assert next(events) == MAX_FAILED_STARTS


def test_a_superseded_attempt_is_looked_at_again() -> None:
    """A shard that another attempt committed to is not taken for complete before it is."""
    answers = iter([False, True])

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        if shard.index == 0 and not next(answers):
            return done(shard, [], is_complete=False)
        return done(shard, rows)

    driver, crew, recorder = make_driver(answer, make_shards(2))
    driver.run()
    assert crew.handed_shards.count(0) == 2
    assert sorted(recorder.completed) == [0, 1]


def test_too_many_failed_rows_stop_the_run() -> None:
    """Past the allowed number of failed rows the run drains and says both numbers."""

    def answer(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
        return done(shard, rows, errors=2)

    driver, crew, recorder = make_driver(answer, make_shards(50), max_failed=5)
    with pytest.raises(TooManyFailedRowsError, match="allows 5") as raised:
        driver.run()
    assert str(raised.value).startswith(f"{recorder.totals.error} rows")
    assert crew.is_draining
    assert recorder.totals.num_completions < 50 * ROWS


def test_rows_that_kill_count_as_failed() -> None:
    """A job may lose as many rows to dead workers as to anything else, and no more."""
    driver, crew, _ = make_driver(_killed_by("in#3", "in#25"), make_shards(20), max_failed=0)
    with pytest.raises(TooManyFailedRowsError, match="allows 0"):
        driver.run()
    assert crew.is_draining


def test_failed_rows_of_earlier_runs_count() -> None:
    """Running the same command again does not forget the failures there were."""
    driver, _, _ = make_driver(always_done, make_shards(2), max_failed=5, totals=Totals(error=6))
    with pytest.raises(TooManyFailedRowsError):
        driver.run()


def test_a_stop_commits_what_workers_hold() -> None:
    """When asked to stop, the driver hands out nothing more and takes in what is in flight."""

    class StopAfter(StopRequest):
        def reason(self) -> str | None:
            return "the test says so" if len(recorder.completed) >= 3 else None

    driver, crew, recorder = make_driver(always_done, make_shards(50), stop=StopAfter())
    with pytest.raises(StoppedError, match="the test says so"):
        driver.run()
    assert crew.is_draining
    assert not crew.num_in_flight
    assert sorted(recorder.completed) == sorted(crew.handed_shards)
