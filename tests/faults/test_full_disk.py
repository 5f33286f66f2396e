"""Whole runs on a disk that is too small, or that fails, with real workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from tests.small_jobs import finish, questions, read_output, shardmill, start, write_job

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

NUM_ROWS = 300
ROW_BYTES = 10_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if _mount(folder, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        pytest.skip("a tmpfs cannot be mounted here (needs root with CAP_SYS_ADMIN)")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(folder: Path, *options: str) -> int:
    if shutil.which("mount") is None:
        return 1
    return subprocess.run(["mount", *options, folder], capture_output=True, check=False).returncode


def _rows_with_ballast() -> pa.Table:
    """Rows that come back ten kilobytes each, whatever the compression."""
    ballast = [os.urandom(ROW_BYTES) for _ in range(NUM_ROWS)]
    return questions(NUM_ROWS).append_column("ballast", pa.array(ballast))


def test_a_full_disk_stops_the_run_and_costs_nothing(
    tmp_path: Path, llama_folder: Path, small_disk: Path
) -> None:
    """Exit 73 and a sentence, nothing torn; with more space the same command completes."""
    table = _rows_with_ballast()
    job = write_job(tmp_path, llama_folder, table, output={"path": str(small_disk / "out")})
    full = shardmill("run", job)
    assert full.code == 73, full.stderr
    assert "No space left on device; free space" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    assert shardmill("verify", small_disk / "out").code == 75
    assert shardmill("run", job).code == 73, "the same command ends the same way"

    assert _mount(small_disk, "-o", "remount,size=32m") == 0
    again = shardmill("run", job)
    assert again.code == 0, again.stderr
    assert shardmill("verify", small_disk / "out").code == 0
    output = read_output(small_disk / "out")
    assert output["n"].to_pylist() == list(range(NUM_ROWS))
    assert output["ballast"].equals(table["ballast"])


@pytest.mark.parametrize("call", ["fsync", "link"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_disk_that_fails_stops_the_run(
    tmp_path: Path, llama_folder: Path, call: str, number: int
) -> None:
    """A sync or a link that fails in any process of a run: exit 73, and it continues."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    job = write_job(tmp_path, llama_folder, questions(120))
    log = tmp_path / "strace.log"
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(log)]
    strace += ["-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={number}+"]
    failed = finish(start("run", job, command=[*strace, sys.executable]))
    assert "INJECTED" in log.read_text(), "the fault was never met"
    assert failed.code == 73, failed.stderr
    assert "Input/output error" in failed.stderr.splitlines()[-1]
    if (tmp_path / "out" / ".shardmill" / "manifest.json").exists():
        assert shardmill("verify", tmp_path / "out").code == 75
    assert shardmill("run", job).code == 0
    assert shardmill("verify", tmp_path / "out").code == 0
    assert read_output(tmp_path / "out")["n"].to_pylist() == list(range(120))
