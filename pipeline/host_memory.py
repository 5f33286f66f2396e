"""The memory of this machine, or of the part of it that a container or a batch system gives."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.cgroups import CGROUPS, OWN_CGROUPS, own_groups

NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""Of a control group's files, by version: its limit, what it uses; and of its cached files."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes.

    Attributes:
        available: what processes could still take, cached files given up.
    """

    total: int
    available: int


def host_memory() -> HostMemory:
    """What this process and others beside it may take together."""
    machine = psutil.virtual_memory()
    limits = [HostMemory(machine.total, machine.available), *cgroup_limits()]
    return HostMemory(
        min(limit.total for limit in limits), min(limit.available for limit in limits)
    )


def cgroup_limits(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> Iterator[HostMemory]:
    """The limits of the control groups that this process is in, each with what is left of it.

    Args:
        root: where control groups are mounted, of version 1 or 2.
        own: names those of this process.
    """
    for version, group in own_groups("memory", root, own):
        limit = _limit(group, *NAMES[version])
        if limit is not None:
            yield limit


def _limit(group: Path, limit: str, usage: str, cached: str) -> HostMemory | None:
    try:
        total = int((group / limit).read_text())
        used = int((group / usage).read_text())
        statistics = (group / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return None  # no such group here, or "max": no limit
    pairs = dict(zip(statistics[::2], statistics[1::2], strict=False))
    # Pages of mapped files count as active for long after their process has ended.
    files = sum(int(pairs.get(name, 0)) for name in (cached, cached.replace("inactive", "active")))
    return HostMemory(total, min(total, max(0, total - used + files)))


def peak_host_bytes() -> int:
    """The most memory that this process has held at a time, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def readable(num_bytes: int) -> str:
    """`12.5 GiB`, or `3.4 MiB` below one."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.1f} GiB"
    return f"{num_bytes / 2**20:,.1f} MiB"
