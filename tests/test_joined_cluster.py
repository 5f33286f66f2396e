"""A run on a Ray cluster that was there before: what it says, and what a monitor sees of it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_jobs import (
    RUN_LIMIT,
    finish,
    questions,
    shardmill,
    start,
    wait_until,
    write_job,
)

HEAD = """
import sys
from ray.cluster_utils import Cluster
port = int(sys.argv[1])
cluster = Cluster(True, head_node_args={"num_cpus": 2, "metrics_export_port": port})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_metrics_report_interval_ms": "500"}
NUM_ROWS = 96


@pytest.fixture
def port() -> int:
    """A free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def address(port: int) -> Iterator[str]:
    """Of a cluster of one node, without authentication."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


def _scraped(port: int) -> dict[str, float]:
    """Our metrics by name and worker; Ray's own tags are left out."""
    try:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        return {}
    found = {}
    for line in page.splitlines():
        if match := re.match(r"ray_shardmill_(\w+)\{(.*)\} (\S+)$", line):
            name, tags, value = match.groups()
            assert 'run="small"' in tags, line
            worker = re.search(r'worker="(\d+)"', tags)
            found[name + (f" {worker[1]}" if worker else "")] = float(value)
    return found


def test_a_monitor_sees_a_run_on_a_cluster(
    tmp_path: Path, llama_folder: Path, address: str, port: int
) -> None:
    """Rows and tokens as the folder has them, by worker; who has no token is warned; `--watch`."""
    job = write_job(tmp_path, llama_folder, questions(NUM_ROWS))
    text = job.read_text(encoding="utf-8")
    job.write_text(re.sub(r"(?m)^name: .*$", "name: small", text), encoding="utf-8")
    process = start("run", job, "--ray-address", address, "--json", **ENVIRONMENT)
    wait_until((tmp_path / "out" / ".shardmill" / "manifest.json").exists, process)
    watcher = start("status", tmp_path / "out", "--watch")
    found: dict[str, float] = {}
    deadline = time.monotonic() + RUN_LIMIT
    # The last figures arrive a moment after the end.
    while process.poll() is None or found.get("rows_done") != NUM_ROWS or found.get("workers", 1):
        assert time.monotonic() < deadline, found
        found |= _scraped(port)
        time.sleep(0.2)
    result = finish(process)
    assert result.code == 0, result.stderr
    assert "joined without a token" in result.stderr
    assert found["rows"] == found["rows_done"] == NUM_ROWS
    assert found["rows_failed"] == 0
    assert found["workers"] == 0, "the run has ended"
    generated = sum(value for name, value in found.items() if name.startswith("generated_tokens"))
    assert generated == result.json["totals"]["num_completion_tokens"]
    assert {name for name in found if name.startswith("slot_occupancy")} <= {
        "slot_occupancy 0",
        "slot_occupancy 1",
    }
    watched = finish(watcher)
    assert watched.code == 0, watched.stderr
    assert watched.stdout.startswith("running: ")
    assert watched.stdout.count("\ncomplete\n") == 1, "it has watched the run to its end"
    assert shardmill("verify", tmp_path / "out").code == 0
