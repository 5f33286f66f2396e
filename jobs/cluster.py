"""Ray: started or joined, measured, and divided among workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.config import WorkersSettings
from pipeline.checkpoint import fetch
from pipeline.errors import ResourceError
from pipeline.settings import ModelSettings

logger = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT = 6 * 3600.0
"""Seconds for a model to arrive on every node."""

OBJECT_STORE_BYTES = 80 * 1024**2
"""Near Ray's minimum: nothing but paths and counts goes through the object store."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What the cluster has in all."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """How many workers there are and what Ray reserves for each.

    Attributes:
        num_cpus: below 1 when there are more workers than cores.
        num_threads: threads of one worker's torch.
    """

    count: int
    num_gpus: int
    num_cpus: float
    num_threads: int


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Resources]:
    """Joins the cluster at `address`, or starts one on this machine that ends with the block.

    Raises:
        ResourceError: there is no cluster at the address, or Ray does not start.
    """
    try:
        with _without_rays_signal_handler():
            _connect(address)
    except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"at {address}" if address else "on this machine"
        raise ResourceError(f"cannot reach a Ray cluster {where}: {_first_line(error)}") from error
    try:
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield Resources(int(total.get("CPU", 0)), int(total.get("GPU", 0)))
    finally:
        ray.shutdown()


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


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A worker that is given no GPU must not see one.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        address="local",  # never some other cluster that happens to be found
        num_cpus=num_cores(),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fetch_on_every_node(settings: ModelSettings) -> None:
    """Downloads a hub model once per node, so that its workers find it and do not race for it.

    This node has it already: the job was checked against it.
    """
    others = [
        node["NodeID"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["NodeID"] != ray.get_runtime_context().get_node_id()
    ]
    if not others or Path(settings.path).is_dir():
        return
    download = ray.remote(fetch)
    calls = [
        download.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(settings)
        for node in others
    ]
    try:
        ray.get(calls, timeout=DOWNLOAD_TIMEOUT)
    except ray.exceptions.GetTimeoutError:
        raise ResourceError(
            f"model.path {settings.path} was not downloaded on every node in "
            f"{DOWNLOAD_TIMEOUT:.0f} s; download it to a shared folder and name that"
        ) from None


def shape_workers(settings: WorkersSettings, resources: Resources, num_shards: int) -> WorkerShape:
    """Divides the cluster among workers.

    With GPUs, auto is one worker per GPU. On CPU alone it is a thread for each eight cores and
    worker, because small products gain more from a second worker than from a second thread. There
    are never more workers than shards: a worker without one would load a model for nothing.

    Raises:
        ResourceError: the job asks for more GPUs than there are.
    """
    num_gpus = settings.gpus_per_worker
    if num_gpus == "auto":
        num_gpus = 1 if resources.num_gpus else 0
    if num_gpus:
        wanted = max(1, _wanted(settings, resources.num_gpus // num_gpus))
        if wanted * num_gpus > resources.num_gpus:
            raise ResourceError(
                f"workers.count {settings.count} with workers.gpus_per_worker {num_gpus} needs "
                f"{wanted * num_gpus} GPUs, and there are {resources.num_gpus}; lower either, or "
                "set workers.gpus_per_worker to 0 to run on CPU"
            )
        return WorkerShape(min(wanted, num_shards), num_gpus, num_cpus=1, num_threads=1)
    cores = max(1, resources.num_cpus)
    count = min(_wanted(settings, cores // max(1, cores // 8)), num_shards)
    num_cpus = cores // count if count <= cores else cores / count
    return WorkerShape(count, 0, num_cpus, num_threads=max(1, cores // count))


def _wanted(settings: WorkersSettings, most: int) -> int:
    return most if settings.count == "auto" else settings.count


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
