"""The control groups that this process is in, and what they leave of the machine's cores. Linux."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def own_groups(
    controller: str, root: Path = CGROUPS, own: Path = OWN_CGROUPS
) -> Iterator[tuple[int, Path]]:
    """The version (1 or 2) and the folder of each group that may limit this process.

    Args:
        controller: `memory` or `cpu`.
        root: where control groups are mounted.
        own: names those of this process.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from ((2, group) for group in _around(root, path))
        elif controller in controllers.split(","):
            yield from ((1, group) for group in _around(root / controller, path))


def _around(mount: Path, path: str) -> Iterator[Path]:
    """A group and all groups around it."""
    group = mount / path.lstrip("/")
    # In a container the path may be one of the machine outside; the mount itself is then ours.
    for folder in [group, *group.parents]:
        if folder == mount.parent:
            return
        yield folder


def num_cores(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """The cores that this process may use: those it may run on, or as many as its time makes."""
    quotas = [
        quota
        for version, group in own_groups("cpu", root, own)
        if (quota := _quota(version, group))
    ]
    return max(1, math.ceil(min([_num_allowed(), *quotas])))


def _num_allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(version: int, group: Path) -> float | None:
    """Seconds of CPU that a group has in a second; None if that is not limited."""
    try:
        if version == 2:
            most, period = map(int, (group / "cpu.max").read_text().split())
        else:
            most = int((group / "cpu.cfs_quota_us").read_text())
            period = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None  # no such group here, or "max"
    return most / period if most > 0 and period > 0 else None
