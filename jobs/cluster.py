"""Ray: started or joined, measured, and divided among workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationMode,
    get_authentication_mode,
)

from jobs.config import WorkersSettings
from jobs.private_ray import private_ray
from pipeline.cgroups import num_cores
from pipeline.errors import RayFailedError, ResourceError

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 * 1024**2
"""Near Ray's minimum: nothing but paths and counts goes through the object store."""

_VITAL = frozenset({"gcs_server", "raylet"})


@dataclass(frozen=True, slots=True)
class Resources:
    """What the cluster has, node by node."""

    cpus: tuple[int, ...]
    gpus: tuple[int, ...]

    @property
    def num_gpus(self) -> int:
        """Of all nodes together."""
        return sum(self.gpus)

    def room_for(self, num_gpus: int) -> int:
        """Workers that find so many GPUs on one node."""
        return sum(gpus // num_gpus for gpus in self.gpus)


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """How many workers there are and what Ray reserves for each.

    Attributes:
        num_cpus: below 1 when there are more workers than cores; none beside a GPU, which must
            not idle where all cores are taken.
        num_threads: threads of one worker's torch.
        most: workers there may be when the cluster grows.
        num_per_node: workers that share a node at least.
    """

    count: int
    num_gpus: int
    num_cpus: float
    num_threads: int
    most: int
    num_per_node: int = 1

    def places(self, resources: Resources) -> int:
        """Workers that a cluster has room for, as many as there may be."""
        if self.num_gpus:
            return min(self.most, resources.room_for(self.num_gpus))
        # A little more than nothing is added, since 1 // 0.1 is 9.
        return min(self.most, sum(int(cores / self.num_cpus + 1e-6) for cores in resources.cpus))


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Resources]:
    """Joins the cluster at `address`, or starts one on this machine that ends with the block.

    Raises:
        ResourceError: there is no cluster at the address, or Ray does not start.
    """
    if address is not None and address.startswith("ray://"):
        raise ResourceError(
            f"cannot use {address}: Ray's client protocol keeps the driver off the cluster; start "
            "`shardmill run` on a node of the cluster, with the address of its head as host:port"
        )
    with nullcontext() if address else private_ray() as folder:
        try:
            with _without_rays_signal_handler():
                _connect(address, folder)
        except Exception as error:  # a bare one when a part of it ends during its start
            where = f"at {address}" if address else "on this machine"
            reason = _first_line(error)
            raise RayFailedError(f"cannot reach a Ray cluster {where}: {reason}") from error
        try:
            yield resources()
        finally:
            ray.shutdown()


def resources() -> Resources:
    """What the cluster has in all, now."""
    nodes = [
        node["Resources"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    return Resources(
        cpus=tuple(int(node.get("CPU", 0)) for node in nodes),
        gpus=tuple(int(node.get("GPU", 0)) for node in nodes),
    )


@contextmanager
def _without_rays_signal_handler() -> Iterator[None]:
    """Keeps `ray.init` from answering SIGTERM with an exit of its own, with code 15.

    There is no setting for it, and a handler put back afterwards comes too late for a signal
    during the seconds that it takes.
    """
    install = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = install


def _connect(address: str | None, folder: Path | None) -> None:
    """Joins, or starts a Ray that keeps its sockets and logs in the folder."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without this Ray tells of each lost worker on standard output, whatever log_to_driver says.
    ray._private.worker._worker_logs_enabled = False
    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        if get_authentication_mode() != AuthenticationMode.TOKEN:
            logger.warning(
                "the cluster at %s is joined without a token: if it asks for none, whoever reaches "
                "it can run code there (docs/security.md)",
                address,
            )
        return
    with _only_what_is_needed():
        ray.init(
            address="local",  # never some other cluster that happens to be found
            num_cpus=num_cores(),
            include_dashboard=False,
            _temp_dir=str(folder),
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


@contextmanager
def _only_what_is_needed() -> Iterator[None]:
    """Gives a Ray that `ray.init` starts what `ray start` has options for, and it has none.

    One of its agents asks for port 52365 of the machine. Where another Ray has it, that of another
    run or one that was killed a minute ago, it tries again for 3 s, and the start waits for it.
    And nobody reads what the monitors of Ray's logs and of an autoscaler would find: two processes
    of 80 MB that take seconds to start.
    """
    module: Any = ray._private.parameter
    parameters = module.RayParams
    module.RayParams = partial(
        parameters, dashboard_agent_listen_port=0, no_monitor=True, include_log_monitor=False
    )
    try:
        yield
    finally:
        module.RayParams = parameters


def check_ray() -> None:
    """Refuses to go on when the Ray that this process has started is gone.

    Ray itself would wait for room on a node that does not come back, and ends this process with
    code 1 and no exception a minute after its head has died.

    Raises:
        RayFailedError: with what has ended.
    """
    node = ray._private.worker._global_node
    ended = _VITAL & {str(kind) for kind, _ in node.dead_processes()} if node else _VITAL
    if ended:
        raise RayFailedError(
            f"Ray's {min(ended)} has ended, killed or out of memory; what was committed is kept, "
            "and the same command continues"
        )


def shape_workers(settings: WorkersSettings, resources: Resources, num_shards: int) -> WorkerShape:
    """Divides the cluster among workers.

    With GPUs, auto is one worker per GPU. On CPU alone a worker has a thread for each eight cores
    of its node, because small products gain more from a second worker than from a second thread.
    There are never more workers than shards: a worker without one would load a model for nothing.

    Raises:
        ResourceError: the job asks for more GPUs than there are, or than a node has.
    """
    num_gpus = settings.gpus_per_worker
    if num_gpus == "auto":
        num_gpus = 1 if resources.num_gpus else 0
    if num_gpus:
        room = resources.room_for(num_gpus)
        wanted = max(1, _wanted(settings, room))
        if wanted > room:
            raise ResourceError(_no_gpus(settings, num_gpus, wanted, resources))
        count = min(wanted, num_shards)
        most = num_shards if settings.count == "auto" else count
        beside = min(count, max(gpus // num_gpus for gpus in resources.gpus))
        return WorkerShape(count, num_gpus, 0, num_threads=1, most=most, num_per_node=beside)
    nodes = [cores for cores in resources.cpus if cores] or [1]
    room = sum(cores // max(1, cores // 8) for cores in nodes)
    count = min(_wanted(settings, room), num_shards)
    num_cpus = _share(nodes, count)
    return WorkerShape(
        count,
        num_gpus=0,
        num_cpus=num_cpus,
        num_threads=max(1, int(num_cpus)),
        most=num_shards if settings.count == "auto" else count,
        num_per_node=max(1, count // len(nodes)),
    )


def _share(nodes: Sequence[int], count: int) -> float:
    """The most cores that each of so many workers finds on one node; whole ones, or below 1."""
    shares = {Fraction(cores, part) for cores in set(nodes) for part in range(1, count + 1)}
    fitting = (
        share
        for share in sorted(shares, reverse=True)
        if sum(cores // share for cores in nodes) >= count
    )
    share = next(fitting)
    return int(share) if share >= 1 else float(share)


def _no_gpus(settings: WorkersSettings, num_gpus: int, wanted: int, resources: Resources) -> str:
    there = f"there are {resources.num_gpus}"
    if wanted * num_gpus <= resources.num_gpus:
        of_nodes = ", ".join(map(str, resources.gpus))
        there = f"a worker takes all of its from one node, which have {of_nodes}"
    return (
        f"workers.count {settings.count} with workers.gpus_per_worker {num_gpus} needs "
        f"{wanted * num_gpus} GPUs, and {there}; lower either, or set workers.gpus_per_worker to 0 "
        "to run on CPU"
    )


def _wanted(settings: WorkersSettings, most: int) -> int:
    return most if settings.count == "auto" else settings.count


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
