"""A node of a cluster is lost, or freezes and comes back late."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest

from tests.faults.nodes import Nodes, blind_node, two_nodes
from tests.small_jobs import (
    finish,
    num_segments,
    questions,
    read_output,
    shardmill,
    start,
    wait_until,
    write_job,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

NUM_ROWS = 200
AUTO = ("--set", "workers.count=auto")


@pytest.fixture
def job(tmp_path: Path, llama_folder: Path, request: pytest.FixtureRequest) -> Path:
    """A job of seven shards, or a test's number of rows, that lasts for some time."""
    return write_job(
        tmp_path,
        llama_folder,
        questions(getattr(request, "param", NUM_ROWS)),
        generation={"max_new_tokens": 60},
        engine={"batch_size": 1},
    )


@pytest.fixture
def undisturbed(job: Path) -> pa.Table:
    """What the job comes to when nothing is lost."""
    other = job.parent / "undisturbed"
    result = shardmill("run", job, "--output", other, "--set", "engine.batch_size=32")
    assert result.code == 0, result.stderr
    return read_output(other)


def _signal(nodes: Nodes, node: int, number: signal.Signals) -> None:
    for process in nodes.processes(node):
        process.send_signal(number)


def _prove(job: Path, undisturbed: pa.Table) -> None:
    """Complete and right, and so it stays when the same command is run once more."""
    for _ in range(2):
        proof = shardmill("verify", job.parent / "out")
        assert proof.code == 0, proof.stdout
        assert read_output(job.parent / "out").equals(undisturbed)
        assert shardmill("run", job).code == 0


def test_a_lost_node_costs_no_row(job: Path, scratch: Path, undisturbed: pa.Table) -> None:
    """All processes of a node are killed: its shards go to the other one."""
    with two_nodes(scratch) as nodes:
        process = start("run", job, "--ray-address", nodes.address)
        wait_until(lambda: num_segments(job.parent / "out") >= 2, process)
        _signal(nodes, 0, signal.SIGKILL)
        result = finish(process)
    assert result.code == 0, result.stderr
    assert "was lost" in result.stderr
    _prove(job, undisturbed)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_frozen_node_that_comes_back(
    job: Path, scratch: Path, undisturbed: pa.Table, is_late: bool
) -> None:
    """Its shards are done elsewhere; what its worker then commits, or tries to, harms nothing."""
    with two_nodes(scratch) as nodes:
        process = start("run", job, "--ray-address", nodes.address)
        wait_until(lambda: num_segments(job.parent / "out") >= 2, process)
        frozen = nodes.processes(0)
        _signal(nodes, 0, signal.SIGSTOP)
        if not is_late:
            before = num_segments(job.parent / "out")
            wait_until(lambda: num_segments(job.parent / "out") > before + 1, process)
            time.sleep(12)  # by now Ray takes the node for dead
            _signal(nodes, 0, signal.SIGCONT)
        result = finish(process)
        if is_late:
            _signal(nodes, 0, signal.SIGCONT)
            time.sleep(5)  # for what the worker still held to be committed, if it can
    assert result.code == 0, result.stderr
    assert frozen
    _prove(job, undisturbed)


def _workers(job: Path) -> list[dict[str, object]]:
    metrics = json.loads((job.parent / "out" / ".shardmill" / "metrics.json").read_text())
    return [worker for worker in metrics["workers"] if "node" in worker]


@pytest.mark.parametrize("job", [800], indirect=True)
def test_a_node_that_joins_gets_a_worker(job: Path, scratch: Path, undisturbed: pa.Table) -> None:
    """It shares the work from then on."""
    with two_nodes(scratch) as nodes:
        process = start("run", job, "--ray-address", nodes.address, *AUTO)
        wait_until(lambda: num_segments(job.parent / "out") > 0, process)
        nodes.add(num_cpus=1)
        result = finish(process)
    assert result.code == 0, result.stderr
    assert "worker 2: the cluster has room for it now" in result.stderr
    assert len(_workers(job)) == 3
    assert all(worker["num_generated_tokens"] for worker in _workers(job))
    _prove(job, undisturbed)


@pytest.mark.parametrize("job", [800], indirect=True)
def test_four_gpus_of_two_nodes_have_a_worker_each(job: Path, scratch: Path) -> None:
    """Each sees one of its own, none is shared, none is left idle."""
    with two_nodes(scratch) as nodes:
        for devices in ("4,5", "6,7"):
            nodes.add(num_cpus=2, num_gpus=2, env_vars={"CUDA_VISIBLE_DEVICES": devices})
        result = shardmill("run", job, "--ray-address", nodes.address, *AUTO)
    assert result.code == 0, result.stderr
    assert sorted(str(worker["devices"]) for worker in _workers(job)) == ["4", "5", "6", "7"]
    assert all(worker["num_generated_tokens"] for worker in _workers(job))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_node_that_does_not_see_the_run_folder_is_refused(job: Path, scratch: Path) -> None:
    """It would commit into a folder that nobody looks at."""
    out = job.parent / "out"
    out.mkdir()
    with two_nodes(scratch) as nodes, blind_node(nodes.address, out, scratch):
        time.sleep(10.0)  # until it has joined
        result = shardmill("run", job, "--ray-address", nodes.address, *AUTO)
    assert result.code == 69, result.stderr
    assert f"sees no such run folder at '{out}'" in result.stderr
    assert "Traceback" not in result.stderr
