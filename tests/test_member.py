"""Places of workers: when they are filled again, and which one takes what was lost. No Ray."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import member as member_module
from jobs.cluster import WorkerShape
from jobs.crew import Crew
from jobs.member import Member
from jobs.patience import PAUSE, PLACE_TIMEOUT, Patience
from pipeline.errors import ResourceError
from pipeline.metrics import EngineMetrics
from pipeline.outcome import Progress, ShardOutcome
from pipeline.records import Shard
from pipeline.segments import Totals

SHARD = Shard(0, "in.parquet", "in", 0, 8)
SPEC: Any = SimpleNamespace(shards_in_flight=2)


def _crew(*nodes: str) -> Crew:
    """Workers that are ready, on these nodes."""
    crew = Crew(SPEC, WorkerShape(len(nodes), 0, 1.0, 1, len(nodes)), stall_timeout=60)
    crew._members = [Member(n, node=node, is_ready=True) for n, node in enumerate(nodes)]
    return crew


def _hold(crew: Crew, worker: int, *, alone: bool = False) -> None:
    crew._members[worker].calls[object()] = ("run", SHARD)
    crew._members[worker].is_alone = alone


def test_restarts_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loss in a row doubles the wait for the next worker, up to a minute."""
    monkeypatch.setattr(member_module.time, "monotonic", lambda: 1000.0)
    member, waits = Member(3, node="a"), []
    for _ in range(8):
        member = member.emptied()
        waits.append(member.start_at - 1000.0)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert (member.index, member.node) == (3, "a")


def test_what_is_answered_for_is_not_counted_as_held() -> None:
    """A worker's last word on its commits may be older than its answer, which has them, too."""
    crew, other = _crew("a", "b"), replace(SHARD, index=1)
    member = crew._members[0]
    member.progress = Progress(interim={SHARD: Totals(stop=3), other: Totals(length=2)})
    assert crew.interim == Totals(stop=3, length=2)
    poll = object()
    member.calls[poll] = ("progress", None)
    late = member.progress
    crew._take(member, "run", SHARD, ShardOutcome(0, (), is_complete=False))
    assert crew.interim == Totals(length=2)
    del member.calls[poll]
    crew._take(member, "progress", None, late)
    assert crew.interim == Totals(length=2), "also where it is said after the answer"
    _hold(crew, 0)  # the same shard once more
    assert crew.interim == Totals(length=2)
    crew._take(member, "progress", None, late)
    assert crew.interim == Totals(stop=3, length=2)


def test_a_commit_ends_the_back_off() -> None:
    """A worker that has committed, within a shard or at its end, starts from a second again."""
    crew = _crew("a")
    member = crew._members[0]
    member.num_losses = 5
    progress = Progress(EngineMetrics(num_generated_tokens=10))
    crew._take(member, "progress", None, progress)
    assert member.num_losses == 5, "tokens are not kept when the worker is lost"
    crew._take(member, "progress", None, replace(progress, num_commits=1))
    assert member.num_losses == 0
    member.num_losses = 5
    crew._take(member, "run", SHARD, ShardOutcome(0, (), is_complete=True))
    assert member.num_losses == 0


def test_lost_rows_go_elsewhere() -> None:
    """To another node if there is one, else to another worker; to the same one if it is alone."""
    assert _crew("a", "a", "b").least_busy(avoid=0) == (2, 0)
    assert _crew("a", "a", "a").least_busy(avoid=0) == (1, 0)
    assert _crew("a").least_busy(avoid=0) == (0, 0)


def test_lost_rows_wait_for_a_worker_elsewhere() -> None:
    """The worker that lost them is not taken because another is busy, but if none is ready."""
    crew = _crew("a", "b", "c")
    _hold(crew, 1)
    _hold(crew, 2)
    _hold(crew, 2)
    assert crew.least_busy(avoid=0) == (1, 1)
    crew._members[1].is_alone = crew._members[2].is_alone = True
    assert crew.least_busy(avoid=0) is None
    crew._members[1].is_ready = crew._members[2].is_ready = False
    assert crew.least_busy(avoid=0) == (0, 0)


def test_nobody_is_blamed_for_a_pause_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a terminal or a scheduler, it has not seen what workers did meanwhile."""
    clock = 1000.0
    monkeypatch.setattr(member_module.time, "monotonic", lambda: clock)
    patience, member = Patience(stall_timeout=60), Member(0, is_ready=True, moved_at=clock)
    member.calls[object()] = ("run", SHARD)
    for step in (1.0, 1000.0, 1.0):
        clock += step
        patience.look([member], waited=0.5)
        assert patience.exhausted(member) is None
    for _ in range(100):
        clock += PAUSE
        patience.look([member], waited=0.5)
    assert patience.exhausted(member) == "it stood still for 60 s"


def test_a_pause_of_the_driver_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may have found some meanwhile; the driver has not looked."""
    clock = 1000.0
    monkeypatch.setattr(member_module.time, "monotonic", lambda: clock)
    monkeypatch.setattr("jobs.crew.ray.wait", lambda refs, **_: ([], []))
    crew = _crew("")
    crew._members[0].is_ready, crew._members[0].actor = False, object()
    crew._members[0].calls[object()] = ("place", None)
    for step in (0.5, 2 * PLACE_TIMEOUT, 0.5):
        clock += step
        assert crew.wait(0.5) == []


def test_waiting_for_the_next_start_is_no_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While all workers are to be started anew, after a minute, the driver does look at them."""
    clock = 1000.0

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    monkeypatch.setattr(member_module.time, "monotonic", lambda: clock)
    monkeypatch.setattr(member_module.time, "sleep", sleep)
    crew = _crew("a")
    crew._members[0].is_ready = False
    for _ in range(20):
        assert crew.wait(PAUSE / 10) == []
    crew._patience.look(crew._members, waited=0.0)
    assert not caplog.records


def test_no_room_is_room_for_nobody() -> None:
    """While one worker loads its model, however long, the others may wait for room."""
    crew = _crew("", "")
    for member in crew._members:
        member.is_ready, member.actor = False, object()
        member.calls[object()] = ("place", None)
    patience = crew._patience
    patience._had_room_at = time.monotonic() - 2 * PLACE_TIMEOUT
    crew._members[1].calls = {object(): ("load", None)}
    crew._check_room()
    patience._had_room_at -= 2 * PLACE_TIMEOUT
    crew._members[1].calls = {object(): ("place", None)}
    with pytest.raises(ResourceError, match="no room"):
        crew._check_room()
