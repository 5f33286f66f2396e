"""Tests of `jobs.verify`."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.lock import RunLock
from jobs.parts import roll_up
from jobs.verify import verify
from pipeline.errors import DamagedOutputError, InputError, LockedError, OutputError
from pipeline.segments import Totals, facts_of, segment_name, write_parquet
from tests.closed import close
from tests.run_folders import SmallJob, flip_byte, make_manifest, make_noise


@pytest.fixture
def job(tmp_path: Path) -> SmallJob:
    """A finished job."""
    job = SmallJob(tmp_path, num_samples=2)
    job.finish()
    return job


@pytest.mark.parametrize("prefix", ["", "out_"])
def test_finished_job_is_proved(tmp_path: Path, prefix: str) -> None:
    """A whole folder is complete, with its counts and nothing to remark."""
    job = SmallJob(tmp_path, num_samples=2, output_prefix=prefix)
    job.finish()
    report = verify(job.path)
    assert (report.state, report.damage, report.missing, report.notes) == ("complete", [], [], [])
    assert (report.num_rows, report.num_samples, report.num_completions) == (11, 2, 22)
    assert report.totals == Totals(14, 6, 2, 200, 100)


def test_unfinished_job_is_incomplete_and_not_damaged(tmp_path: Path) -> None:
    """What is yet to do is told for each part; what is there is checked all the same."""
    job = SmallJob(tmp_path)
    for shard in (0, 1, 2):
        job.commit(shard)
    job.commit(3, [1])
    roll_up(job.folder, job.manifest, 0)
    report = verify(job.path)
    assert report.state == "incomplete"
    assert report.damage == []
    assert [line.split(";")[1] for line in report.missing] == [
        " 2 of its rows are not generated yet",
        " 1 of its rows are not generated yet",
    ]
    assert report.totals.num_completions == 8


def test_parts_without_the_last_mark(job: SmallJob) -> None:
    """A run that died just before `_SUCCESS` is incomplete."""
    job.folder.success.unlink()
    report = verify(job.path)
    assert report.state == "incomplete"
    assert "_SUCCESS" in report.missing[0]


def _rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a file's rows and leaves its footer's facts."""
    with pq.ParquetFile(path) as file:
        facts, table = facts_of(file).decode(), file.read()
    table = change(table)
    write_parquet(path, table.schema, [table], facts)


def _set(name: str, values: dict[int, object]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        column = table[name].to_pylist()
        for row, value in values.items():
            column[row] = value
        index = table.schema.get_field_index(name)
        field = table.schema.field(name)
        return table.set_column(index, field, pa.array(column, field.type))

    return change


def _doubled(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 1), table.slice(0, table.num_rows - 1)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_doubled, "row 1 is sample 0 of 'in-0.parquet#0' instead of 1 of 'in-0.parquet#0'"),
        (lambda table: table.slice(1), "11 rows instead of 12"),
        (lambda table: table.take([2, 3, 0, 1, *range(4, 12)]), "row 0 is sample 0 of"),
        (lambda table: table.drop_columns(["n"]), "columns"),
        (_set("finish_reason", {1: "gone"}), "row 1 has finish_reason 'gone'"),
        (_set("finish_reason", {3: None}), "row 3 has finish_reason None"),
        (_set("completion", {2: None}), "wrong completion"),
        (_set("error", {2: "x: y"}), "wrong error"),
        (_set("finish_reason", {0: "length"}), "counts"),
        (_set("num_prompt_tokens", {0: 11}), "counts"),
    ],
)
def test_changed_rows_are_found(
    job: SmallJob, change: Callable[[pa.Table], pa.Table], told: str
) -> None:
    """Rows that are doubled, lost, moved or untrue are found though the footer is as it was."""
    _rewrite(job.path / "part-00000.parquet", change)
    report = verify(job.path)
    assert report.state == "damaged"
    assert len(report.damage) == 1
    assert told in report.damage[0]
    assert "part-00000.parquet" in report.damage[0]


def test_flipped_bytes_are_found(job: SmallJob) -> None:
    """A byte changed in any column, the input's included, names the file."""
    path = job.path / "part-00000.parquet"
    content = path.read_bytes()
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
    for column, name in enumerate(job.manifest.arrow_schema.names):
        path.write_bytes(content)
        pages = group.column(column)
        first = pages.dictionary_page_offset or pages.data_page_offset
        flip_byte(path, first + pages.total_compressed_size // 2)
        report = verify(job.path)
        assert report.state == "damaged", name
        assert path.name in report.damage[0]
    path.write_bytes(content)
    flip_byte(path, content.index(make_noise(1)))  # no error but for the checksum
    assert verify(job.path).state == "damaged"


@pytest.mark.parametrize("fault", ["cut", "empty", "alien", "swapped", "other job"])
def test_wrong_files_are_named(job: SmallJob, tmp_path: Path, fault: str) -> None:
    """A part that is torn, or is not the one that belongs there, is named; others still count."""
    path = job.path / "part-00001.parquet"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "alien":
        shutil.copy(job.manifest.files[0].path, path)
    elif fault == "swapped":
        shutil.copy(job.path / "part-00000.parquet", path)
    else:
        other = SmallJob(tmp_path / "other", num_samples=2, fingerprint="f2")
        other.finish()
        shutil.copy(other.path / path.name, path)
    report = verify(job.path)
    assert report.state == "damaged"
    assert path.name in report.damage[0]
    assert report.totals.num_completions == 22 - 8


def test_a_part_that_cannot_be_read_is_no_finding(
    job: SmallJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no proof then, neither that the folder is whole nor that it is damaged."""
    real = pq.ParquetFile

    def refused(path: Path, **more: object) -> pq.ParquetFile:
        if path.name == "part-00001.parquet":
            raise OSError(errno.EIO, "Error reading bytes from file")
        return real(path, **more)

    monkeypatch.setattr(pq, "ParquetFile", refused)
    with pytest.raises(OutputError, match=r"part-00001\.parquet' cannot be read: Input/output"):
        verify(job.path)


def test_a_copy_without_its_empty_folders(job: SmallJob) -> None:
    """Object stores, git and the hub keep no empty folders; the proof needs none."""
    for folder in (job.folder.segments, job.folder.tmp):
        folder.rmdir()
    report = verify(job.path)
    assert (report.state, report.notes) == ("complete", [])


def test_strangers(job: SmallJob) -> None:
    """A Parquet file that readers would take in is damage; another file is only worth a note."""
    (job.path / "more").mkdir()
    shutil.copy(job.manifest.files[0].path, job.path / "more" / "x.parquet")
    (job.path / "report.html").write_text("")
    (job.path / ".ipynb_checkpoints").mkdir()
    report = verify(job.path)
    assert [str(job.path / "more" / "x.parquet") in line for line in report.damage] == [True]
    assert ["report.html" in line for line in report.notes] == [True]


def test_missing_part_after_success(job: SmallJob) -> None:
    """A part that went after the job was done is damage, not work to do."""
    (job.path / "part-00002.parquet").unlink()
    report = verify(job.path)
    assert report.state == "damaged"
    assert "_SUCCESS" in report.damage[0]
    assert "part-00002" in report.missing[0]


@pytest.mark.parametrize("fault", ["torn", "rows", "gap", "name", "shard", "fingerprint"])
def test_wrong_segments_are_named(tmp_path: Path, fault: str) -> None:
    """What a run left unfinished is checked as well."""
    job = SmallJob(tmp_path)
    job.commit(0)
    job.commit(1, [0])
    culprit = job.folder.segments / segment_name(1, 0)
    if fault == "torn":
        culprit.write_bytes(culprit.read_bytes()[:-1])
    elif fault == "rows":
        _rewrite(culprit, _set("row_id", {0: "in-0.parquet#4"}))
    elif fault == "fingerprint":
        other = SmallJob(tmp_path / "other", fingerprint="f2")
        other.commit(1, [0])
        shutil.copy(other.folder.segments / culprit.name, culprit)
    else:
        names = {"gap": segment_name(1, 1), "name": "note.txt", "shard": segment_name(99, 0)}
        culprit = culprit.rename(job.folder.segments / names[fault])
    report = verify(job.path)
    assert report.state == "damaged"
    assert len(report.damage) == 1
    assert culprit.name in report.damage[0]


def test_inputs_that_are_gone_or_changed(job: SmallJob) -> None:
    """The proof needs no input; that it is no longer what it was is worth a note."""
    gone, changed = Path(job.manifest.files[0].path), Path(job.manifest.files[2].path)
    gone.unlink()
    with changed.open("ab") as file:
        file.write(b"more")
    report = verify(job.path)
    assert report.state == "complete"
    assert [note.split("' ")[1] for note in report.notes] == [
        "is gone",
        "has changed since the job was started",
    ]


def test_inputs_that_are_closed_to_us(job: SmallJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever verifies need not be allowed to see the input."""
    close(Path(job.manifest.files[0].path).parent, monkeypatch)
    report = verify(job.path)
    assert report.state == "complete"
    assert ["cannot be looked at: Permission denied" in note for note in report.notes] == [True] * 3


@pytest.fixture
def staged_job(tmp_path: Path) -> SmallJob:
    """A finished job whose first input was converted into the run folder; its size was another."""
    file = make_manifest(tmp_path / "input", [4]).files[0]
    staged = tmp_path / "run/.shardmill/input/0123456789abcdef/000000.parquet"
    staged.parent.mkdir(parents=True)
    shutil.copy(file.path, staged)
    file = file.model_copy(update={"path": str(staged), "size": file.size + 1})
    job = SmallJob(tmp_path, files=(file,))
    job.finish()
    return job


def test_relative_folder(staged_job: SmallJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the folder is named, what was converted into it is not taken for the user's file."""
    monkeypatch.chdir(staged_job.path.parent)
    assert verify(Path("run")).notes == []
    monkeypatch.chdir(staged_job.path)
    assert verify(Path()).notes == []
    Path("part-00000.parquet").write_bytes(b"")
    assert f"'{staged_job.path / 'part-00000.parquet'}'" in verify(Path()).damage[0]


def test_moved_folder(staged_job: SmallJob, tmp_path: Path) -> None:
    """What was converted into the folder moves with it; it is missed where it is now."""
    moved = staged_job.path.rename(tmp_path / "moved")
    assert verify(moved).notes == []
    (staged,) = (moved / ".shardmill/input").glob("*/*.parquet")
    staged.unlink()
    assert verify(moved).notes == [f"input '{staged}' is gone"]


def test_verify_changes_nothing(job: SmallJob) -> None:
    """Not a file is touched, so that a read-only copy can be verified."""
    before = {path: path.stat().st_mtime_ns for path in job.path.rglob("*")}
    verify(job.path)
    assert {path: path.stat().st_mtime_ns for path in job.path.rglob("*")} == before


def test_running_job_is_left_alone(job: SmallJob) -> None:
    """A folder that changes underneath cannot be proved; who works there is told."""
    with RunLock(job.path), pytest.raises(LockedError, match=str(os.getpid())):
        verify(job.path)


def test_nothing_to_check_against(job: SmallJob, tmp_path: Path) -> None:
    """Without a manifest there is no proof."""
    with pytest.raises(InputError):
        verify(tmp_path)
    job.folder.manifest.write_text("{")
    with pytest.raises(DamagedOutputError):
        verify(job.path)
