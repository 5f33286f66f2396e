"""A crew and a recorder in memory: workers answer, or are lost, as a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from jobs.crew import Crew, Event, ShardDone, WorkerLost
from jobs.driver import Driver
from jobs.member import Member
from jobs.progress import Silent
from jobs.recorder import Recorder
from jobs.stop import StopRequest
from pipeline.outcome import ShardOutcome
from pipeline.records import RowRange, Shard
from pipeline.segments import SegmentInfo, Totals, as_ranges

ROWS = 10

Answer = Callable[[int, Shard, list[int], RowRange | None], Event]
"""What becomes of a worker that runs these rows of a shard, its range first if it is a suspect."""


def make_shards(count: int, rows: int = ROWS) -> list[Shard]:
    """Shards of one file."""
    return [Shard(index, "in.parquet", "in", index * rows, rows) for index in range(count)]


def done(
    shard: Shard,
    rows: Sequence[int] | None = None,
    *,
    errors: int = 0,
    is_complete: bool = True,
) -> ShardDone:
    """The answer for rows of a shard, all of them by default, that became one commit."""
    rows = range(shard.num_rows) if rows is None else rows
    totals = Totals(stop=len(rows) - errors, error=errors, num_completion_tokens=5 * len(rows))
    ranges = tuple(as_ranges(rows))
    commit = SegmentInfo(
        shard.index, 0, "f", shard.first_row, shard.num_rows, ranges, "worker-0", totals
    )
    return ShardDone(shard, ShardOutcome(shard.index, (commit,) if rows else (), is_complete))


def lost(worker: int = 0) -> WorkerLost:
    """The answer of a worker that dies; what it held is filled in."""
    return WorkerLost(worker, (), "killed")


def always_done(worker: int, shard: Shard, rows: list[int], only: RowRange | None) -> Event:
    """Nothing goes wrong."""
    return done(shard, rows, errors=len(rows) if only and only.error else 0)


class FakeRecorder(Recorder):
    """Keeps in memory what the real one keeps in a folder; no row may come twice."""

    def __init__(self, shards: Sequence[Shard], totals: Totals | None = None) -> None:
        self._shards = shards
        self._totals = totals or Totals()
        self._missing = {shard.index: set(range(shard.num_rows)) for shard in shards}
        self.completed: list[int] = []
        self.failed: set[str] = set()

    @property
    def totals(self) -> Totals:
        return self._totals

    def shards_left(self) -> Iterator[Shard]:
        return iter(self._shards)

    def missing_rows(self, shard: Shard) -> list[int]:
        return sorted(self._missing[shard.index])

    def record(self, outcome: ShardOutcome) -> None:
        missing = self._missing[outcome.shard]
        for commit in outcome.commits:
            self._totals += commit.totals
            rows = {row for first, end in commit.ranges for row in range(first, end)}
            assert rows <= missing, "each row is committed once"
            missing -= rows
            if commit.totals.error == len(rows):
                shard = self._shards[outcome.shard]
                self.failed |= {shard.row_id(row) for row in rows}
        if outcome.is_complete and not missing:
            self.completed.append(outcome.shard)


class FakeCrew(Crew):
    """Answers one call at a time, the oldest first; a lost worker is back at once."""

    def __init__(self, recorder: FakeRecorder, answer: Answer, num_workers: int = 2) -> None:
        self._recorder = recorder
        self._answer = answer
        self._members = [Member(index, is_ready=True) for index in range(num_workers)]
        self._calls: list[tuple[Member, object, Shard, RowRange | None]] = []
        self._shards_in_flight = 2
        self.handed: list[tuple[int, int, RowRange | None]] = []
        self.num_lost = 0
        self.is_draining = False

    @property
    def handed_shards(self) -> list[int]:
        return [shard for _, shard, _ in self.handed]

    def hand(self, worker: int, shard: Shard, rows: RowRange | None = None) -> None:
        assert not self.is_draining, "nothing is handed out once the run is to stop"
        member = self._members[worker]
        assert not member.is_alone, "a suspect has its worker to itself"
        assert rows is None or not member.shards(), "a suspect has its worker to itself"
        for other in self._members:
            assert shard not in other.shards(), "two attempts at a shard would collide"
        self.handed.append((worker, shard.index, rows))
        super().hand(worker, shard, rows)

    def _ask(
        self,
        member: Member,
        method: str,
        shard: Shard | None = None,
        rows: RowRange | None = None,
    ) -> None:
        assert shard is not None
        reference = object()
        member.calls[reference] = (method, shard)
        self._calls.append((member, reference, shard, rows))

    def start(self) -> None:
        for member in self._members:
            member.is_ready = True

    def wait(self, timeout: float) -> list[Event]:
        if not self._calls:
            return []
        member, reference, shard, only = self._calls.pop(0)
        rows = self._recorder.missing_rows(shard)
        rows = rows if only is None else [row for row in rows if row in only]
        event = self._answer(member.index, shard, rows, only)
        if isinstance(event, WorkerLost):
            self.num_lost += 1
            self._calls = [call for call in self._calls if call[0] is not member]
            self._members[member.index] = member.emptied()
            return [WorkerLost(member.index, tuple(member.shards()), event.cause)]
        del member.calls[reference]
        member.is_alone = False
        return [event]

    def drain(self) -> None:
        self.is_draining = True


def make_driver(
    answer: Answer,
    shards: Sequence[Shard],
    *,
    num_workers: int = 2,
    max_failed: int = 0,
    totals: Totals | None = None,
    stop: StopRequest | None = None,
    num_generated_before: int = 0,
) -> tuple[Driver, FakeCrew, FakeRecorder]:
    """A driver over these shards, and what it drives."""
    recorder = FakeRecorder(shards, totals)
    crew = FakeCrew(recorder, answer, num_workers)
    driver = Driver(
        crew=crew,
        recorder=recorder,
        num_completions=sum(shard.num_rows for shard in shards),
        max_failed=max_failed,
        stop=stop or StopRequest(),
        reporter=Silent(),
        grace=5.0,
        num_generated_before=num_generated_before,
    )
    return driver, crew, recorder
