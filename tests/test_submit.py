"""Jobs that are really submitted and really run: through Slurm's programs, cron's line and Ray."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

import pytest

from tests.fake_cron import start_as_cron
from tests.fake_slurm import FakeSlurm, make_program
from tests.ray_head import RayHead
from tests.small_jobs import RUN_LIMIT, Result, num_segments, shardmill, wait_until

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart" / "job.yaml"


def submit(scheduler: str, output: Path, *options: object, **environment: str) -> Result:
    """Submits rows of the quickstart."""
    no_gpus = ("--set", "cluster.gpus_per_node=0")
    arguments = ("--output", output, "--to", scheduler, *no_gpus, *options)
    return shardmill("submit", QUICKSTART, *arguments, **environment)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Until this file is there, jobs that `held` submits stay half-way."""
    return tmp_path / "gate"


@pytest.fixture
def held(tmp_path: Path, gate: Path) -> tuple[str, str]:
    """Options of `submit` for workers that do one shard and wait: a Python that runs tests.held."""
    text = f"""#!/usr/bin/env bash
export SHARDMILL_GATE={quote(str(gate))} PYTHONPATH={quote(str(ROOT))}
for word; do
  shift
  [[ "$word" != jobs ]] || word=tests.held
  set -- "$@" "$word"
done
exec {quote(sys.executable)} "$@"
"""
    return "--set", f"cluster.python={make_program(tmp_path / 'python', text)}"


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[FakeSlurm]:
    """A Slurm of one node."""
    queue = FakeSlurm(tmp_path / "slurm")
    yield queue
    queue.close()


def test_slurm_queues_a_job_until_it_is_complete(
    queue: FakeSlurm, tmp_path: Path, gate: Path, held: tuple[str, str]
) -> None:
    """Told that the wall time is nearly over, the job commits, ends with 75 and is queued again."""
    output = tmp_path / "ou t"
    result = submit("slurm", output, "--limit", 400, *held, PATH=queue.path)
    assert (result.code, result.stdout) == (0, "Submitted batch job 4711\n"), result.stderr

    process = queue.start()
    wait_until(lambda: num_segments(output) >= 1, process)
    process.send_signal(signal.SIGUSR1)
    log, _ = process.communicate(timeout=RUN_LIMIT)
    assert process.returncode == 75, log
    assert "stop file" in log
    assert queue.num_requeued == 1
    assert not list(queue.folder.glob("*.stop"))

    gate.touch()
    process = queue.start(SLURM_RESTART_COUNT="1")
    log, _ = process.communicate(timeout=RUN_LIMIT)
    assert process.returncode == 0, log
    assert "by runs before this one" in log
    assert queue.num_requeued == 1
    assert shardmill("verify", output).code == 0


@pytest.mark.faults
def test_rays_of_other_users_are_not_in_the_way(tmp_path: Path) -> None:
    """On two nodes where Ray's usual file cannot be written: the job runs, and leaves no files."""
    output = tmp_path / "out"
    queue = FakeSlurm(tmp_path / "slurm", num_nodes=2)
    two = ("--set", "cluster.nodes=2", "--set", "workers.count=2")
    assert submit("slurm", output, "--limit", 40, *two, PATH=queue.path).code == 0
    # The names of Ray's sockets must fit in 107 characters.
    with closing(queue), TemporaryDirectory(prefix="sm-", dir="/tmp") as scratch:
        theirs = Path(scratch, "ray", "ray_current_cluster")
        theirs.mkdir(parents=True)
        log, _ = queue.start(RAY_TMPDIR=scratch).communicate(timeout=RUN_LIMIT)
        assert queue.started[0].returncode == 0, log
        assert list(Path(scratch).rglob("*")) == [theirs.parent, theirs]
    assert shardmill("verify", output).code == 0


def test_a_crontab_line_runs_once_at_a_time(
    tmp_path: Path, gate: Path, held: tuple[str, str]
) -> None:
    """As cron calls it: bare PATH, umask 077, no terminal; the second start finds the first."""
    output = tmp_path / "ou t %"
    schedule = ("--set", "cluster.schedule='* * * * *'")
    result = submit("cron", output, "--limit", 400, "--print", *schedule, *held)
    assert result.code == 0, result.stderr
    line = result.stdout.splitlines()[1]

    first = start_as_cron(line, tmp_path)
    wait_until(lambda: num_segments(output) >= 1, first)
    assert start_as_cron(line, tmp_path).wait(RUN_LIMIT) == 75
    gate.touch()
    assert first.wait(RUN_LIMIT) == 0
    assert start_as_cron(line, tmp_path).wait(RUN_LIMIT) == 0, "a complete job stays complete"
    assert shardmill("verify", output).code == 0

    log = Path(f"{output}.log")
    assert log.read_text().count("started by run_job.sh") == 3
    assert "another run" in log.read_text()
    assert (tmp_path / "mail").read_bytes() == b""
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.faults
def test_a_ray_job_is_submitted_once(tmp_path: Path, gate: Path, held: tuple[str, str]) -> None:
    """Sent twice it runs once; stopped, the next submission continues it."""
    output = tmp_path / "out"
    with RayHead(num_cpus=2) as head:
        address = ("--set", f"cluster.ray.address={head.dashboard}")
        options: tuple[object, ...] = ("--limit", 400, *address, *held)
        first = submit("ray", output, *options, **head.environment)
        assert first.code == 0, first.stderr
        identity = first.stdout.split()[2].rstrip(";")
        assert identity.endswith("-1")

        again = submit("ray", output, *options, **head.environment)
        assert again.code == 0, again.stderr
        assert "nothing was sent" in again.stdout

        head.wait_for(lambda: num_segments(output) >= 1)
        head.stop(identity)
        assert head.wait_for_end(identity)["status"] == "STOPPED"

        gate.touch()
        second = submit("ray", output, *options, **head.environment)
        identity = second.stdout.split()[2].rstrip(";")
        assert identity.endswith("-2"), second.stderr
        ended = head.wait_for_end(identity)
        assert (ended["status"], ended["driver_exit_code"]) == ("SUCCEEDED", 0), ended["message"]
    assert shardmill("verify", output).code == 0


def test_no_cluster_is_a_sentence(tmp_path: Path) -> None:
    """Neither sbatch nor a dashboard: exit code 69, and what to do."""
    result = submit("slurm", tmp_path, PATH="/usr/bin:/bin")
    assert result.code == 69
    assert result.stderr.startswith("shardmill: cannot start 'sbatch'")
    assert result.stderr.count("\n") == 1
