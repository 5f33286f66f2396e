"""The whole protocol under deaths, zombies and restarts: writer, ledger and parts together."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jobs.opening import set_aside
from jobs.parts import finish, roll_up
from jobs.verify import verify
from pipeline.errors import DamagedOutputError, SupersededError
from pipeline.segments import missing_positions, segment_name
from pipeline.writer import Seen
from tests.run_folders import SmallJob

SYSTEM_CALLS = ("fsync", "link", "unlink", "replace")


class Death(BaseException):
    """Stands for SIGKILL: from then on no system call has an effect, cleaning up included."""


class Mortal:
    """Lets so many system calls of commits through and dies before the next one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lives: int) -> None:
        self._lives = lives
        for name in SYSTEM_CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._lives -= 1
            if self._lives < 0:
                raise Death
            return call(*args, **kwargs)

        return counted


def _run(folder: Path) -> SmallJob:
    """A whole run, in several commits a shard."""
    job = SmallJob(folder, rows=(4,))
    if not job.infos(0) and not list(job.path.glob("part-*")):
        job.commit(0, [1])
    job.finish()
    return job


def test_death_at_every_step(tmp_path: Path) -> None:
    """Wherever a run dies, what is there reads as whole, and the same command completes it."""
    deaths = 0
    survived = False
    while not survived:
        folder = tmp_path / str(deaths)
        with pytest.MonkeyPatch.context() as patch:
            Mortal(patch, deaths)
            try:
                _run(folder)
                survived = True
            except Death:
                deaths += 1
        if (folder / "run/.shardmill/manifest.json").exists():
            assert verify(folder / "run").damage == []
        job = _run(folder)
        assert job.output() == job.expected()
        assert verify(job.path).state == "complete"
        assert list(job.folder.tmp.iterdir()) == list(job.folder.segments.iterdir()) == []
        shutil.rmtree(folder)
    assert deaths > 25


def test_zombie_cannot_double_rows(tmp_path: Path) -> None:
    """An attempt that sleeps while another commits finds them committed, now and later."""
    job = SmallJob(tmp_path)
    job.commit(0, [0])  # both attempts have read this
    job.commit(0, [1, 2], Seen(1))
    for _ in range(2):
        with pytest.raises(SupersededError):
            job.commit(0, [2], Seen(1))
    job.finish()
    assert job.output() == job.expected()


def test_attempts_at_other_rows_take_the_next_number(tmp_path: Path) -> None:
    """Neither knew of the other; one that holds a row of theirs among its own commits nothing."""
    job = SmallJob(tmp_path)
    numbers = [job.commit(0, [position], Seen(0)).commit for position in (1, 0)]
    assert numbers == [0, 1]
    with pytest.raises(SupersededError):
        job.commit(0, [1, 2], Seen(0))
    assert list(job.folder.tmp.iterdir()) == []
    job.finish()
    assert job.output() == job.expected()


def test_rows_that_others_have_committed_stay_theirs(tmp_path: Path) -> None:
    """What was seen of others once counts for later commits too, under whatever number."""
    job = SmallJob(tmp_path)
    seen = Seen(0)
    job.commit(0, [1], Seen(0))
    assert job.commit(0, [0], seen).commit == 1
    with pytest.raises(SupersededError):
        job.commit(0, [1], seen)
    assert job.commit(0, [2], seen).commit == 2
    job.finish()
    assert job.output() == job.expected()


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("is_finished", [False, True])
def test_zombie_after_the_roll_up(tmp_path: Path, number: int, is_finished: bool) -> None:
    """Once its shard is in a part, a zombie may publish: nobody reads it, and it is swept."""
    job = SmallJob(tmp_path)
    job.commit(0, [0])
    job.commit(0, [1])
    job.commit(0, [2])
    job.commit(1)
    if is_finished:
        job.finish()
    else:
        roll_up(job.folder, job.manifest, 0)
    job.commit(0, [2], Seen(number))
    report = verify(job.path)
    assert report.state == ("complete" if is_finished else "incomplete")
    assert ["in a part (1)" in note for note in report.notes] == [True]
    job.finish()
    assert job.output() == job.expected()
    assert list(job.folder.segments.iterdir()) == []


def test_zombie_of_the_job_before_fresh(tmp_path: Path) -> None:
    """A worker of the old job fills a name in the new folder: nobody takes its rows for ours."""
    old = SmallJob(tmp_path, fingerprint="f0")
    set_aside(old.path)
    job = SmallJob(tmp_path)
    old.commit(0, [0])
    for read in (job.commit, lambda _: job.ledger.scan()):
        with pytest.raises(DamagedOutputError, match=rf"{segment_name(0, 0)}.*another job"):
            read(0)
    assert [segment_name(0, 0) in line for line in verify(job.path).damage] == [True]
    (job.folder.segments / segment_name(0, 0)).unlink()
    job.finish()
    assert job.output() == job.expected()


class Runs(RuleBasedStateMachine):
    """Attempts that start, sleep and publish in any order, while drivers come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.attempts: list[tuple[int, Seen, list[int]]] = []

    @initialize(
        rows=st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any),
        num_samples=st.integers(1, 2),
        shard_rows=st.integers(1, 3),
        shards_per_part=st.integers(1, 3),
    )
    def begin(self, **sizes: Any) -> None:
        self.sizes = sizes
        self.restart()

    @rule()
    def restart(self) -> None:
        self.job = SmallJob(self.home, **self.sizes)
        self.job.ledger.sweep()
        self.state = self.job.ledger.scan()

    @rule(number=st.integers(0, 100))
    def start_attempt(self, number: int) -> None:
        pending = list(self.state.pending())
        if pending:
            shard = pending[number % len(pending)]
            infos = self.job.infos(shard)
            total = self.job.manifest.shard_completions(shard)
            self.attempts.append((shard, Seen(len(infos)), missing_positions(infos, total)))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """Publishes some of what an attempt set out to do; it may be a zombie's by now."""
        index = data.draw(st.integers(0, len(self.attempts) - 1))
        shard, seen, wanted = self.attempts.pop(index)
        if not wanted:
            return
        done = data.draw(st.sets(st.sampled_from(wanted), min_size=1))
        try:
            info = self.job.commit(shard, done, seen)
        except SupersededError:
            return
        self.state.add([info])
        self.attempts.append((shard, seen, [p for p in wanted if p not in done]))

    @rule()
    def roll_up(self) -> None:
        for part in self.state.take_ready_parts():
            roll_up(self.job.folder, self.job.manifest, part)
            self.state.mark_part(part)

    @invariant()
    def parts_hold_the_right_rows(self) -> None:
        if hasattr(self, "job"):
            assert verify(self.job.path).damage == []

    @invariant()
    def state_is_what_a_scan_gives(self) -> None:
        if hasattr(self, "job"):
            scanned = self.job.ledger.scan()
            assert list(scanned.pending()) == list(self.state.pending())
            assert scanned.totals == self.state.totals

    def teardown(self) -> None:
        if hasattr(self, "job"):
            self.restart()
            self.job.finish()
            assert self.job.output() == self.job.expected()
            finish(self.job.folder, self.job.manifest)
        shutil.rmtree(self.home)


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=12, stateful_step_count=15)
