"""What a retry writes: the chosen rows, in place, whatever happens in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.plan import MOST_SHARDS_IN_FLIGHT
from jobs.retries import read_retries, retry_folder, start_retry
from jobs.retry import shards_in_flight
from jobs.retry_ledger import RetryLedger
from jobs.status import read_status
from jobs.texts import status_text
from jobs.verify import verify
from pipeline.errors import DamagedOutputError, OutputError
from pipeline.records import Completion, FinishReason, Shard
from pipeline.segments import Totals, facts_of, write_parquet
from tests.retried import bad, commit, do_retry, good, make_retry, open_retry, read
from tests.run_folders import SmallJob
from tests.test_commits import Death, Mortal

FAILED = [(6, 0), (6, 1)]
"""Row and sample of what fails in a job of (7, 0, 4) rows with two samples."""


@pytest.fixture
def job(tmp_path: Path) -> SmallJob:
    """A finished job of 22 output rows in three parts; 2 of the first file failed."""
    job = SmallJob(tmp_path, num_samples=2)
    job.finish()
    return job


def _part_bytes(job: SmallJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(job.path.glob("part-*"))}


def _is_error(table: pa.Table) -> pa.ChunkedArray:
    return pa.compute.equal(table["finish_reason"], "error")


def _reasons(table: pa.Table) -> list[str]:
    return table["finish_reason"].to_pylist()


def test_failed_rows_are_swapped_in(job: SmallJob) -> None:
    """Only they change: every other row, the order and the files without one stay as they were."""
    before, files = read(job.path), _part_bytes(job)
    do_retry(job.ledger, make_retry())
    after = read(job.path)
    is_error = _is_error(before)
    assert after.filter(pa.compute.invert(is_error)).equals(
        before.filter(pa.compute.invert(is_error))
    )
    new = after.filter(is_error).select(["row_id", "sample_index", "n", "completion"]).to_pylist()
    assert [tuple(row.values()) for row in new] == [
        ("in-0.parquet#6", sample, 6, f"at last in-0.parquet#6/{sample}") for sample in (0, 1)
    ]
    assert after["row_id"].equals(before["row_id"])
    changed = [name for name, content in _part_bytes(job).items() if content != files[name]]
    assert changed == ["part-00001.parquet"]


@pytest.mark.parametrize("prefix", ["", "out_"])
def test_the_proof_goes_on_and_tells_of_it(tmp_path: Path, prefix: str) -> None:
    """`verify` and `status` pass after a retry, and name its rows, limit and what came of them."""
    job = SmallJob(tmp_path, num_samples=2, output_prefix=prefix)
    job.finish()
    do_retry(job.ledger, make_retry())
    report = verify(job.path)
    assert (report.state, report.damage, report.missing) == ("complete", [], [])
    assert report.attempts == {1: 20, 2: 2}
    assert report.totals == Totals(16, 6, 0, 220, 108)
    [note] = report.notes
    assert "generated 2 rows again, with max_new_tokens 8: stop 2, length 0, error 0" in note
    status = read_status(job.path)
    assert status.is_complete
    assert status.totals == report.totals
    [record] = status.retries
    assert record.result is not None
    assert record.result.totals == Totals(stop=2, num_prompt_tokens=20, num_completion_tokens=8)


def test_a_row_that_fails_again_is_an_error_row_with_one_more_attempt(job: SmallJob) -> None:
    """It has the new message; the next retry takes it up again, and each attempt is on record."""
    do_retry(job.ledger, make_retry(), bad)
    errors = read(job.path).filter(_is_error(read(job.path)))
    assert errors["error"].to_pylist() == ["test: failed again"] * 2
    assert verify(job.path).attempts == {1: 20, 2: 2}
    do_retry(job.ledger, make_retry(2, max_new_tokens=9))
    report = verify(job.path)
    assert report.attempts == {1: 20, 3: 2}
    assert report.totals.error == 0
    [info] = [info for info in job.ledger.parts() if info.retries]
    made = [(rows.retry, rows.max_new_tokens, rows.totals.error) for rows in info.retries]
    assert made == [(1, 8, 2), (2, 9, 0)]


def test_rows_are_chosen_by_their_finish_reason(job: SmallJob) -> None:
    """A retry of cut rows leaves errors and finished rows alone, in every part."""
    before = read(job.path)
    do_retry(job.ledger, make_retry(1, FinishReason.LENGTH))
    after = read(job.path)
    assert set(zip(_reasons(before), _reasons(after), strict=True)) == {
        ("stop", "stop"),
        ("error", "error"),
        ("length", "stop"),
    }
    assert verify(job.path).attempts == {1: 16, 2: 6}


def test_death_at_every_step(tmp_path: Path) -> None:
    """Wherever a retry dies: the output reads whole and is proved, and the same retry goes on.

    Before the death every row fails again and afterwards none does, so that what was put in before
    is known: it stays, and no row is generated for the output twice.
    """
    start = SmallJob(tmp_path / "start", rows=(14,), shard_rows=7, shards_per_part=1)
    start.finish()
    deaths, survived, num_put_in = 0, False, list[int]()
    while not survived:
        folder = tmp_path / str(deaths)
        shutil.copytree(tmp_path / "start", folder)
        job = SmallJob(folder, rows=(14,), shard_rows=7, shards_per_part=1)
        with pytest.MonkeyPatch.context() as patch:
            Mortal(patch, deaths)
            try:
                do_retry(job.ledger, make_retry(), bad)
                survived = True
            except Death:
                deaths += 1
        report = verify(job.path)
        assert (report.state, report.damage) == ("complete", []), deaths
        records = read_retries(job.folder)
        is_left = any(record.result is None for record in records)
        assert any("unfinished" in note for note in report.notes) == is_left
        before = read(job.path)
        assert before["n"].to_pylist() == list(range(14))
        num_put_in.append(before["error"].to_pylist().count("test: failed again"))
        if is_left or not records:
            do_retry(job.ledger, make_retry())
        report = verify(job.path)
        assert report.attempts == {1: 12, 2: 2}
        assert report.totals.error >= num_put_in[-1]
        assert read(job.path)["n"].to_pylist() == list(range(14))
        own = retry_folder(job.folder, 1)
        assert list(own.segments.iterdir()) == list(own.tmp.iterdir()) == []
        shutil.rmtree(folder)
    assert set(num_put_in) == {0, 1, 2}


def test_a_swap_is_durable_before_its_segments_go(
    job: SmallJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap found after a death may not have reached the disk; a power cut must not lose both."""
    with monkeypatch.context() as patch:
        patch.setattr("jobs.parts.remove_segments", lambda *_: None)
        do_retry(job.ledger, make_retry())
    ledger = open_retry(job.ledger, make_retry())
    assert len(list(ledger.folder.segments.iterdir())) == 1
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
    ledger.sweep()
    assert steps.index(str(job.path)) < steps.index("unlink")
    assert list(ledger.folder.segments.iterdir()) == []


def _swap_with(job: SmallJob, change: Callable[[RetryLedger, Path], None]) -> None:
    """A roll-up of the part with the failed rows, after a change to its segment."""
    ledger = open_retry(job.ledger, make_retry())
    [part] = ledger.chosen.parts
    shard = ledger.manifest.shard(2)
    commit(ledger, shard)
    [segment] = ledger.folder.segments.iterdir()
    change(ledger, segment)
    ledger.roll_up(part)


def _other_rows(ledger: RetryLedger, segment: Path) -> None:
    with pq.ParquetFile(segment) as file:
        facts, table = facts_of(file).decode(), file.read()
    write_parquet(segment, table.schema, [table.take([1, 0])], facts)


def _gone(ledger: RetryLedger, segment: Path) -> None:
    segment.unlink()


def _torn(ledger: RetryLedger, segment: Path) -> None:
    segment.write_bytes(segment.read_bytes()[:-1])


@pytest.mark.parametrize("change", [_other_rows, _gone, _torn])
def test_a_segment_that_does_not_fit_changes_nothing(
    job: SmallJob, change: Callable[[RetryLedger, Path], None]
) -> None:
    """Rows of other places, none at all, or half a file: the part that is there stays."""
    before = _part_bytes(job)
    with pytest.raises(DamagedOutputError, match="segments"):
        _swap_with(job, change)
    assert _part_bytes(job) == before


def test_rows_that_were_not_chosen_do_not_get_in(tmp_path: Path) -> None:
    """A segment that holds a good row's place too is refused, and the good row stays."""
    job = SmallJob(tmp_path)
    job.finish()
    before = _part_bytes(job)
    ledger = open_retry(job.ledger, make_retry(1, FinishReason.LENGTH))
    commit(ledger, ledger.base.manifest.shard(0))
    with pytest.raises(DamagedOutputError, match="holds 3 rows of shard 0, and not the 1"):
        ledger.roll_up(0)
    assert _part_bytes(job) == before


def test_a_full_disk_keeps_the_old_part(job: SmallJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written whole replaces nothing; the finished rows stay for the next time."""
    before = _part_bytes(job)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def fill(ledger: RetryLedger, segment: Path) -> None:
        monkeypatch.setattr(pq.ParquetWriter, "write_table", full)

    with pytest.raises(OutputError, match="No space left"):
        _swap_with(job, fill)
    assert _part_bytes(job) == before
    assert len(list(retry_folder(job.folder, 1).segments.iterdir())) == 1
    assert list(retry_folder(job.folder, 1).tmp.iterdir()) == []


def test_a_part_from_a_backup_is_told(job: SmallJob) -> None:
    """A part as it was before the retry is whole, and that the retry's rows are gone is told."""
    old = _part_bytes(job)["part-00001.parquet"]
    do_retry(job.ledger, make_retry())
    (job.path / "part-00001.parquet").write_bytes(old)
    report = verify(job.path)
    assert report.state == "complete"
    assert report.notes == [
        "retry 1 put in 2 rows, and the parts name 0: parts were put back or made anew since"
    ]


def test_retried_rows_that_a_part_does_not_have_are_damage(job: SmallJob) -> None:
    """A footer that names rows beyond the part's end is not believed."""
    do_retry(job.ledger, make_retry())
    path = job.path / "part-00001.parquet"
    with pq.ParquetFile(path) as file:
        facts, table = facts_of(file).decode(), file.read()
    write_parquet(path, table.schema, [table], facts.replace("[[0,2]]", "[[0,99]]"))
    report = verify(job.path)
    assert report.state == "damaged"
    assert "retried rows" in report.damage[0]


@pytest.mark.parametrize("name", ["retry.json", "result.json"])
def test_a_damaged_record_is_named(job: SmallJob, name: str) -> None:
    """Half a record is no record; the rows are still checked."""
    do_retry(job.ledger, make_retry())
    (retry_folder(job.folder, 1).root / name).write_text("{")
    with pytest.raises(DamagedOutputError, match=name):
        read_retries(job.folder)
    report = verify(job.path)
    assert [name in line for line in report.damage] == [True]
    assert report.totals.num_completions == 22


def test_retries_are_listed_by_number(job: SmallJob) -> None:
    """The tenth comes after the second."""
    for number in (10, 2, 1):
        do_retry(job.ledger, make_retry(number), good)
    assert [record.retry.number for record in read_retries(job.folder)] == [1, 2, 10]


def test_an_error_never_takes_the_place_of_an_answer(job: SmallJob) -> None:
    """A cut completion stays if its row fails with more room; the attempt counts all the same."""
    before = read(job.path)

    def answer(shard: Shard, row: int, sample: int) -> Completion:
        return (bad if row == 1 else good)(shard, row, sample)

    do_retry(job.ledger, make_retry(1, FinishReason.LENGTH, FinishReason.ERROR), answer)
    after = read(job.path)
    pairs = list(zip(_reasons(before), _reasons(after), strict=True))
    assert set(pairs) == {("stop", "stop"), ("error", "stop"), ("length", "length")}
    kept = pa.compute.not_equal(after["finish_reason"], "stop")
    assert after.filter(kept).equals(before.filter(kept))
    report = verify(job.path)
    assert report.state == "complete"
    assert report.attempts == {1: 14, 2: 8}
    assert "length 6, error 0" in report.notes[0]


def test_sparse_shards_fill_a_batch_together(job: SmallJob) -> None:
    """Two chosen rows in one shard, then six in three: as many shards as make two batches."""
    one = open_retry(job.ledger, make_retry())
    assert [shards_in_flight(one, size) for size in (1, 2, 32)] == [2, 2, 32]
    three = open_retry(job.ledger, make_retry(2, FinishReason.LENGTH))
    assert shards_in_flight(three, 1000) == MOST_SHARDS_IN_FLIGHT


def test_status_lists_retries_for_people(job: SmallJob) -> None:
    """One line each: what was asked for and what came of it, or how to go on."""
    do_retry(job.ledger, make_retry())
    start_retry(job.folder, make_retry(2, FinishReason.LENGTH))
    lines = status_text(read_status(job.path)).splitlines()
    first, second = [line for line in lines if "retry" in line]
    assert first.startswith("  retry 1      error with max_new_tokens 8")
    assert first.endswith("stop 2, length 0, error 0")
    assert "not finished; `shardmill retry` on this folder goes on with it" in second
