"""Where a job stands, from its folder alone."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.failed_rows import example, note_limit
from jobs.ledger import Ledger
from jobs.lock import RunLock
from jobs.parts import roll_up
from jobs.status import read_status
from jobs.tally import Stamp, stamp_of
from jobs.texts import status_text, verify_text
from jobs.verify import verify
from pipeline.errors import DamagedOutputError
from pipeline.segments import Totals
from tests.run_folders import SmallJob


def test_status_of_a_job(tmp_path: Path) -> None:
    """The folder alone tells how far the job is, who runs it and when it is complete."""
    job = SmallJob(tmp_path, num_samples=2)
    assert read_status(job.path).totals == Totals()
    for shard in (0, 1, 2):
        job.commit(shard)
    roll_up(job.folder, job.manifest, 0)
    with RunLock(job.path):
        status = read_status(job.path)
    assert (status.num_rows, status.num_completions, status.totals.num_completions) == (11, 22, 14)
    assert status.totals == Totals(8, 4, 2, 120, 60)
    assert (status.num_parts_done, status.num_parts, status.is_complete) == (1, 3, False)
    assert status.owner is not None
    assert status.owner.pid == os.getpid()
    job.finish()
    status = read_status(job.path)
    assert status.is_complete
    assert status.owner is None
    assert status.totals.num_completions == 22


@pytest.mark.parametrize("gone", ["part-00001.parquet", "_SUCCESS"])
def test_status_is_complete_with_all_files_only(tmp_path: Path, gone: str) -> None:
    """`_SUCCESS` alone says nothing once a part was deleted; nor do parts that nobody counted."""
    job = SmallJob(tmp_path)
    job.finish()
    (job.path / gone).unlink()
    assert not read_status(job.path).is_complete
    job.finish()
    assert read_status(job.path).is_complete


def test_status_of_a_copy_without_its_empty_folders(tmp_path: Path) -> None:
    """Object stores, git and the hub keep no empty folders; what is there is complete."""
    job = SmallJob(tmp_path)
    job.finish()
    for folder in (job.folder.segments, job.folder.tmp):
        folder.rmdir()
    assert read_status(job.path).is_complete


def test_status_beside_a_roll_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that go into a part while status reads them are counted once."""
    job = SmallJob(tmp_path)
    job.commit_all()
    scan = Ledger.scan
    parts = iter(range(job.manifest.num_parts))

    last = job.manifest.part_name(job.manifest.num_parts - 1)

    def stamp(path: Path) -> Stamp | None:
        there = stamp_of(path)
        if path.name == last and (next_part := next(parts, None)) is not None:
            roll_up(job.folder, job.manifest, next_part)
        return there

    monkeypatch.setattr("jobs.ledger.stamp_of", stamp)
    with pytest.raises(FileNotFoundError):
        scan(job.ledger)
    assert read_status(job.path).totals.num_completions == job.manifest.num_completions


def test_too_many_failed_rows_are_no_reason_to_run_again(tmp_path: Path) -> None:
    """What a run says that stopped because of them, `status` and `verify` say, too."""
    job = SmallJob(tmp_path, rows=(14,))
    job.commit_all()
    for part in range(job.manifest.num_parts):
        roll_up(job.folder, job.manifest, part)
    assert not read_status(job.path).has_failed, "the last run may have allowed more"
    note_limit(job.folder, 1)
    status = read_status(job.path)
    assert status.has_failed
    words = "2 rows ended in an error and failure.max_failed_rows allows 1; raise that"
    assert f"stopped: {words}" in status_text(status)
    assert f"all parts are there; {words}" in verify_text(verify(job.path))


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"{}", b'{"max_failed_rows": "x"}'])
def test_a_damaged_note_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    """With the file's name and what to do; nothing else depends on it."""
    job = SmallJob(tmp_path)
    job.folder.failed.write_bytes(content)
    with pytest.raises(DamagedOutputError, match=r"failed\.json' is damaged; remove it"):
        read_status(job.path)


def test_an_example_of_a_failed_row_is_by_the_way(tmp_path: Path) -> None:
    """Whatever else lies in the folder, or is gone from it: an example, or none, and no error."""
    job = SmallJob(tmp_path, rows=(14,))
    pq.write_table(pa.table({"x": [1]}), job.path / "part-mine.parquet")
    assert example(job.folder, job.manifest) == ""
    job.commit_all()
    assert example(job.folder, job.manifest) == ". One of them, in-0.parquet#6: test: seventh row"
    job.finish()
    assert example(job.folder, job.manifest) == ". One of them, in-0.parquet#6: test: seventh row"
    job.folder.segments.rmdir()
    assert example(job.folder, job.manifest) == ""
