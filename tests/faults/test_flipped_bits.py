"""Bits of an output file that change on the disk, one at a time."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import verify
from tests.run_folders import SmallJob


def _flip_each(folder: Path, choose: int | None) -> int:
    """Flips bits one after the other; returns how many `verify` has found.

    What it does not find, such as a bit of a file's statistics or of the name of the program that
    wrote it, must not change a value that is read.
    """
    job = SmallJob(folder)
    job.finish()
    path = job.path / "part-00000.parquet"
    content = path.read_bytes()
    rows = pq.read_table(path)
    num_found = 0
    for position in _chosen(8 * len(content), choose):
        spoilt = bytearray(content)
        spoilt[position // 8] ^= 1 << position % 8
        path.write_bytes(spoilt)
        report = verify(job.path)
        num_found += report.state == "damaged"
        assert all(path.name in line for line in report.damage)
        assert report.damage or _same_rows(path, rows), f"bit {position}"
    return num_found


def _chosen(count: int, choose: int | None) -> Iterable[int]:
    return range(count) if choose is None else random.Random(5).sample(range(count), choose)


def _same_rows(path: Path, rows: pa.Table) -> bool:
    return bool(pq.read_table(path).equals(rows))


def test_some_flipped_bits(tmp_path: Path) -> None:
    """A flipped bit is found, or it changes no row."""
    assert _flip_each(tmp_path, 120) > 60


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_all_flipped_bits(tmp_path: Path) -> None:
    """Likewise for each bit of a part."""
    assert _flip_each(tmp_path, None) > 10_000
