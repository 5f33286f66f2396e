"""The driver against a crew that loses workers on demand: no Ray, no model."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from jobs.crew import Crew, Event, ShardDone, WorkerLost
from jobs.driver import Driver
from jobs.progress import Silent
from jobs.recorder import Recorder
from jobs.stop import StopRequest
from pipeline.errors import StoppedError, TooManyFailedRowsError, WorkerError
from pipeline.outcome import ShardOutcome
from pipeline.records import Shard
from pipeline.segments import SegmentInfo, Totals

ROWS = 10


def _shards(count: int) -> list[Shard]:
    return [Shard(index, "in.parquet", "in", index * ROWS, ROWS) for index in range(count)]


def _done(shard: Shard, errors: int = 0, is_complete: bool = True) -> ShardDone:
    totals = Totals(stop=ROWS - errors, error=errors, num_completion_tokens=50)
    commit = SegmentInfo(
        shard.index, 0, "f", shard.first_row, ROWS, ((0, ROWS),), "worker-0", totals
    )
    return ShardDone(shard, ShardOutcome(shard.index, (commit,), is_complete))


@dataclass
class FakeCrew(Crew):
    """Answers for one shard a call, the way `answer` says; two workers of two shards each."""

    answer: Callable[[Shard], Event] = _done
    held: deque[tuple[int, Shard]] = field(default_factory=deque)
    handed: list[int] = field(default_factory=list)
    alone: set[int] = field(default_factory=set)
    is_draining: bool = False

    @property
    def num_ready(self) -> int:
        return 2

    @property
    def num_in_flight(self) -> int:
        return len(self.held)

    @property
    def num_generated_tokens(self) -> int:
        return 0

    def free_places(self) -> Iterator[int]:
        for worker in (0, 1, 0, 1):
            if self._num_held(worker) < 2 and worker not in self.alone:
                yield worker

    def hand(self, worker: int, shard: Shard, *, alone: bool = False) -> None:
        assert not self.is_draining, "nothing is handed out once the run is to stop"
        assert worker not in self.alone, "a suspect has its worker to itself"
        if alone:
            assert self._num_held(worker) == 0
            self.alone.add(worker)
        self.handed.append(shard.index)
        self.held.append((worker, shard))

    def start(self) -> None:
        pass

    @property
    def num_commits(self) -> int:
        return 0

    @property
    def interim(self) -> Totals:
        return Totals()

    def least_busy(self) -> tuple[int, int]:
        held = {worker: self._num_held(worker) for worker in (0, 1) if worker not in self.alone}
        worker = min(held, key=lambda worker: held[worker])
        return worker, held[worker]

    def _num_held(self, worker: int) -> int:
        return sum(holder == worker for holder, _ in self.held)

    def wait(self, timeout: float) -> list[Event]:
        worker, shard = self.held.popleft()
        self.alone.discard(worker)
        event = self.answer(shard)
        if isinstance(event, WorkerLost):
            lost = (shard, *(other for holder, other in self.held if holder == worker))
            self.held = deque((holder, other) for holder, other in self.held if holder != worker)
            event = WorkerLost(worker, lost, event.cause)
        return [event]

    def drain(self) -> None:
        self.is_draining = True


class FakeRecorder(Recorder):
    """Keeps in memory what the real one keeps in a folder."""

    def __init__(self, count: int, totals: Totals) -> None:
        self._count = count
        self._totals = totals
        self.completed: list[int] = []

    @property
    def totals(self) -> Totals:
        return self._totals

    def shards_left(self) -> Iterator[Shard]:
        return iter(_shards(self._count))

    def record(self, outcome: ShardOutcome) -> None:
        self._totals = sum((commit.totals for commit in outcome.commits), self._totals)
        if outcome.is_complete:
            self.completed.append(outcome.shard)


def _driver(
    crew: FakeCrew,
    count: int,
    *,
    max_failed: int = 0,
    totals: Totals | None = None,
    stop: StopRequest | None = None,
) -> tuple[Driver, FakeRecorder]:
    recorder = FakeRecorder(count, totals or Totals())
    run = Driver(
        crew=crew,
        recorder=recorder,
        num_completions=count * ROWS,
        max_failed=max_failed,
        stop=stop or StopRequest(),
        reporter=Silent(),
        grace=5.0,
    )
    return run, recorder


def test_every_shard_is_completed_once() -> None:
    """Without faults each shard is handed out once, in order, and counted once."""
    crew = FakeCrew()
    run, recorder = _driver(crew, 7)
    run.run()
    assert crew.handed == list(range(7))
    assert recorder.completed == list(range(7))
    assert recorder.totals.num_completions == 7 * ROWS


def test_the_shards_of_a_lost_worker_go_to_another_one() -> None:
    """A lost worker costs time and no shard: all it held is handed out again."""
    losses = iter([3])

    def answer(shard: Shard) -> Event:
        if shard.index == 3 and next(losses, None) is not None:
            return WorkerLost(0, (), "killed")
        return _done(shard)

    crew = FakeCrew(answer=answer)
    run, recorder = _driver(crew, 9)
    run.run()
    assert sorted(recorder.completed) == list(range(9))
    again = [shard for shard, times in Counter(crew.handed).items() if times == 2]
    assert 3 in again
    assert len(again) <= 2


def test_a_shard_that_loses_every_worker_ends_the_run() -> None:
    """A shard that kills whoever takes it stops the run with its rows named, and no others.

    Shard 2 is in flight beside it the first time, and must not be blamed.
    """

    def answer(shard: Shard) -> Event:
        return WorkerLost(0, (), "killed") if shard.index == 1 else _done(shard)

    run, recorder = _driver(FakeCrew(answer=answer), 4)
    with pytest.raises(WorkerError, match=r"in#10 to 19"):
        run.run()
    assert 1 not in recorder.completed


def test_a_superseded_attempt_is_looked_at_again() -> None:
    """A shard that another attempt committed to is not taken for complete before it is."""
    answers = iter([False, True])

    def answer(shard: Shard) -> Event:
        return _done(shard, is_complete=shard.index != 0 or next(answers))

    crew = FakeCrew(answer=answer)
    run, recorder = _driver(crew, 2)
    run.run()
    assert crew.handed.count(0) == 2
    assert sorted(recorder.completed) == [0, 1]


def test_too_many_failed_rows_stop_the_run() -> None:
    """Past the allowed number of failed rows the run drains and says both numbers."""
    crew = FakeCrew(answer=lambda shard: _done(shard, errors=2))
    run, recorder = _driver(crew, 50, max_failed=5)
    with pytest.raises(TooManyFailedRowsError, match="allows 5") as raised:
        run.run()
    assert str(raised.value).startswith(f"{recorder.totals.error} rows")
    assert crew.is_draining
    assert recorder.totals.num_completions < 50 * ROWS


def test_failed_rows_of_earlier_runs_count() -> None:
    """Running the same command again does not forget the failures there were."""
    run, _ = _driver(FakeCrew(), 2, max_failed=5, totals=Totals(error=6))
    with pytest.raises(TooManyFailedRowsError):
        run.run()


def test_a_stop_commits_what_workers_hold() -> None:
    """When asked to stop, the driver hands out nothing more and takes in what is in flight."""

    class StopAfter(StopRequest):
        def reason(self) -> str | None:
            return "the test says so" if len(recorder.completed) >= 3 else None

    crew = FakeCrew()
    run, recorder = _driver(crew, 50, stop=StopAfter())
    with pytest.raises(StoppedError, match="the test says so"):
        run.run()
    assert crew.is_draining
    assert not crew.held
    assert sorted(recorder.completed) == sorted(crew.handed)
