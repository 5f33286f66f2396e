"""A crew and a recorder in memory: workers answer, or are lost, as a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from jobs.crew import Crew
from jobs.driver import Driver
from jobs.events import Event, RowsReleased, ShardDone, WorkerLost
from jobs.member import Member
from jobs.progress import Silent
from jobs.recorder import Recorder
from jobs.stop import StopRequest
from pipeline.outcome import Progress, Released, ShardOutcome
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
    """The answer for rows of a shard, all of them by default, that became one commit.

    The crew fills in the worker.
    """
    rows = range(shard.num_rows) if rows is None else rows
    totals = Totals(stop=len(rows) - errors, error=errors, num_completion_tokens=5 * len(rows))
    ranges = tuple(as_ranges(rows))
    commit = SegmentInfo(
        shard.index, 0, "f", shard.first_row, shard.num_rows, ranges, "worker-0", totals
    )
    return ShardDone(0, shard, ShardOutcome(shard.index, (commit,) if rows else (), is_complete))


def halves(rows: list[int]) -> tuple[list[int], list[int]]:
    """The first of these rows, and the others."""
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def lost(worker: int = 0, *, with_node: bool = False) -> WorkerLost:
    """The answer of a worker that dies; what it held is filled in."""
    return WorkerLost(worker, (), "killed", with_node)


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

    def is_complete(self, shard: int) -> bool:
        return not self._missing[shard]

    def missing_rows(self, shard: Shard, *, is_last: bool = True) -> list[int]:
        return shard.wanted(sorted(self._missing[shard.index]))

    def piece(self, released: Released) -> Shard:
        return replace(self._shards[released.shard], chosen=released.positions)

    @property
    def num_shards_left(self) -> int:
        return sum(map(bool, self._missing.values()))

    def record(self, outcome: ShardOutcome, *, is_last: bool = True) -> None:
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
    """Answers one call at a time, releases and then the oldest; a lost worker is back at once.

    Args:
        releases: a worker releases half of the last shard it holds, if it holds several.
    """

    def __init__(
        self, recorder: FakeRecorder, answer: Answer, num_workers: int = 2, releases: bool = False
    ) -> None:
        self._recorder = recorder
        self._answer = answer
        self._members = [Member(index, is_ready=True) for index in range(num_workers)]
        self._calls: list[tuple[Member, object, Shard | None, RowRange | None]] = []
        self._releases = releases
        self._shards_in_flight = 2
        self.handed: list[tuple[int, int, RowRange | None]] = []
        self.num_lost = self.num_released = 0
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
        self._count_unstarted()

    def _ask(self, member: Member, method: str, *arguments: Any) -> None:
        shard, rows = arguments if method == "run" else (None, None)
        reference = object()
        member.calls[reference] = (method, shard)
        self._calls.append((member, reference, shard, rows))

    def start(self) -> None:
        for member in self._members:
            member.is_ready = True

    def wait(self, timeout: float) -> list[Event]:
        if not self._calls:
            return []
        releases = (n for n, call in enumerate(self._calls) if call[2] is None)
        member, reference, shard, only = self._calls.pop(next(releases, 0))
        if shard is None:
            del member.calls[reference]
            return self._release(member)
        rows = self._recorder.missing_rows(shard)
        rows = rows if only is None else [row for row in rows if row in only]
        event = self._answer(member.index, shard, rows, only)
        if isinstance(event, WorkerLost):
            self.num_lost += 1
            self._calls = [call for call in self._calls if call[0] is not member]
            self._members[member.index] = member.emptied()
            return [replace(event, worker=member.index, shards=tuple(member.shards()))]
        del member.calls[reference]
        member.is_alone = False
        self._count_unstarted()
        return [replace(event, worker=member.index) if isinstance(event, ShardDone) else event]

    def _unstarted(self, member: Member) -> list[int]:
        """Which calls are for shards that have not been begun."""
        calls = [n for n, call in enumerate(self._calls) if call[0] is member and call[2]]
        return calls[1:] if self._releases else []

    def _count_unstarted(self) -> None:
        for member in self._members:
            member.progress = Progress(num_unstarted=len(self._unstarted(member)))

    def _release(self, member: Member) -> list[Event]:
        for number in self._unstarted(member)[-1:]:
            _, reference, shard, only = self._calls[number]
            assert shard is not None
            rows = self._recorder.missing_rows(shard)
            kept, given_up = (tuple(as_ranges(part)) for part in halves(rows))
            rest = replace(shard, chosen=kept)
            self._calls[number] = (member, reference, rest, only)
            member.calls[reference] = ("run", rest)
            self.num_released += 1
            return [RowsReleased(member.index, Released(shard.index, given_up))]
        return []

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
    releases: bool = False,
) -> tuple[Driver, FakeCrew, FakeRecorder]:
    """A driver over these shards, and what it drives."""
    recorder = FakeRecorder(shards, totals)
    crew = FakeCrew(recorder, answer, num_workers, releases)
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
