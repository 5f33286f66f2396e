"""What a container or a batch system leaves of a machine's memory."""

from __future__ import annotations

from pathlib import Path

import psutil

from pipeline.host_memory import (
    HostMemory,
    cgroup_limits,
    host_memory,
    peak_host_bytes,
    readable,
)

GIB = 2**30


def make_group(folder: Path, names: tuple[str, str, str], values: tuple[object, int, int]) -> None:
    """Files of a control group: its limit, what is used, and how much of that is cached files."""
    folder.mkdir(parents=True, exist_ok=True)
    limit, used, cached = names
    (folder / limit).write_text(f"{values[0]}\n")
    (folder / used).write_text(f"{values[1]}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cached} {values[2]}\n")


def test_limits_of_all_groups_around_a_process(tmp_path: Path) -> None:
    """As under Slurm or systemd: a job's group limits, its step's own does not."""
    names = ("memory.max", "memory.current", "inactive_file")
    make_group(tmp_path / "cg/job/step", names, ("max", GIB, 0))
    make_group(tmp_path / "cg/job", names, (16 * GIB, 10 * GIB, 2 * GIB))
    (tmp_path / "own").write_text("0::/job/step\n")
    assert list(cgroup_limits(tmp_path / "cg", tmp_path / "own")) == [HostMemory(16 * GIB, 8 * GIB)]


def test_mapped_files_are_given_up(tmp_path: Path) -> None:
    """What a process has mapped stays in the group's account, as active, long after its end."""
    group = tmp_path / "cg/job"
    make_group(group, ("memory.max", "memory.current", "inactive_file"), (16 * GIB, 12 * GIB, GIB))
    with (group / "memory.stat").open("a") as statistics:
        statistics.write(f"active_file {8 * GIB}\n")
    (tmp_path / "own").write_text("0::/job\n")
    assert list(cgroup_limits(tmp_path / "cg", tmp_path / "own")) == [
        HostMemory(16 * GIB, 13 * GIB)
    ]


def test_limits_in_a_container(tmp_path: Path) -> None:
    """Whose group is the mount itself, by whatever path the machine outside knows it; version 1."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    make_group(tmp_path / "cg/memory", names, (4 * GIB, 5 * GIB, 0))
    (tmp_path / "own").write_text("7:cpu:/docker/x\n4:memory,hugetlb:/docker/x\n")
    assert list(cgroup_limits(tmp_path / "cg", tmp_path / "own")) == [HostMemory(4 * GIB, 0)]


def test_no_limits(tmp_path: Path) -> None:
    """Where there are no control groups, the machine's own memory counts."""
    assert list(cgroup_limits(tmp_path, tmp_path / "none")) == []
    memory = host_memory()
    assert 0 < memory.available <= memory.total <= psutil.virtual_memory().total


def test_peak_only_grows() -> None:
    """It is what the process has held at most, in bytes."""
    before = peak_host_bytes()
    assert before >= psutil.Process().memory_info().rss // 2
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    with_block = peak_host_bytes()
    del block
    assert peak_host_bytes() >= with_block >= before


def test_sizes_are_readable() -> None:
    """The unit fits the number."""
    assert readable(3 * 2**20) == "3.0 MiB"
    assert readable(2500 * 2**30) == "2,500.0 GiB"
