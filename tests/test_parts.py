"""Tests of `jobs.parts`: roll-up, the end of a job, and that others read the output."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from jobs import parts
from jobs.parts import finish, read_part, roll_up
from jobs.state import JobState
from pipeline.errors import DamagedOutputError, OutputError
from pipeline.segments import Totals, facts_of, segment_name, write_parquet
from tests.run_folders import SmallJob


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("num_samples", [1, 3])
def test_rows_come_once_and_in_order(tmp_path: Path, num_samples: int) -> None:
    """Shards in several interleaved pieces, committed last to first, come out as the input was."""
    job = SmallJob(tmp_path, num_samples=num_samples)
    for shard in reversed(range(job.manifest.num_shards)):
        total = job.manifest.shard_completions(shard)
        for positions in (range(1, total, 2), range(0, total, 2)):
            if positions:
                job.commit(shard, positions)
    for part in reversed(range(job.manifest.num_parts)):
        roll_up(job.folder, job.manifest, part)
    assert job.output() == job.expected()
    assert _names(job.folder.segments) == _names(job.folder.tmp) == []


def test_part_tells_what_it_holds(tmp_path: Path) -> None:
    """The footer sums up the segments', so that `status` needs no rows."""
    job = SmallJob(tmp_path)
    totals = job.commit(0, [2]).totals + job.commit(0).totals + job.commit(1).totals
    info = roll_up(job.folder, job.manifest, 0)
    assert info == read_part(job.folder, job.manifest, 0)
    assert (info.part, info.first_shard, info.num_shards, info.totals) == (0, 0, 2, totals)


def test_small_segments_share_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part's row groups follow its size in bytes, not its shards."""
    job = SmallJob(tmp_path, rows=(30,), shards_per_part=10)
    job.commit_all()
    roll_up(job.folder, job.manifest, 0)
    path = job.path / "part-00000.parquet"
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    path.unlink()
    job.commit_all()
    monkeypatch.setattr(parts, "ROW_GROUP_BYTES", 1)
    roll_up(job.folder, job.manifest, 0)
    assert pq.ParquetFile(path).metadata.num_row_groups == 10
    assert job.output() == job.expected()


def test_finished_job(tmp_path: Path) -> None:
    """`_SUCCESS` is written once all parts are there, and writing it again changes nothing."""
    job = SmallJob(tmp_path)
    job.finish()
    assert _names(job.path) == [
        ".shardmill",
        "_SUCCESS",
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    assert job.folder.success.read_bytes() == b""
    assert finish(job.folder, job.manifest).num_completions == 11


@pytest.mark.parametrize("fault", ["missing", "torn", "other job"])
def test_no_success_without_every_part(tmp_path: Path, fault: str) -> None:
    """A part that is gone, torn or foreign stops the end of the job, by name."""
    job = SmallJob(tmp_path)
    job.commit_all()
    for part in range(job.manifest.num_parts):
        roll_up(job.folder, job.manifest, part)
    path = job.path / "part-00001.parquet"
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    if fault == "other job":
        other = SmallJob(tmp_path / "other", fingerprint="f2")
        other.finish()
        shutil.copy(other.path / path.name, path)
    with pytest.raises(DamagedOutputError, match=path.name):
        finish(job.folder, job.manifest)
    assert not job.folder.success.exists()


def test_roll_up_that_died_is_finished(tmp_path: Path) -> None:
    """A part that is there with some of its segments gone is kept, and the others go."""
    job = SmallJob(tmp_path)
    for positions in ([0], [1], [2]):
        job.commit(0, positions)
    job.commit(1)
    copy = tmp_path / "copy"
    shutil.copytree(job.folder.segments, copy)
    info = roll_up(job.folder, job.manifest, 0)
    for name in (segment_name(0, 0), segment_name(0, 1)):
        shutil.copy(copy / name, job.folder.segments / name)
    assert roll_up(job.folder, job.manifest, 0) == info
    assert _names(job.folder.segments) == []


@pytest.mark.parametrize("who", ["roll-up", "sweep"])
def test_part_is_durable_before_its_segments_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """A part found after a death may not have reached the disk; a power cut must not lose both."""
    job = SmallJob(tmp_path)
    job.commit(0)
    job.commit(1)
    shutil.copytree(job.folder.segments, tmp_path / "copy")
    roll_up(job.folder, job.manifest, 0)
    shutil.copytree(tmp_path / "copy", job.folder.segments, dirs_exist_ok=True)
    steps: list[str] = []
    fsync, unlink = os.fsync, os.unlink

    def recorded_fsync(descriptor: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recorded_unlink(path: Path, **more: object) -> None:
        steps.append("unlink")
        unlink(path, **more)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "unlink", recorded_unlink)
    if who == "sweep":
        job.ledger.sweep()
    else:
        roll_up(job.folder, job.manifest, 0)
    assert steps == [str(job.path), "unlink", "unlink"]


def test_incomplete_part_is_not_put_together(tmp_path: Path) -> None:
    """A part without all its rows is not published."""
    job = SmallJob(tmp_path)
    job.commit(0)
    job.commit(1, [0])
    with pytest.raises(DamagedOutputError, match="lacks 2 rows of shard 1"):
        roll_up(job.folder, job.manifest, 0)
    assert _names(job.path) == [".shardmill"]
    assert _names(job.folder.segments) == [segment_name(0, 0), segment_name(1, 0)]


def _replace_segment(job: SmallJob, change: str) -> None:
    """Puts a segment with a good footer and other rows in the place of shard 1's."""
    path = job.folder.segments / segment_name(1, 0)
    with pq.ParquetFile(path) as file:
        facts, table = facts_of(file).decode(), file.read()
    if change == "order":
        table = table.take([1, 0, 2])
    elif change == "column":
        table = table.rename_columns(["m", *table.column_names[1:]])
    elif change == "other rows":
        table = pa.concat_tables([table.slice(0, 2), table.slice(0, 1)])
    else:
        facts = facts.replace('"f1"', '"f2"')
    write_parquet(path, table.schema, [table], facts)


@pytest.mark.parametrize("change", ["order", "column", "other rows", "fingerprint"])
def test_wrong_segment_does_not_get_in(tmp_path: Path, change: str) -> None:
    """Rows are compared with the plan while they stream; a wrong one is named and kept out."""
    job = SmallJob(tmp_path)
    job.commit(0)
    job.commit(1)
    _replace_segment(job, change)
    with pytest.raises(DamagedOutputError, match=segment_name(1, 0)):
        roll_up(job.folder, job.manifest, 0)
    assert _names(job.path) == [".shardmill"]
    assert _names(job.folder.tmp) == []
    assert len(_names(job.folder.segments)) == 2


def test_part_by_another_driver_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen driver's part that appears at the last moment is as good as ours."""
    job = SmallJob(tmp_path)
    job.commit(0)
    job.commit(1)
    publish = parts.publish

    def publish_second(temporary: Path, final: Path) -> None:
        shutil.copy(temporary, final)
        publish(temporary, final)

    monkeypatch.setattr(parts, "publish", publish_second)
    roll_up(job.folder, job.manifest, 0)
    assert job.output() == job.expected()[:6]
    assert _names(job.folder.segments) == _names(job.folder.tmp) == []


def test_torn_part_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the part is written is exit 73, and the segments stay."""
    job = SmallJob(tmp_path)
    job.commit(0)
    job.commit(1)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OutputError, match="No space left"):
        roll_up(job.folder, job.manifest, 0)
    assert _names(job.path) == [".shardmill"]
    assert _names(job.folder.tmp) == []
    assert len(_names(job.folder.segments)) == 2


def test_state_does_not_offer_an_unfinished_part(tmp_path: Path) -> None:
    """A part is ready, and told once, when the last of its shards is; the shorter last part too."""
    job = SmallJob(tmp_path)
    state = JobState(job.manifest)
    ready = []
    for shard in (0, 4, 3, 2, 1):
        state.add([job.commit(shard)])
        ready.append(state.take_ready_parts())
    assert ready == [[], [2], [], [1], [0]]
    assert state.totals != Totals()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    """A finished job with a converted input in its hidden folder."""
    job = SmallJob(tmp_path_factory.mktemp("finished"), num_samples=2)
    pq.write_table(pa.table({"hidden": [1]}), job.folder.input / "converted.parquet")
    job.finish()
    return job


@pytest.mark.parametrize("reader", ["pyarrow", "pandas", "duckdb", "polars"])
def test_others_read_the_folder(finished: SmallJob, reader: str) -> None:
    """Each reads the same rows, in order, and none of what is in the hidden folder."""
    read = {
        "pyarrow": lambda: pa.dataset.dataset(finished.path).to_table(),
        "pandas": lambda: pa.Table.from_pandas(pd.read_parquet(finished.path)),
        "duckdb": lambda: duckdb.sql(f"FROM '{finished.path}/*.parquet'").to_arrow_table(),
        "polars": lambda: pl.read_parquet(finished.path / "*.parquet").to_arrow(),
    }[reader]
    table = read()
    names = ["row_id", "sample_index", "n", "completion"]
    rows = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    assert rows == finished.expected()


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_the_folder(finished: SmallJob, tmp_path: Path, streaming: bool) -> None:
    """`load_dataset` takes the folder's path and nothing else."""
    loaded = datasets.load_dataset(
        str(finished.path), split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    rows = [(r["row_id"], r["sample_index"], r["n"], r["completion"]) for r in loaded]
    assert rows == finished.expected()
