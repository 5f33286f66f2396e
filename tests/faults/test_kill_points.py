"""Death at, and failure of, every system call of commits and roll-ups, without Ray."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from tests.faults.steps import check_leftovers
from tests.faults.tracing import Tracer

CHANGES = "write,pwrite64,fsync,link,linkat,unlink,unlinkat,rename,mkdir"
"""The calls that change what is on the disk."""

KILLED = -9

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracer]:
    """Strace, or a skip that says why not."""
    tracer = Tracer(tmp_path_factory.mktemp("tracer"))
    try:
        if reason := tracer.why_not():
            pytest.skip(reason)
        yield tracer
    finally:
        tracer.close()


def _points(tracer: Tracer, folder: Path, calls: str) -> list[tuple[str, int]]:
    """Each of the calls that an undisturbed run makes: its name, and which one of that name."""
    undisturbed = tracer.run(folder, calls)
    assert undisturbed.code == 0
    counts = undisturbed.counts()
    return [(name, number) for name in sorted(counts) for number in range(1, counts[name] + 1)]


def _kill_at(tracer: Tracer, folder: Path, points: list[tuple[str, int]]) -> int:
    """Dies at each point in a folder of its own and checks what is left; how many deaths."""
    deaths = 0
    for name, number in points:
        ended = tracer.run(folder, name, f"{name}:signal=KILL:when={number}")
        assert ended.code in (0, KILLED), ended.log[-3:]
        deaths += ended.code == KILLED
        check_leftovers(folder)
        shutil.rmtree(folder)
    return deaths


def test_death_at_every_change(tracer: Tracer, tmp_path: Path) -> None:
    """Killed at a call that changes the disk: what is there is whole, and it continues."""
    points = _points(tracer, tmp_path / "undisturbed", CHANGES)
    assert {"write", "fsync", "link", "unlink"} <= {name for name, _ in points}
    # A file is written in dozens of pieces; the long set dies at each of them.
    chosen = [(name, number) for name, number in points if name != "write" or number % 4 == 1]
    assert _kill_at(tracer, tmp_path / "killed", chosen) == len(chosen)


@pytest.mark.faults
def test_death_at_every_system_call(tracer: Tracer, tmp_path: Path) -> None:
    """Likewise at any call at all, those that only look included."""
    points = _points(tracer, tmp_path / "undisturbed", "all")
    # How often a thread waits, or memory is asked for, differs a little from run to run.
    assert _kill_at(tracer, tmp_path / "killed", points) > 0.9 * len(points)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(40))
def test_deaths_one_after_the_other(tracer: Tracer, tmp_path: Path, seed: int) -> None:
    """What a death has left is interrupted again, and again, until a run survives."""
    chance = random.Random(seed)
    folder, ended = tmp_path / "killed", KILLED
    for _ in range(8):
        name = chance.choice(CHANGES.split(","))
        number = chance.randrange(1, 15)
        ended = tracer.run(folder, name, f"{name}:signal=KILL:when={number}").code
        assert ended in (0, KILLED)
    check_leftovers(folder)


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_sync_that_fails_publishes_nothing(tracer: Tracer, tmp_path: Path, error: str) -> None:
    """Each fsync in turn fails: exit 73, and a file that may not be on the disk gets no name."""
    points = _points(tracer, tmp_path / "undisturbed", "fsync")
    assert len(points) >= 10
    folder = tmp_path / "failing"
    for _, number in points:
        ended = tracer.run(folder, "fsync,link,linkat", f"fsync:error={error}:when={number}")
        assert ended.code == OutputError.exit_code, ended.log
        _check_not_linked(ended.log)
        check_leftovers(folder)
        shutil.rmtree(folder)


def _check_not_linked(log: list[str]) -> None:
    """The file, or folder, whose sync failed is not linked from there on."""
    [failed] = [number for number, line in enumerate(log) if "INJECTED" in line]
    path = log[failed].partition("<")[2].partition(">")[0]
    assert not any("link" in line and f'"{path}"' in line for line in log[failed + 1 :]), log


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_write_that_fails_publishes_nothing(tracer: Tracer, tmp_path: Path, error: str) -> None:
    """From some write on the disk is full: exit 73, nothing torn, and it continues afterwards."""
    _check_failing_writes(tracer, tmp_path, error, every=10)


@pytest.mark.faults
def test_any_write_that_fails_publishes_nothing(tracer: Tracer, tmp_path: Path) -> None:
    """Likewise from each write on."""
    _check_failing_writes(tracer, tmp_path, "ENOSPC", every=1)


def _check_failing_writes(tracer: Tracer, scratch: Path, error: str, every: int) -> None:
    points = _points(tracer, scratch / "undisturbed", "write")
    assert len(points) >= 20
    folder = scratch / "full"
    for _, number in points[::every]:
        ended = tracer.run(folder, "write", f"write:error={error}:when={number}+")
        assert ended.code == OutputError.exit_code, ended.log[-3:]
        check_leftovers(folder)
        shutil.rmtree(folder)
