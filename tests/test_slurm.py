"""The sbatch script: what it hands on, whom it heeds, when it is queued again, what it leaves."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from jobs.schedulers import slurm
from tests.argument_recorder import make_recorder, paths, recorded
from tests.fake_slurm import FakeSlurm, make_program
from tests.small_jobs import wait_until
from tests.submissions import make_submission, texts

# Plays Python on every node: Ray stays until it is ended, the run until it is told to stop.
WAITING = """#!/bin/sh
case "$*" in
  *ray.scripts*)
    mkdir "$RAY_TMPDIR/ray"
    stat -c %a "$RAY_TMPDIR" >"$READY"
    exec sleep 600
    ;;
  *--ray-address*) until [ -e "$READY" ]; do sleep 0.02; done ;;
esac
touch "$READY"
for stop_file; do :; done
until [ -e "$stop_file" ]; do sleep 0.02; done
exit "$CODE"
"""


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A program that plays Python."""
    return make_recorder(tmp_path / "re corder")


class TestSlurm:
    @settings(max_examples=30)
    @given(path=paths, override=texts, value=texts)
    def test_words_arrive_whole(
        self, tmp_path_factory: pytest.TempPathFactory, path: str, override: str, value: str
    ) -> None:
        """Whatever is in a path, a setting or a variable: bash hands it on as it is."""
        folder = tmp_path_factory.mktemp("slurm")
        recorder = make_recorder(folder / "re corder")
        submission = make_submission(path, override, python=str(recorder), env={"VALUE": value})
        queue = FakeSlurm(folder / "queue")
        queue.script.write_text(slurm.render(submission), encoding="utf-8")
        assert subprocess.run(["bash", "-n", queue.script], check=False).returncode == 0
        process = queue.start()
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0, output
        stop_file = queue.folder / f"{submission.name}-4711.stop"
        arguments = ["-P", "-m", "jobs", "run", str(Path(path)), "--set", override]
        assert recorded(recorder) == ([*arguments, "--stop-file", str(stop_file)], value)

    @pytest.mark.parametrize(
        ("code", "failures", "left"),
        [
            (0, 3, None),
            (75, 3, None),  # a stop file of the user's, or another run has the folder
            (69, 0, 1),
            (1, 4, 5),
            (69, 5, None),
            (65, 0, None),
            (78, 0, None),
        ],
    )
    def test_exit_codes(
        self, tmp_path: Path, recorder: Path, code: int, failures: int, left: int | None
    ) -> None:
        """The run's exit code is the job's; only what another node may mend is queued again.

        However often the wall time was over or others were preferred: only failures count.
        """
        submission = make_submission(python=str(recorder))
        queue = FakeSlurm(tmp_path / "queue")
        queue.script.write_text(slurm.render(submission))
        count = queue.folder / f"{submission.name}-4711.failures"
        if failures:
            count.write_text("69\n" * failures)
        process = queue.start(CODE=str(code), SLURM_RESTART_COUNT="7")
        process.communicate(timeout=30)
        assert process.returncode == code
        assert queue.num_requeued == (left is not None)
        assert (len(count.read_text().split()) if count.exists() else None) == left

    @pytest.mark.parametrize("code", [75, 69])
    @pytest.mark.parametrize(
        ("number", "is_requeued"),
        [(signal.SIGUSR1, True), (signal.SIGTERM, False), (signal.SIGINT, False)],
    )
    def test_signals(
        self, tmp_path: Path, number: signal.Signals, is_requeued: bool, code: int
    ) -> None:
        """Any makes the stop file and waits for the run; only the wall time's queues it again.

        A job that was cancelled stays so, whatever comes of its run.
        """
        submission = make_submission(python=str(make_program(tmp_path / "waits", WAITING)))
        queue = FakeSlurm(tmp_path / "queue")
        queue.script.write_text(slurm.render(submission))
        process = queue.start(READY=str(tmp_path / "ready"), CODE=str(code))
        wait_until((tmp_path / "ready").exists, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == code, output
        assert queue.num_requeued == is_requeued
        assert not list(queue.folder.glob("*.stop")), "it would stop the next start"

    def test_options(self, tmp_path: Path) -> None:
        """What the job file asks for stands in the #SBATCH lines, in Slurm's words."""
        queue = FakeSlurm(tmp_path / "queue")
        slurm_options = {"partition": "gpu", "exclusive": True, "hold": False}
        submission = make_submission(
            nodes=3,
            gpus_per_node=8,
            cpus_per_node=64,
            memory="500G",
            walltime="1h30m",
            slurm=slurm_options,
        )
        queue.script.write_text(slurm.render(submission))
        assert queue.options() == {
            "job-name": submission.name,
            "dependency": "singleton",
            "nodes": "3",
            "ntasks-per-node": "1",
            "gpus-per-node": "8",
            "cpus-per-task": "64",
            "mem": "500G",
            "time": "90",
            "signal": "B:USR1@180",
            "requeue": "",
            "open-mode": "append",
            "output": "%x-%j.log",
            "partition": "gpu",
            "exclusive": "",
        }

    def test_the_notice_fits_in_the_wall_time(self) -> None:
        """A short job is not told to stop as it starts."""
        assert "--signal=B:USR1@60\n" in slurm.render(make_submission(walltime="2m"))

    @pytest.mark.parametrize("nodes", [1, 2])
    def test_scripts_are_clean(self, tmp_path: Path, nodes: int) -> None:
        """Shellcheck, where it is installed, has nothing to say."""
        if shutil.which("shellcheck") is None:
            pytest.skip("there is no shellcheck")
        script = tmp_path / "script.sh"
        script.write_text(slurm.render(make_submission(nodes=nodes, env={"A": "b"})))
        done = subprocess.run(
            ["shellcheck", "--severity=warning", script],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == ""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for Ray, whose path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="sm-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[FakeSlurm]:
    """A job over two nodes in the queue, whose programs wait to be ended."""
    queue = FakeSlurm(tmp_path / "queue", num_nodes=2)
    python = make_program(tmp_path / "waits", WAITING)
    queue.script.write_text(slurm.render(make_submission(nodes=2, python=str(python))))
    yield queue
    queue.close()


class TestSeveralNodes:
    def test_rays_files_go_with_the_job(
        self, tmp_path: Path, two_nodes: FakeSlurm, scratch: Path
    ) -> None:
        """They lie in a folder of the job's that nobody else can read, and are gone at its end.

        That is before it is queued again, as it can start nothing more then.
        """
        ready = tmp_path / "ready"
        environment = {"RAY_TMPDIR": f"{scratch}/node", "READY": str(ready), "CODE": "75"}
        process = two_nodes.start(**environment)
        wait_until(lambda: ready.exists() and ready.read_text() != "", process)
        assert (scratch / "node" / "shm-4711" / "ray").is_dir()
        assert ready.read_text() == "700\n"
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 75, output
        assert two_nodes.num_requeued == 1
        assert list((scratch / "node").iterdir()) == []

    def test_what_killed_jobs_have_left_goes(
        self, tmp_path: Path, two_nodes: FakeSlurm, scratch: Path
    ) -> None:
        """A later job removes it: not what is young, of one that is at work, or somebody's own."""
        hours_ago = time.time() - 7200
        for name in ("left", "young", "locked", "data"):
            (scratch / f"shm-{name}").mkdir()
            if name != "data":
                (scratch / f"shm-{name}" / "owner").touch()
            if name != "young":
                os.utime(scratch / f"shm-{name}", (hours_ago, hours_ago))
        ready = tmp_path / "ready"
        with (scratch / "shm-locked" / "owner").open() as owner:
            fcntl.flock(owner, fcntl.LOCK_SH)
            process = two_nodes.start(RAY_TMPDIR=str(scratch), READY=str(ready), CODE="75")
            wait_until(lambda: ready.exists() and ready.read_text() != "", process)
            # This job's own is locked as well.
            mine = scratch / "shm-4711" / "owner"
            assert (
                subprocess.run(["flock", "--nonblock", mine, "true"], check=False).returncode == 1
            )
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
        assert {path.name for path in scratch.iterdir()} == {"shm-young", "shm-locked", "shm-data"}

    def test_a_folder_of_somebody_elses_is_not_used(
        self, tmp_path: Path, two_nodes: FakeSlurm, scratch: Path
    ) -> None:
        """Who knows the job's number may have put a link there before."""
        (scratch / "theirs").mkdir()
        (scratch / "shm-4711").symlink_to(scratch / "theirs")
        ready = tmp_path / "ready"
        ready.touch()
        process = two_nodes.start(RAY_TMPDIR=str(scratch), READY=str(ready), CODE="69")
        assert process.stdout is not None
        assert any("shm-4711 cannot be made, or is not ours" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert list((scratch / "theirs").iterdir()) == []

    def test_a_long_path_is_refused(self, two_nodes: FakeSlurm) -> None:
        """Ray's sockets would not fit, and the run would wait for nodes that never come."""
        process = two_nodes.start(RAY_TMPDIR=f"/tmp/{'a' * 24}")
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 69
        assert "is too long for the names of Ray's sockets" in output
