"""Processes that freeze, answers that get lost, drivers that meet: one machine, real Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from tests.small_jobs import (
    finish,
    num_segments,
    questions,
    read_output,
    shardmill,
    start,
    start_held,
    wait_until,
    write_job,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

NUM_ROWS = 200
VITAL = ("ray::Worker", "raylet", "gcs_server")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> pa.Table:
    """The output of one worker that nobody disturbs."""
    job = write_job(tmp_path_factory.mktemp("undisturbed"), llama_folder, questions(NUM_ROWS))
    result = shardmill("run", job, "--workers", 1)
    assert result.code == 0, result.stderr
    return read_output(job.parent / "out")


@pytest.fixture
def job(tmp_path: Path, llama_folder: Path) -> Path:
    """The same job in another folder."""
    return write_job(tmp_path, llama_folder, questions(NUM_ROWS))


def _check(job: Path, undisturbed: pa.Table) -> None:
    proof = shardmill("verify", job.parent / "out")
    assert proof.code == 0, proof.stdout
    assert read_output(job.parent / "out").equals(undisturbed)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_frozen_worker_of_a_dead_run(job: Path, undisturbed: pa.Table, is_late: bool) -> None:
    """A worker stops in the midst of a commit, its run dies, and it wakes up in, or after, another.

    Its commit comes too late, whether its shard has been done anew by then or not.
    """
    output = job.parent / "out"
    process = start("run", job, "--set", "engine.batch_size=2")
    wait_until(lambda: num_segments(output) >= 1, process)
    wait_until(lambda: any((output / ".shardmill" / "tmp").iterdir()), process)
    frozen = [p for p in psutil.Process(process.pid).children(True) if "ray::W" in p.name()]
    for worker in frozen:
        worker.suspend()
    process.kill()
    finish(process)

    gate, before = job.parent / "gate", num_segments(output)
    again = start_held(gate, "run", job)
    wait_until(lambda: num_segments(output) > before, again)
    if not is_late:
        _wake(frozen)
    gate.touch()
    result = finish(again)
    assert result.code == 0, result.stderr
    _wake(frozen)
    psutil.wait_procs(frozen, timeout=60)
    _check(job, undisturbed)
    assert shardmill("run", job).code == 0
    assert list((output / ".shardmill" / "segments").iterdir()) == []
    _check(job, undisturbed)


def _wake(workers: list[psutil.Process]) -> None:
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.resume()


@pytest.mark.parametrize("lost", ["req_failure_prob", "resp_failure_prob"])
@pytest.mark.parametrize("probability", [10, 30])
def test_a_lost_answer_doubles_no_row(
    job: Path, undisturbed: pa.Table, lost: str, probability: int
) -> None:
    """Calls of workers get lost on their way there, or back after the work was done."""
    call = {"num_failures": 4, "req_failure_prob": 0, "resp_failure_prob": 0} | {lost: probability}
    faults = json.dumps({"CoreWorkerService.grpc_client.PushTask": call})
    result = shardmill("run", job, RAY_testing_rpc_failure=faults)
    assert "Setting RpcFailureManager" in result.stderr, "this Ray knows no such faults"
    assert result.code == 0, result.stderr
    _check(job, undisturbed)


def test_drivers_that_start_at_once(job: Path, undisturbed: pa.Table) -> None:
    """Of four that are let go in the same moment one works and three exit with 75."""
    gate = job.parent / "gate"
    barrier = (sys.executable, "-m", "tests.faults.barrier", str(gate))
    drivers = [start("run", job, command=barrier) for _ in range(4)]
    wait_until(lambda: len(list(job.parent.glob("gate.*"))) == 4, drivers[0])
    gate.touch()
    results = [finish(driver) for driver in drivers]
    assert sorted(result.code for result in results) == [0, 75, 75, 75], results
    for result in results:
        assert result.code == 0 or "in use by another run" in result.stderr
    _check(job, undisturbed)


def test_a_frozen_driver_is_not_taken_for_dead(job: Path, undisturbed: pa.Table) -> None:
    """A driver that is stopped keeps its folder; when it goes on, it completes its job."""
    gate = job.parent / "gate"
    process = start_held(gate, "run", job)
    wait_until(lambda: num_segments(job.parent / "out") >= 1, process)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3)
    assert shardmill("run", job).code == 75
    gate.touch()
    os.kill(process.pid, signal.SIGCONT)
    assert finish(process).code == 0
    _check(job, undisturbed)


def test_no_worker_outlives_its_driver(job: Path) -> None:
    """After SIGKILL of the driver its workers, its raylet and Ray's head go within a minute.

    Ray's two agents notice it a minute or two later; they hold no model.
    """
    process: subprocess.Popen[str] = start("run", job, "--set", "engine.batch_size=1")
    wait_until(lambda: num_segments(job.parent / "out") >= 1, process)
    vital = [p for p in psutil.Process(process.pid).children(True) if p.name().startswith(VITAL)]
    assert len(vital) == 4
    process.kill()
    _, alive = psutil.wait_procs(vital, timeout=60)
    finish(process)
    assert alive == []
