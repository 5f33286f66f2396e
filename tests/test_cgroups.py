"""What control groups leave of a machine's cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import cgroups
from pipeline.cgroups import num_cores


@pytest.fixture(autouse=True)
def _many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 cores."""
    monkeypatch.setattr(cgroups, "_num_allowed", lambda: 64)


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ("max 100000", "400000 100000", 4),
        ("250000 100000", "400000 100000", 3),
        ("10000 100000", "max 100000", 1),
        ("max 100000", "max 100000", 64),
        ("6400000 50000", "torn", 64),
    ],
)
def test_time_makes_cores(tmp_path: Path, inner: str, outer: str, expected: int) -> None:
    """`docker --cpus 4` on 64 cores is 4 cores, whichever group around a process says so."""
    for folder, text in ((tmp_path / "cg/job/step", inner), (tmp_path / "cg/job", outer)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{text}\n")
    (tmp_path / "own").write_text("0::/job/step\n")
    assert num_cores(tmp_path / "cg", tmp_path / "own") == expected


@pytest.mark.parametrize(("quota", "expected"), [(200000, 2), (-1, 64)])
def test_version_1(tmp_path: Path, quota: int, expected: int) -> None:
    """In a container, whose group is the mount itself."""
    group = tmp_path / "cg/cpu"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "own").write_text("7:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    assert num_cores(tmp_path / "cg", tmp_path / "own") == expected


def test_no_groups(tmp_path: Path) -> None:
    """Where there are none, the cores that the process may run on count."""
    assert num_cores(tmp_path, tmp_path / "none") == 64
