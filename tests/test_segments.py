"""Tests of `pipeline.segments`."""

from __future__ import annotations

import errno
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DamagedOutputError, OutputError
from pipeline.segments import (
    SegmentInfo,
    Totals,
    as_ranges,
    count_commits,
    list_segments,
    missing_positions,
    parse_segment_name,
    read_info,
    read_rows,
    segment_name,
    write_parquet,
)
from tests.run_folders import SmallJob, flip_byte, make_noise


def _info(commit: int, *ranges: tuple[int, int]) -> SegmentInfo:
    return SegmentInfo(0, commit, "f", 0, 10, ranges, "w", Totals())


@given(st.lists(st.integers(0, 30)))
def test_ranges_hold_the_same_numbers(numbers: list[int]) -> None:
    """Ranges spell out to the numbers they were made of, in order, and no two could be one."""
    ranges = as_ranges(numbers)
    assert [n for first, end in ranges for n in range(first, end)] == numbers
    assert all(a[1] != b[0] for a, b in pairwise(ranges))


@pytest.mark.parametrize(
    ("shard", "commit"), [(0, 0), (7, 12), (10**9 + 5, 1234)], ids=["zero", "usual", "huge"]
)
def test_names_are_parsed_back(shard: int, commit: int) -> None:
    """A name gives its shard and commit back, also beyond its usual width."""
    assert parse_segment_name(segment_name(shard, commit)) == (shard, commit)


@pytest.mark.parametrize(
    "name", ["x", "1-2.parquet", "000000001-001.parquet.tmp", "0000000001-001.parquet"]
)
def test_other_names_are_none(name: str) -> None:
    """A name that `segment_name` would not give is no segment's: each has exactly one name."""
    assert parse_segment_name(name) is None


def test_footer_tells_what_was_written(tmp_path: Path) -> None:
    """The facts come back from the file alone."""
    job = SmallJob(tmp_path, num_samples=2)
    written = job.commit(2, positions=[1, 0])
    info = read_info(job.folder.segments / "000000002-000.parquet", "f1")
    assert info == written
    assert (info.first_row, info.num_rows, info.ranges) == (6, 1, ((0, 2),))
    assert info.totals == Totals(error=2)
    totals = job.commit(0, positions=[0, 2]).totals
    assert totals == Totals(stop=1, length=1, num_prompt_tokens=20, num_completion_tokens=10)
    assert (totals + info.totals).num_completions == 4


def test_commits_are_found(tmp_path: Path) -> None:
    """One listing gives all commits; strange files are passed over."""
    job = SmallJob(tmp_path)
    first, second = job.commit(0, [1]), job.commit(0, [0])
    job.commit(1)
    (job.folder.segments / "note.txt").write_text("")
    assert list_segments(job.folder) == {0: [0, 1], 1: [0]}
    assert job.infos(0) == [first, second]
    assert count_commits(job.folder, 2) == 0


def test_rows_of_several_commits_come_in_order(tmp_path: Path) -> None:
    """Pieces that interleave are merged by position."""
    job = SmallJob(tmp_path, num_samples=2)
    for positions in ([5, 1], [0, 3, 4], [2]):
        job.commit(0, positions)
    table = read_rows(job.folder, job.infos(0))
    ids = zip(table["row_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    assert list(ids) == [(f"in-0.parquet#{row}", s) for row in range(3) for s in range(2)]
    assert table["n"].to_pylist() == [0, 0, 1, 1, 2, 2]


def test_missing_positions() -> None:
    """What no commit holds is missing."""
    assert missing_positions([], 3) == [0, 1, 2]
    assert missing_positions([_info(0, (0, 2), (5, 6)), _info(1, (3, 5))], 8) == [2, 6, 7]


@pytest.mark.parametrize("ranges", [(1, 3), (7, 9)], ids=["doubled", "outside"])
def test_impossible_commits_are_refused(ranges: tuple[int, int]) -> None:
    """A position held twice, or beyond the shard's end, names the segment."""
    with pytest.raises(DamagedOutputError, match=r"000000000-001\.parquet"):
        missing_positions([_info(0, (0, 2)), _info(1, ranges)], 8)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99], ids=["empty", "bytes", "half", "end"])
def test_torn_segment(tmp_path: Path, keep: float) -> None:
    """A file cut anywhere is named, whatever pyarrow raises."""
    job = SmallJob(tmp_path)
    job.commit(0)
    path = job.folder.segments / segment_name(0, 0)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(DamagedOutputError, match=path.name):
        read_info(path, "f1")


def test_flipped_byte(tmp_path: Path) -> None:
    """A page that changed on disk is refused; unchecked, it is read as other data."""
    job = SmallJob(tmp_path)
    info = job.commit(0)
    path = job.folder.segments / segment_name(0, 0)
    before = pq.read_table(path)
    flip_byte(path, path.read_bytes().index(make_noise(1)))
    assert pq.read_table(path) != before
    with pytest.raises(DamagedOutputError, match=path.name):
        read_rows(job.folder, [info])


def test_alien_and_misplaced_segments(tmp_path: Path) -> None:
    """A Parquet file without our footer, or under another segment's name, is no segment."""
    job = SmallJob(tmp_path)
    job.commit(0)
    path = job.folder.segments / segment_name(1, 0)
    shutil.copy(job.folder.segments / segment_name(0, 0), path)
    with pytest.raises(DamagedOutputError, match="shard 0, commit 0"):
        read_info(path, "f1")
    shutil.copy(job.manifest.files[0].path, path)
    with pytest.raises(DamagedOutputError, match=path.name):
        read_info(path, "f1")


def test_segment_of_another_job(tmp_path: Path) -> None:
    """One foreign commit among a shard's own is named, wherever it stands."""
    job, other = SmallJob(tmp_path), SmallJob(tmp_path / "other", fingerprint="f2")
    for each in (job, other):
        each.commit(0, [0])
    other.commit(0, [1])
    name = segment_name(0, 1)
    shutil.copy(other.folder.segments / name, job.folder.segments / name)
    with pytest.raises(DamagedOutputError, match=f"{name}.*another job"):
        job.infos(0)


def test_segment_of_an_interrupted_writer(tmp_path: Path) -> None:
    """A file that reads well and lacks rows that its footer promises is refused."""
    job = SmallJob(tmp_path)
    info = job.commit(0)
    path = job.folder.segments / segment_name(0, 0)
    table = pq.read_table(path)
    write_parquet(path, table.schema, [table.slice(0, 2)], info.to_json())
    with pytest.raises(DamagedOutputError, match="it holds 2 rows"):
        read_info(path, "f1")


def test_absent_segment_is_not_damaged(tmp_path: Path) -> None:
    """A reader beside a running driver can tell a segment that was rolled up from a torn one."""
    with pytest.raises(FileNotFoundError):
        read_info(tmp_path / segment_name(0, 0), "f1")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A whole file that the system does not give is not to be moved away; the cause is told."""
    job = SmallJob(tmp_path)
    info = job.commit(0)

    def refused(*_args: object, **_more: object) -> None:
        raise OSError(number, f"Failed to open local file. Detail: [errno {number}]")

    monkeypatch.setattr(pq, "ParquetFile", refused)
    for read in (lambda: job.infos(0), lambda: read_rows(job.folder, [info])):
        with pytest.raises(OutputError, match=f"cannot be read: {os.strerror(number)};") as caught:
            read()
        assert "move it away" not in str(caught.value)


def test_the_cause_comes_from_the_system(tmp_path: Path) -> None:
    """What pyarrow says of a file that cannot be opened has the system's number in it."""
    path = tmp_path / segment_name(0, 0)
    path.symlink_to(path)
    with pytest.raises(OutputError, match=f"{path.name}' cannot be read: Too many levels"):
        read_info(path, "f1")


def test_lost_folder_has_no_segments(tmp_path: Path) -> None:
    """A copy of a complete run may lack the empty folder."""
    job = SmallJob(tmp_path)
    job.folder.segments.rmdir()
    assert list_segments(job.folder) == {}


def test_commits_of_other_nodes_are_seen_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system remembers that a file was not there until its folder is opened."""
    job, absent, open_file = SmallJob(tmp_path), set[Path](), os.open

    def is_there(path: Path) -> bool:
        if not path.exists():
            absent.add(path)
        return path not in absent

    def open_and_look(path: Any, *arguments: Any) -> int:
        if Path(path) == job.folder.segments:
            absent.clear()
        return open_file(path, *arguments)

    monkeypatch.setattr("pipeline.segments.is_there", is_there)
    monkeypatch.setattr(os, "open", open_and_look)
    assert count_commits(job.folder, 0) == 0
    remembered = set(absent)
    job.commit(0)
    absent |= remembered  # it was another node that has committed
    assert count_commits(job.folder, 0) == 1
