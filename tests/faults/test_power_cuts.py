"""The real ledger on a disk that forgets at a power cut what was not synced."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jobs.opening import prepare
from jobs.parts import finish, roll_up
from jobs.retries import prepare_retry
from jobs.verify import verify
from pipeline.errors import SupersededError
from pipeline.segments import committed_infos, missing_positions
from pipeline.writer import Seen
from tests.faults.power_cuts import Disk, PowerCut
from tests.retried import commit, make_retry, open_retry
from tests.run_folders import SmallJob, make_manifest

IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""The disk is pretended anyway, and this one is faster."""

Attempt = tuple[int, Seen, list[int]]
"""Shard, what is known of its commits, and positions that were missing."""


class PowerCuts(RuleBasedStateMachine):
    """Attempts, zombies, roll-ups and new drivers in any order; the power fails at any call.

    Attributes:
        promised: by shard, positions whose commit was reported.
        has_begun: whether the folder was reported to be there.
        has_ended: whether `_SUCCESS` was.
    """

    job: SmallJob

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="shardmill-", dir=IN_MEMORY))
        self.attempts: list[Attempt] = []
        self.promised: defaultdict[int, set[int]] = defaultdict(set)
        self.has_begun = self.has_ended = False

    @initialize(
        data=st.data(),
        rows=st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
        num_samples=st.integers(1, 2),
        shard_rows=st.integers(1, 3),
        shards_per_part=st.integers(1, 2),
    )
    def begin(self, data: st.DataObject, rows: list[int], **sizes: int) -> None:
        self.rows, self.sizes = rows, sizes
        for name in ("graveyard", "scratch"):
            (self.home / name).mkdir()
        make_manifest(self.home / "scratch" / "input", rows, **sizes)
        self.disk = Disk(self.home / "scratch", self.home / "graveyard")
        self._restart(data)

    @rule(data=st.data())
    def another_driver(self, data: st.DataObject) -> None:
        """The one before was killed; its attempts may be zombies."""
        self._restart(data)

    @rule(data=st.data())
    def power_cut(self, data: st.DataObject) -> None:
        self._lose_power(data)
        self._restart(data)

    @rule(number=st.integers(0, 100))
    def start_attempt(self, number: int) -> None:
        pending = list(self.state.pending())
        if pending:
            self.attempts.append(self._new_attempt(pending[number % len(pending)]))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), lives=st.none() | st.integers(0, 8))
    def publish(self, data: st.DataObject, lives: int | None) -> None:
        """Commits some of what an attempt set out to do."""
        attempt = self.attempts.pop(data.draw(st.integers(0, len(self.attempts) - 1)))
        if done := _some(data, attempt):
            self._publish(data, lives, attempt, done)

    @precondition(lambda self: self.attempts)
    @rule(
        data=st.data(), lives=st.sampled_from((2, 3)), lives_of_next=st.none() | st.integers(0, 4)
    )
    def kill(self, data: st.DataObject, lives: int, lives_of_next: int | None) -> None:
        """An attempt's process dies right after its link; another goes on with what it left."""
        attempt = self.attempts.pop()
        shard, seen, _ = attempt
        if done := _some(data, attempt):
            with suppress(SupersededError):
                self._try(lives, lambda: self.job.commit(shard, done, seen))
            self.disk.go_on()
        if not self.job.ledger.is_rolled_up(shard):
            attempt = self._new_attempt(shard)
            if done := _some(data, attempt):
                self._publish(data, lives_of_next, attempt, done)

    def _new_attempt(self, shard: int) -> Attempt:
        infos = self.job.infos(shard)
        total = self.job.manifest.shard_completions(shard)
        return shard, Seen(len(infos)), missing_positions(infos, total)

    @rule(data=st.data(), lives=st.none() | st.integers(0, 40))
    def complete(self, data: st.DataObject, lives: int | None) -> None:
        """Commits all that is missing of every other shard, or of all."""
        for shard in list(self.state.pending())[:: data.draw(st.integers(1, 2))]:
            attempt = self._new_attempt(shard)
            self.state.add(self.job.infos(shard))
            if missing := set(attempt[2]):
                self._publish(data, lives, attempt, missing)

    def _publish(
        self, data: st.DataObject, lives: int | None, attempt: Attempt, done: set[int]
    ) -> None:
        shard, seen, wanted = attempt
        try:
            info = self._until_power_cut(data, lives, lambda: self.job.commit(shard, done, seen))
        except SupersededError:
            return
        if info is not None:
            self.state.add([info])
            self.attempts.append((shard, seen, [p for p in wanted if p not in done]))
            if not self.state.has_part(self.job.manifest.part_of(shard)):
                self.promised[shard] |= done

    @rule(data=st.data(), lives=st.none() | st.integers(0, 12))
    def roll_up(self, data: st.DataObject, lives: int | None) -> None:
        for part in self.state.take_ready_parts():
            put_together = partial(roll_up, self.job.folder, self.job.manifest, part)
            if self._until_power_cut(data, lives, put_together) is None:
                return  # and all was started anew
            self.state.mark_part(part)

    @precondition(lambda self: self.state.num_parts_done == self.job.manifest.num_parts)
    @rule(data=st.data(), lives=st.none() | st.integers(0, 4))
    def finish(self, data: st.DataObject, lives: int | None) -> None:
        if self._until_power_cut(data, lives, lambda: finish(self.job.folder, self.job.manifest)):
            self.has_ended = True

    @invariant()
    def nothing_is_damaged(self) -> None:
        if self.has_begun:
            assert verify(self.job.path).damage == []

    @invariant()
    def what_was_reported_is_there(self) -> None:
        if not self.has_begun:
            return
        for shard, positions in self.promised.items():
            if not self.job.ledger.is_rolled_up(shard):
                total = self.job.manifest.shard_completions(shard)
                missing = missing_positions(self.job.infos(shard), total)
                assert not positions & set(missing), f"shard {shard}"
        if self.has_ended:
            assert self.job.ledger.is_complete

    def teardown(self) -> None:
        if self.has_begun:
            self.job = SmallJob(self.home / "scratch", self.rows, **self.sizes)
            self.job.finish()
            assert self.job.output() == self.job.expected()
            assert verify(self.job.path).state == "complete"
        shutil.rmtree(self.home)

    def _restart(self, data: st.DataObject) -> None:
        """What a driver does before it hands anything out."""

        def start() -> SmallJob:
            job = SmallJob(self.home / "scratch", self.rows, **self.sizes)
            job.ledger.sweep()
            return job

        lives = data.draw(st.none() | st.integers(0, 20), label="lives of the new driver")
        while (job := self._try(lives, start)) is None:
            self._lose_power(data)
            lives = None
        self.job, self.state, self.has_begun = job, job.ledger.scan(), True

    def _until_power_cut(
        self, data: st.DataObject, lives: int | None, action: Callable[[], Any]
    ) -> Any:
        """What `action` returns; None if the power failed meanwhile, and all was started anew."""
        result = self._try(lives, action)
        if result is None:
            self._lose_power(data)
            self._restart(data)
        return result

    def _try(self, lives: int | None, action: Callable[[], Any]) -> Any:
        self.disk.cut_power_after(lives)
        result = None
        with self.disk.plugged_in(), suppress(PowerCut):
            result = action()
        self.disk.cut_power_after(None)
        return result

    def _lose_power(self, data: st.DataObject) -> None:
        self.attempts.clear()
        self.disk.restart(lambda values: data.draw(st.sampled_from(values)))
        manifest = self.home / "scratch" / "run" / ".shardmill" / "manifest.json"
        assert manifest.exists() or not self.has_begun, "the folder was reported to be there"


def test_a_folder_that_was_lost_alone_is_made_safe_again(tmp_path: Path) -> None:
    """A cut took it and left the manifest; the next one must not take what is committed since."""
    scratch, graveyard = tmp_path / "scratch", tmp_path / "graveyard"
    graveyard.mkdir()
    SmallJob(scratch).folder.segments.rmdir()
    disk = Disk(scratch, graveyard)
    with disk.plugged_in():
        SmallJob(scratch).commit(0)
    disk.restart(lambda values: values[0])
    assert [info.commit for info in SmallJob(scratch).infos(0)] == [0]


def _some(data: st.DataObject, attempt: Attempt) -> set[int]:
    """Some of what an attempt set out to do; nothing if that is nothing."""
    wanted = attempt[2]
    return data.draw(st.sets(st.sampled_from(wanted), min_size=1)) if wanted else set()


@pytest.mark.parametrize("lives", range(14))
def test_folders_that_a_killed_process_made_are_made_safe(tmp_path: Path, lives: int) -> None:
    """Whoever dies between making folders and syncing their names leaves it to the next one."""
    scratch, disk = _make_disk(tmp_path)
    with disk.plugged_in():
        disk.cut_power_after(lives)
        with suppress(PowerCut):
            prepare(scratch / "a" / "b" / "run")
        disk.go_on()
        prepared = prepare(scratch / "a" / "b" / "run")
    disk.restart(lambda values: values[0])
    assert prepared.segments.is_dir()
    assert prepared.tmp.is_dir()


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_a_retry_has_committed_is_safe(tmp_path: Path, is_lost: bool) -> None:
    """In its new folders, or in those that are made again after a cut that took them alone."""
    scratch, disk = _make_disk(tmp_path)
    job = SmallJob(scratch)
    job.finish()
    if is_lost:
        own = open_retry(job.ledger, make_retry()).folder
        own.segments.rmdir()
        own.tmp.rmdir()
    disk.settle()
    with disk.plugged_in():
        ledger = open_retry(job.ledger, make_retry())
        prepare_retry(job.folder, 1)
        info = commit(ledger, ledger.manifest.shard(2))
    disk.restart(lambda values: values[0])
    assert committed_infos(ledger.folder, 2, ledger.manifest.fingerprint) == [info]


def test_a_commit_builds_on_none_that_may_be_lost(tmp_path: Path) -> None:
    """A worker dies between a commit's name and its sync, another goes on, and the power fails."""
    scratch, disk = _make_disk(tmp_path)
    job = SmallJob(scratch)
    disk.settle()
    with disk.plugged_in(), suppress(PowerCut):
        disk.cut_power_after(2)  # the file's sync, its link
        job.commit(0, [0])
    disk.go_on()
    with disk.plugged_in(), suppress(PowerCut):
        disk.cut_power_after(3)
        job.commit(0, [1])
    kept = iter([0])  # of the names that may be lost the first is, and no other
    disk.restart(lambda values: values[next(kept, -1)])
    job = SmallJob(scratch)
    assert [info.commit for info in job.infos(0)] == [0]
    job.finish()
    assert job.output() == job.expected()


def _make_disk(folder: Path) -> tuple[Path, Disk]:
    """A folder, and the disk that it is on."""
    scratch, graveyard = folder / "scratch", folder / "graveyard"
    for path in (scratch, graveyard):
        path.mkdir()
    return scratch, Disk(scratch, graveyard)


TestPowerCuts = PowerCuts.TestCase
TestPowerCuts.settings = settings(
    max_examples=40, stateful_step_count=20, suppress_health_check=list(HealthCheck)
)


@pytest.mark.faults
@pytest.mark.timeout(1200)
class TestManyPowerCuts(PowerCuts.TestCase):  # type: ignore[misc]
    """The same, for long."""

    settings = settings(
        max_examples=600,
        stateful_step_count=40,
        suppress_health_check=list(HealthCheck),
    )
