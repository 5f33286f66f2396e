"""What a job's size must not multiply: work that is done for each commit, shard or report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import jobs.driver
import jobs.verify
from jobs.progress import Snapshot
from jobs.recorder import Recorder
from jobs.verify import verify
from pipeline.folder import RunFolder
from pipeline.outcome import ShardOutcome
from pipeline.segments import SegmentInfo, committed_infos
from tests.fake_crew import always_done, make_driver, make_shards
from tests.run_folders import SmallJob


def _num_steps(action: Callable[[], object]) -> int:
    """How many instructions of Python `action` takes in this thread."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def _steps_of_a_commit(folder: Path, num_parts: int) -> int:
    job = SmallJob(folder, rows=(6 * num_parts,))
    with Recorder(job.ledger) as recorder:
        outcome = ShardOutcome(0, (job.commit(0),), True)
        return _num_steps(lambda: recorder.record(outcome))


def test_a_commit_costs_the_same_in_every_job(tmp_path: Path) -> None:
    """It looks at no part but its own."""
    small, large = (_steps_of_a_commit(tmp_path / str(n), n) for n in (10, 1000))
    assert small == large


def test_a_commit_costs_the_same_while_roll_ups_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk is slower than workers, parts pile up, and no commit looks through them."""
    job = SmallJob(tmp_path, rows=(6 * 102,))
    with Recorder(job.ledger) as recorder:
        monkeypatch.setattr(recorder, "_pool", Idle())
        outcomes = [ShardOutcome(n, (job.commit(n),), True) for n in range(204)]
        steps = [_num_steps(lambda: recorder.record(outcome)) for outcome in outcomes]  # noqa: B023
    assert steps[2] == steps[202]


class Idle:
    """A pool that never gets to what it is given."""

    def submit(self, *_: object) -> Idle:
        return self

    def done(self) -> bool:
        return False

    def shutdown(self, **_: object) -> None:
        """Nothing runs."""


def test_the_crew_is_not_added_up_for_each_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report costs as much as there are workers: one at first, one at last, and by the clock."""
    monkeypatch.setattr(jobs.driver, "REPORT_INTERVAL", 1e9)
    driver, _, recorder = make_driver(always_done, make_shards(50))
    driver.reporter = reporter = Counting()
    driver.run()
    assert len(recorder.completed) == 50
    assert reporter.done[-1] == 500
    assert len(reporter.done) == 2


class Counting:
    """Keeps how many rows were done at each report."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def update(self, snapshot: Snapshot) -> None:
        self.done.append(snapshot.num_rows_done)

    def close(self) -> None:
        """Nothing to do."""


def test_verify_looks_for_no_commits_of_shards_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job that has just begun, only what it has done is looked at."""
    job = SmallJob(tmp_path, rows=(600,))
    job.commit(7)
    looked: list[int] = []

    def infos(folder: RunFolder, shard: int, fingerprint: str) -> list[SegmentInfo]:
        looked.append(shard)
        return committed_infos(folder, shard, fingerprint)

    monkeypatch.setattr(jobs.verify, "committed_infos", infos)
    report = verify(job.path)
    assert looked == [7]
    assert [line.split(";")[1] for line in report.missing][3:5] == [
        " 3 of its rows are not generated yet",
        " 6 of its rows are not generated yet",
    ]
