"""Long ones: a Slurm job over several nodes, and a real cron."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_slurm import FakeSlurm
from tests.small_jobs import num_segments, shardmill, wait_until
from tests.test_submit import submit

pytestmark = pytest.mark.faults


@pytest.fixture
def queue(scratch: Path) -> Iterator[FakeSlurm]:
    """A Slurm of two nodes, both of them this machine."""
    queue = FakeSlurm(scratch / "slurm", num_nodes=2)
    yield queue
    queue.close()


@pytest.mark.timeout(400)
def test_a_slurm_job_over_two_nodes(queue: FakeSlurm, scratch: Path) -> None:
    """A Ray cluster with a token is started, used, ended and started again for the rest."""
    output = scratch / "out"
    two = ("--set", "cluster.nodes=2", "--set", "workers.count=2")
    assert submit("slurm", output, *two, PATH=queue.path).code == 0

    process = queue.start(RAY_TMPDIR=str(scratch))
    wait_until(lambda: num_segments(output) >= 1, process)
    process.send_signal(signal.SIGUSR1)
    log, _ = process.communicate(timeout=100)
    assert process.returncode == 75, log
    assert queue.num_requeued == 1
    assert not _rays_of(scratch)

    process = queue.start(RAY_TMPDIR=str(scratch))
    log, _ = process.communicate(timeout=200)
    assert process.returncode == 0, log
    assert shardmill("verify", output).code == 0
    assert not _rays_of(scratch)


def _rays_of(folder: Path) -> list[str]:
    """Command lines of Ray's servers that write below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0].endswith(("gcs_server", "raylet")) and str(folder) in " ".join(words):
            found.append(" ".join(words))
    return found


@pytest.fixture
def cron() -> Iterator[None]:
    """A cron daemon with nothing in this user's crontab; both as before afterwards."""
    if shutil.which("cron") is None or os.geteuid() != 0:
        pytest.skip("needs Debian's cron, and to be root")
    if subprocess.run(["crontab", "-l"], capture_output=True, check=False).stdout.strip():
        pytest.skip("there is a crontab, which is left alone")
    daemon = subprocess.Popen(["cron", "-f"])
    yield
    subprocess.run(["crontab", "-r"], check=False)
    daemon.terminate()
    daemon.wait(20)


@pytest.mark.timeout(1000)
def test_a_real_cron(cron: None, scratch: Path) -> None:
    """Started each minute: one start runs, those beside it end with 75, the job gets complete."""
    output = scratch / "ou t%"
    schedule = ("--set", "cluster.schedule='* * * * *'")
    # Two starts' worth of work, each of them longer than a minute.
    long = ("--set", "generation.num_samples=50", "--set", "generation.temperature=1.0")
    long += ("--workers", "1", "--set", "cluster.walltime=65s")
    result = submit("cron", output, *schedule, *long)
    assert result.code == 0, result.stderr
    log = Path(f"{output}.log")
    deadline = time.monotonic() + 900
    while not (output / "_SUCCESS").exists():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "never started"
        time.sleep(1)
    assert "another run" in log.read_text()
    assert "the wall time of 65 s is over" in log.read_text()
    assert shardmill("verify", output).code == 0
