"""Ray nodes that are hosts of their own: the whole job, and links that are cut in its midst."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from tests.faults.network import Cluster, Host, hosts, why_not
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

FEW, MANY = 800, 1600
"""Rows: enough for two workers to share, and for one to be busy until a lost node is back."""

LIMIT = 300.0
"""Seconds for a run, on a busy machine."""

SHORT = 3.0
"""Seconds: Ray takes a node for dead after about ten."""


@pytest.fixture(scope="module")
def reason() -> str | None:
    """Why there are no hosts here, or None."""
    return why_not()


@pytest.fixture
def machines(scratch: Path, reason: str | None) -> Iterator[list[Host]]:
    """The head's, where the driver is too, two for workers, and one to spare."""
    if reason is not None:
        pytest.skip(reason)
    with hosts(scratch, 4) as made:
        yield made


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A job of shards of 32 rows; each test has an output of its own."""
    return write_job(
        tmp_path_factory.mktemp("network"),
        llama_folder,
        questions(MANY),
        generation={"max_new_tokens": 60},
        engine={"batch_size": 1},
    )


@pytest.fixture(scope="module")
def undisturbed(job: Path) -> pa.Table:
    """What the job comes to when nothing is lost."""
    other = job.parent / "undisturbed"
    result = shardmill("run", job, "--output", other, "--set", "engine.batch_size=32")
    assert result.code == 0, result.stderr
    return read_output(other)


def _start(cluster: Cluster, job: Path, output: Path, rows: int) -> subprocess.Popen[str]:
    """The run, on the head's host, as soon as the nodes are there."""
    address = ("--ray-address", cluster.address, "--ray-nodes", 3)
    return start(
        *("run", job, "--output", output, "--limit", rows, *address),
        command=cluster.head.inside(sys.executable),
        **cluster.environment,
    )


def _prove(job: Path, output: Path, expected: pa.Table) -> None:
    """Complete and right, and so it stays when the same command is run once more."""
    again = ("run", job, "--output", output, "--limit", expected.num_rows)
    for _ in range(2):
        proof = shardmill("verify", output)
        assert proof.code == 0, proof.stdout
        assert read_output(output).equals(expected)
        assert shardmill(*again).code == 0


def _log(output: Path) -> str:
    path = output / ".shardmill" / "logs" / "run.log"
    return path.read_text() if path.exists() else ""


def _workers(output: Path) -> list[dict[str, object]]:
    metrics = json.loads((output / ".shardmill" / "metrics.json").read_text())
    return [worker for worker in metrics["workers"] if "node" in worker]


def test_the_whole_job(
    machines: list[Host], job: Path, tmp_path: Path, undisturbed: pa.Table
) -> None:
    """Both nodes work, on hosts that share nothing but the files."""
    with Cluster(*machines[:3]) as cluster:
        result = finish(_start(cluster, job, tmp_path / "out", FEW), LIMIT)
    assert result.code == 0, result.stderr
    assert "without a token" not in result.stderr
    assert {worker["node"] for worker in _workers(tmp_path / "out")} == {"host1", "host2"}
    assert all(worker["num_generated_tokens"] for worker in _workers(tmp_path / "out"))
    _prove(job, tmp_path / "out", undisturbed.slice(0, FEW))


def test_fewer_workers_than_nodes(
    machines: list[Host], job: Path, tmp_path: Path, undisturbed: pa.Table
) -> None:
    """A single shard is one worker's, which asks for no more cores than a node has."""
    with Cluster(*machines[:3]) as cluster:
        result = finish(_start(cluster, job, tmp_path / "out", 20), LIMIT)
    assert result.code == 0, result.stderr
    _prove(job, tmp_path / "out", undisturbed.slice(0, 20))


def test_a_node_is_cut_off_and_comes_back(
    machines: list[Host], job: Path, tmp_path: Path, undisturbed: pa.Table
) -> None:
    """Ray gives it up; its worker goes on, cut off, and harms nothing; the node starts anew."""
    output = tmp_path / "out"
    node = machines[1]
    with Cluster(*machines[:3]) as cluster:
        process = _start(cluster, job, output, MANY)
        wait_until(lambda: num_segments(output) >= 2, process)
        node.cut()
        wait_until(lambda: "was lost" in _log(output), process)
        node.restore()
        cluster.rejoin(node)
        result = finish(process, LIMIT)
    assert result.code == 0, result.stderr
    assert len(re.findall(r"worker \d on host1: ", result.stderr)) == 2, result.stderr
    _prove(job, output, undisturbed)


def test_the_head_is_cut_off(
    machines: list[Host], job: Path, tmp_path: Path, undisturbed: pa.Table
) -> None:
    """All nodes but its own are gone for Ray; the run waits until they have started anew."""
    output = tmp_path / "out"
    head, *nodes, _ = machines
    with Cluster(head, *nodes) as cluster:
        process = _start(cluster, job, output, FEW)
        wait_until(lambda: num_segments(output) >= 2, process)
        head.cut()
        wait_until(lambda: all(f"worker {n} was lost" in _log(output) for n in (0, 1)), process)
        head.restore()
        for node in nodes:
            cluster.rejoin(node)
        result = finish(process, LIMIT)
    assert result.code == 0, result.stderr
    _prove(job, output, undisturbed.slice(0, FEW))


@pytest.mark.parametrize("index", [0, 1])
def test_a_short_cut_costs_nothing(
    machines: list[Host], job: Path, tmp_path: Path, undisturbed: pa.Table, index: int
) -> None:
    """Nobody is given up, be it the driver's host that was cut off or a worker's."""
    output = tmp_path / "out"
    with Cluster(*machines[:3]) as cluster:
        process = _start(cluster, job, output, FEW)
        wait_until(lambda: num_segments(output) >= 2, process)
        machines[index].cut()
        time.sleep(SHORT)
        machines[index].restore()
        result = finish(process, LIMIT)
    assert result.code == 0, result.stderr
    assert "lost" not in result.stderr
    _prove(job, output, undisturbed.slice(0, FEW))


def test_a_node_dies_and_another_joins(
    machines: list[Host], job: Path, tmp_path: Path, undisturbed: pa.Table
) -> None:
    """Half-way: what the one held is done elsewhere, and the new one gets its worker."""
    output = tmp_path / "out"
    with Cluster(*machines[:3]) as cluster:
        process = _start(cluster, job, output, MANY)
        wait_until(lambda: num_segments(output) >= 2, process)
        machines[1].kill()
        cluster.add(machines[3])
        result = finish(process, LIMIT)
    assert result.code == 0, result.stderr
    assert re.search(r"worker \d on host3: ", result.stderr), result.stderr
    _prove(job, output, undisturbed)
