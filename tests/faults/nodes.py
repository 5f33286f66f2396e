"""A Ray cluster of a head without cores and two nodes of one core, all on this machine.

    python -m tests.faults.nodes

Prints, as JSON, its address and the process ids of the two nodes' raylets. A line of input, in
JSON, adds a node of these properties; the end of the input ends it all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    # A node is dead after about ten seconds of silence; Ray's own minute is Ray's affair.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "6",
}


@dataclass(frozen=True)
class Nodes:
    """The cluster as a test sees it."""

    address: str
    raylets: tuple[int, ...]
    process: subprocess.Popen[str]

    def add(self, **properties: object) -> None:
        """Has a node join: `num_cpus`, `num_gpus`, `env_vars`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(properties) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "added\n"

    def processes(self, node: int) -> list[psutil.Process]:
        """The node's raylet and all that it has started, workers included."""
        raylet = psutil.Process(self.raylets[node])
        return [raylet, *raylet.children(recursive=True)]


@contextmanager
def blind_node(address: str, folder: Path, scratch: Path) -> Iterator[None]:
    """A node, the only one with a GPU, that sees an empty folder in place of one; needs root."""
    mount = 'mount -t tmpfs none "$0" && exec "$@"'
    ray = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--num-cpus=1",
        "--num-gpus=1",
    ]
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", mount, str(folder), *ray, f"--address={address}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)},
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def two_nodes(scratch: Path) -> Iterator[Nodes]:
    """A cluster for as long as the block lasts.

    Args:
        scratch: a folder for Ray; its path must be short.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.nodes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        facts = json.loads(process.stdout.readline())
        yield Nodes(facts["address"], tuple(facts["raylets"]), process)
    finally:
        process.communicate()


def main() -> None:
    """Starts the cluster and waits."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    pids = [node.all_processes["raylet"][0].process.pid for node in nodes]
    sys.stdout.write(json.dumps({"address": cluster.address, "raylets": pids}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        cluster.add_node(**json.loads(line))
        sys.stdout.write("added\n")
        sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    main()
