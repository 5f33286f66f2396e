"""Waiting for a Ray cluster that somebody is starting at this moment: its head, its nodes."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]
from ray.exceptions import RpcError

from pipeline.errors import ResourceError

LIMIT = 600.0
"""Seconds until all nodes must have joined."""

HEAD_LIMIT = 10.0
"""Seconds until somebody must listen at the head's address, where no nodes are waited for."""

_POLL = 2.0


def await_head(address: str, check: Callable[[], None]) -> None:
    """Returns when somebody listens at `address`; at once if it is not host:port.

    Ray itself would try for minutes, say nothing, and hear neither signals nor the clock.

    Args:
        check: called again and again; what it raises ends the wait.

    Raises:
        ResourceError: nobody does.
    """
    deadline = time.monotonic() + HEAD_LIMIT
    while _has_port(address) and not _is_open(address):
        check()
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"cannot reach a Ray cluster at {address}: nobody listens there; start its head, "
                "or correct --ray-address or RAY_ADDRESS"
            )
        time.sleep(_POLL / 4)


def await_nodes(address: str, num_nodes: int, check: Callable[[], None]) -> None:
    """Returns when the cluster at `address` (host:port of its head) has as many nodes.

    Args:
        check: called again and again; what it raises ends the wait.

    Raises:
        ResourceError: they have not come in time.
    """
    if not _has_port(address):
        raise ResourceError(
            f"--ray-nodes needs the head's address as host:port in --ray-address, not '{address}'"
        )
    deadline = time.monotonic() + LIMIT
    while (found := _num_alive(address)) < num_nodes:
        check()
        if time.monotonic() >= deadline:
            raise ResourceError(
                f"{found} of {num_nodes} nodes have joined the Ray cluster at {address} within "
                f"{LIMIT / 60:.0f} minutes; their logs are on each node in Ray's folder"
            )
        time.sleep(_POLL)


def _num_alive(address: str) -> int:
    if not _is_open(address):  # Ray's own client would wait for long, and raise who knows what
        return 0
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=_POLL)
    except RpcError:
        return 0
    return sum(node.state == GcsNodeInfo.ALIVE for node in nodes.values())


def _has_port(address: str) -> bool:
    return "://" not in address and address.rpartition(":")[2].isdigit()


def _is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_POLL).close()
    except (OSError, ValueError):  # the latter for what can be no name, or no number
        return False
    return True
