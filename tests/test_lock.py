"""Tests of `jobs.lock`, with real second processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.lock import Owner, RunLock, read_owner
from jobs.opening import prepare
from pipeline.errors import LockedError, OutputError

HOLDER = """
import sys
from pathlib import Path
from jobs.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared run folder."""
    return prepare(tmp_path / "run").root


@contextmanager
def _other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until its standard input closes."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


_ROOT = Path(__file__).parent.parent


def _record(folder: Path, **changes: object) -> None:
    """Leaves the record of another machine's run."""
    owner = replace(Owner.this_process(), host="elsewhere", boot_id="other", pid=77)
    (folder / ".shardmill/lock").write_text(json.dumps(asdict(replace(owner, **changes))))


def test_one_at_a_time(folder: Path) -> None:
    """A second run is told who holds the folder and since when; afterwards it gets it."""
    with _other_process(folder) as process:
        sentence = rf"'{folder}' is in use by another run, process {process.pid} on .* since \d+-"
        with pytest.raises(LockedError, match=sentence) as caught, RunLock(folder):
            pass
        assert caught.value.exit_code == 75
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
    with RunLock(folder):
        owner = read_owner(folder)
    assert owner is not None
    assert owner.pid == os.getpid()


def test_killed_owner_leaves_no_lock(folder: Path) -> None:
    """The kernel frees the lock of a killed process; its young heartbeat blocks nobody here."""
    with _other_process(folder) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    owner = read_owner(folder)
    assert owner is not None
    assert owner.beats
    assert not owner.is_alive()
    with RunLock(folder):
        pass


def test_stopped_owner_keeps_the_lock(folder: Path) -> None:
    """A process that only sleeps is not taken for dead, however old its heartbeat."""
    with _other_process(folder) as process:
        process.send_signal(signal.SIGSTOP)
        path = folder / ".shardmill/lock"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"heartbeat": 0.0}).ljust(1024))
        try:
            with pytest.raises(LockedError), RunLock(folder):
                pass
        finally:
            process.send_signal(signal.SIGCONT)


def test_lock_is_not_inherited(folder: Path) -> None:
    """A program that a run starts and that outlives it does not keep the folder locked."""
    with RunLock(folder):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with RunLock(folder):
            pass
    finally:
        child.kill()
        child.wait()


def test_owner_elsewhere(folder: Path) -> None:
    """Where the kernel's lock does not reach, a young heartbeat of another machine decides."""
    _record(folder)
    with pytest.raises(LockedError, match="process 77 on elsewhere"), RunLock(folder):
        pass


@pytest.mark.parametrize("changes", [{"heartbeat": 0.0}, {"released": True}])
def test_owner_elsewhere_is_gone(folder: Path, changes: dict[str, object]) -> None:
    """One that has been silent for a minute, or said that it left, is followed."""
    _record(folder, **changes)
    with RunLock(folder):
        pass


@pytest.mark.parametrize("record", ["", "{", '{"host": 3}'])
def test_unreadable_record(folder: Path, record: str) -> None:
    """A process that died while it wrote its record blocks nobody."""
    (folder / ".shardmill/lock").write_text(record)
    assert read_owner(folder) is None
    with RunLock(folder):
        pass


def test_record_says_that_it_ended(folder: Path) -> None:
    """Leaving, also by an exception, is recorded for other machines."""

    def interrupted() -> None:
        with RunLock(folder):
            owner = read_owner(folder)
            assert owner is not None
            assert owner.is_alive()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    owner = read_owner(folder)
    assert owner is not None
    assert owner.released
    assert not owner.is_alive()


def test_heartbeat_is_refreshed(folder: Path) -> None:
    """The record changes while the lock is held."""
    with RunLock(folder, heartbeat_seconds=0.01):
        first = read_owner(folder)
        assert first is not None
        deadline = time.monotonic() + 20
        while (now := read_owner(folder)) is None or now.heartbeat == first.heartbeat:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert replace(now, heartbeat=first.heartbeat) == first


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system knows no locks, as Lustre without `-o flock`."""

    def unsupported(*_args: object) -> None:
        raise OSError(errno.ENOSYS, "")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr("jobs.lock.SETTLE_SECONDS", 0.5)


@pytest.mark.usefixtures("without_locks")
def test_file_system_without_locks(folder: Path) -> None:
    """Two runs are still kept apart, by the heartbeat alone."""
    with RunLock(folder), pytest.raises(LockedError, match=str(os.getpid())), RunLock(folder):
        pass
    with RunLock(folder):
        pass


@pytest.fixture
def locks_of_one_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Each run is on a machine of its own, as with NFS and `local_lock=all`."""
    partition = SimpleNamespace(mountpoint=str(folder.resolve().parent), fstype="nfs4")
    monkeypatch.setattr("jobs.lock.psutil.disk_partitions", lambda all: [partition])
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr("jobs.lock.SETTLE_SECONDS", 0.5)


@pytest.mark.parametrize("locks", ["without_locks", "locks_of_one_machine"])
def test_runs_that_start_at_once_without_locks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, locks: str
) -> None:
    """Each has found the folder free before another one wrote its record: one enters."""
    request.getfixturevalue(locks)
    num_runs = 3
    have_read, have_tried = threading.Barrier(num_runs), threading.Barrier(num_runs)
    check = RunLock._check_record

    def check_together(lock: RunLock, kernel_knows: bool) -> None:
        check(lock, kernel_knows)
        have_read.wait(20)

    def enters(_: int) -> bool:
        try:
            with RunLock(folder):
                have_tried.wait(20)
                return True
        except LockedError:
            have_tried.wait(20)
            return False

    monkeypatch.setattr(RunLock, "_check_record", check_together)
    with ThreadPoolExecutor(num_runs) as pool:
        assert sorted(pool.map(enters, range(num_runs))) == [False, False, True]


@pytest.mark.parametrize("made_anew", [True, False])
def test_folder_moved_while_locking(
    folder: Path, monkeypatch: pytest.MonkeyPatch, made_anew: bool
) -> None:
    """Who opened the file just before `--fresh` moved it does not believe to hold the new one."""
    flock = fcntl.flock

    def move_first(descriptor: int, how: int) -> None:
        folder.rename(folder.with_name("old"))
        if made_anew:
            prepare(folder)
            (folder / ".shardmill/lock").write_text("")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", move_first)
    with pytest.raises(LockedError), RunLock(folder):
        pass


def test_folder_that_was_not_prepared(tmp_path: Path) -> None:
    """The lock makes no folder of its own."""
    with pytest.raises(OutputError, match="No such file"), RunLock(tmp_path / "none"):
        pass
