"""`shardmill status --watch` beside a run that ends in one way or another."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.ledger import Ledger
from jobs.lock import RunLock
from jobs.state import JobState
from jobs.status import watch_status
from tests.run_folders import SmallJob
from tests.small_jobs import finish, start

HOLDER = """
import sys
from pathlib import Path
from jobs.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_watch_ends_with_the_run(tmp_path: Path, is_killed: bool) -> None:
    """Stopped or killed: nobody is at work, which the last words and the exit code say."""
    job = SmallJob(tmp_path)
    job.commit(0)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(job.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    watcher = start("status", job.path, "--watch")
    assert watcher.stdout is not None
    first = watcher.stdout.readline()
    if is_killed:
        holder.kill()
    holder.communicate()
    watched = finish(watcher)
    assert first.startswith("running: process")
    assert watched.code == 75, watched.stderr
    assert watched.stdout.count("not complete, and nobody works on it") == 1, watched.stdout


def test_a_watch_of_a_complete_job(tmp_path: Path) -> None:
    """One look is enough."""
    job = SmallJob(tmp_path)
    job.finish()
    assert [status.is_complete for status in watch_status(job.path)] == [True]


def test_a_run_that_ends_during_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said to be at work, not to have completed what was not there yet when counted."""
    job, scan = SmallJob(tmp_path), Ledger.scan
    with ExitStack() as stack:
        stack.enter_context(RunLock(job.path))

        def scan_and_end(ledger: Ledger) -> JobState:
            monkeypatch.undo()
            state = scan(ledger)
            job.finish()
            stack.close()
            return state

        monkeypatch.setattr(Ledger, "scan", scan_and_end)
        looks = watch_status(job.path)
        first = next(looks)
        assert (first.owner is None, first.is_complete) == (False, False)
        assert [look.totals.num_completions for look in (first, next(looks))] == [0, 11]
