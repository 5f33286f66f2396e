"""Tests of `jobs.ledger`, and of the manifest, state and status it is made of."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.differences import MOST_LINES, differences
from jobs.ledger import Ledger, check_output, open_or_create, prepare, set_aside
from jobs.lock import RunLock
from jobs.parts import roll_up
from jobs.status import read_status
from jobs.tally import Stamp, stamp_of
from pipeline.errors import (
    DamagedOutputError,
    InputError,
    JobDiffersError,
    LockedError,
    OutputError,
)
from pipeline.records import Shard
from pipeline.segments import Totals, segment_name
from tests.run_folders import SmallJob, make_manifest

both = pytest.mark.parametrize("check", [prepare, check_output])
"""A run that only checks refuses what a run refuses."""


def test_shards_cover_the_files_in_order(tmp_path: Path) -> None:
    """Every row of every file is in exactly one shard; files without rows have none."""
    manifest = make_manifest(tmp_path, [0, 7, 0, 3, 1, 0], shard_rows=3)
    shards = [manifest.shard(index) for index in range(manifest.num_shards)]
    assert [(s.index, s.name, s.first_row, s.num_rows) for s in shards] == [
        (0, "in-1.parquet", 0, 3),
        (1, "in-1.parquet", 3, 3),
        (2, "in-1.parquet", 6, 1),
        (3, "in-3.parquet", 0, 3),
        (4, "in-4.parquet", 0, 1),
    ]
    assert [list(manifest.part_shards(part)) for part in range(manifest.num_parts)] == [
        [0, 1],
        [2, 3],
        [4],
    ]
    assert [manifest.part_of(shard) for shard in range(5)] == [0, 0, 1, 1, 2]


def test_plan_of_a_large_input(tmp_path: Path) -> None:
    """A hundred million rows in two thousand files are planned without listing their shards."""
    file = make_manifest(tmp_path, [1]).files[0]
    files = [file.model_copy(update={"num_rows": 50_000, "name": str(i)}) for i in range(2000)]
    manifest = make_manifest(tmp_path, [1], files=tuple(files), shard_rows=512, num_samples=2)
    assert (manifest.num_rows, manifest.num_completions) == (100_000_000, 200_000_000)
    assert manifest.num_shards == 98 * 2000
    assert manifest.shard(195_999) == Shard(195_999, file.path, "1999", 97 * 512, 336)


def test_part_names_sort_like_parts(tmp_path: Path) -> None:
    """Names are as wide as the last part's, and at least five digits."""
    manifest = make_manifest(tmp_path, [4])
    assert manifest.part_name(0) == "part-00000.parquet"
    file = manifest.files[0].model_copy(update={"num_rows": 200_000})
    manifest = make_manifest(tmp_path, [4], files=(file,), shard_rows=1, shards_per_part=1)
    assert manifest.part_name(7) == "part-000007.parquet"


def test_new_folder_can_be_opened(tmp_path: Path) -> None:
    """What was written is what is read, schema included."""
    job = SmallJob(tmp_path)
    opened = Ledger.open(job.path)
    assert opened.manifest == job.manifest
    assert opened.manifest.arrow_schema.equals(job.manifest.arrow_schema, check_metadata=True)


def test_continued_folder_keeps_its_plan_and_takes_new_paths(tmp_path: Path) -> None:
    """Commits depend on the shard size they were made with; inputs may have been moved."""
    job = SmallJob(tmp_path)
    moved = make_manifest(tmp_path / "elsewhere", [7, 0, 4], shard_rows=5, shards_per_part=9)
    manifest = open_or_create(job.path, moved).manifest
    assert (manifest.shard_rows, manifest.shards_per_part) == (3, 2)
    assert Path(manifest.shard(0).path).parent == tmp_path / "elsewhere"


def test_other_job_is_refused_with_a_diff(tmp_path: Path) -> None:
    """A resume under another setting names each, and what to do."""
    job = SmallJob(tmp_path, fingerprint_fields={"a.b": 1, "same": 2, "gone": "x"})
    other = make_manifest(
        tmp_path / "input",
        [7, 0, 4],
        fingerprint="f2",
        fingerprint_fields={"a.b": None, "same": 2, "new": ["é"]},
    )
    with pytest.raises(JobDiffersError) as caught:
        open_or_create(job.path, other)
    message = str(caught.value)
    assert "--fresh" in message
    assert "--output" in message
    assert message.splitlines()[1:] == [
        "  a.b: 1 -> null",
        '  gone: "x" -> (absent)',
        '  new: (absent) -> ["é"]',
    ]


def test_files_in_another_order_are_another_job(tmp_path: Path) -> None:
    """Positions mean rows only while the files keep their order, whatever the fingerprint says."""
    job = SmallJob(tmp_path)
    files = tuple(reversed(job.manifest.files))
    with pytest.raises(JobDiffersError, match=r"in-0\.parquet"):
        open_or_create(job.path, make_manifest(tmp_path / "input", [7, 0, 4], files=files))


def test_long_values_are_cut_around_the_change() -> None:
    """A change at the end of a long prompt is seen, and thousands of changes stay readable."""
    (line,) = differences({"t": "x" * 500 + " then"}, {"t": "x" * 500 + " now"})
    assert line.startswith("t: …xxx")
    assert ' then"' in line
    assert ' now"' in line
    assert len(line) < 150
    lines = differences({str(i): 0 for i in range(100)}, {})
    assert len(lines) == MOST_LINES + 1
    assert lines[-1] == "… and 80 more"


@both
def test_folder_with_something_else_is_refused(
    tmp_path: Path, check: Callable[[Path], object]
) -> None:
    """Nothing is written among a user's own files, hidden ones included."""
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / ".git").mkdir()
    with pytest.raises(OutputError, match=r"'\.git', 'thesis\.tex'.*--output"):
        check(tmp_path)
    assert not (tmp_path / ".shardmill").exists()


@both
def test_lost_manifest_is_no_new_folder(tmp_path: Path, check: Callable[[Path], object]) -> None:
    """A folder with output but no manifest is not started over."""
    job = SmallJob(tmp_path)
    job.finish()
    job.folder.manifest.unlink()
    with pytest.raises(OutputError, match=r"'_SUCCESS', 'part-00000\.parquet'"):
        check(job.path)


def test_death_before_the_manifest(tmp_path: Path) -> None:
    """What a run leaves that dies before its manifest is taken over by the next."""
    run = prepare(tmp_path / "run")
    with RunLock(run.root):
        (run.input / "converted.parquet").write_text("")
    (run.internal / "manifest.json.abc.tmp").write_text("{")
    (run.internal / "logs").rmdir()
    job = SmallJob(tmp_path)
    job.finish()
    assert job.output() == job.expected()
    assert not (run.internal / "manifest.json.abc.tmp").exists()


@both
def test_file_in_place_of_the_folder(tmp_path: Path, check: Callable[[Path], object]) -> None:
    """A plain file, or one among the parents, is named."""
    (tmp_path / "f").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check(tmp_path / "f")
    with pytest.raises(OutputError, match="Not a directory"):
        check(tmp_path / "f" / "run")


def test_link_to_a_folder_to_be_made(tmp_path: Path) -> None:
    """An output that is a link to scratch space is made there."""
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    SmallJob(tmp_path).finish()
    assert (tmp_path / "scratch" / "_SUCCESS").exists()


@both
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission(tmp_path: Path, check: Callable[[Path], object]) -> None:
    """A folder that cannot be written is told apart from a bug."""
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"Permission denied.*writable"):
        check(tmp_path / "run")


@pytest.mark.parametrize("depth", [".", "run", "run/.shardmill/segments"])
def test_check_asks_for_write_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: str
) -> None:
    """What is there of the folder, or of its parents, must be writable, its inner folders too."""
    locked = tmp_path / depth
    locked.mkdir(parents=True, exist_ok=True)
    check_output(tmp_path / "run")
    monkeypatch.setattr(os, "access", lambda path, _: path != locked)
    with pytest.raises(OutputError, match=r"Permission denied.*writable"):
        check_output(tmp_path / "run")


def test_check_makes_nothing(tmp_path: Path) -> None:
    """A folder to be made, an empty one, a link to one and a run's own pass, unchanged."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    SmallJob(tmp_path).commit(0)
    before = sorted(tmp_path.rglob("*"))
    for name in ("a/b/c", "empty", "link", "run"):
        check_output(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_of_a_newer_version(tmp_path: Path) -> None:
    """Another layout is not guessed at, whatever else its manifest holds."""
    job = SmallJob(tmp_path)
    job.folder.manifest.write_text(json.dumps({"format_version": 2, "unknown": 1}))
    with pytest.raises(OutputError, match="layout 2"):
        Ledger.open(job.path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "\ufffd{"])
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    """A torn or edited manifest is named."""
    job = SmallJob(tmp_path)
    job.folder.manifest.write_text(text)
    with pytest.raises(DamagedOutputError, match=r"manifest\.json' is damaged.*--fresh"):
        Ledger.open(job.path)


def test_no_run_folder(tmp_path: Path) -> None:
    """Looking at another folder says so and creates nothing."""
    with pytest.raises(InputError, match="no output folder of Shardmill"):
        Ledger.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scan_finds_what_is_done(tmp_path: Path) -> None:
    """Shards are complete, partly committed or untouched; parts stand for their shards."""
    job = SmallJob(tmp_path, rows=(14,))  # 5 shards in 3 parts
    done = [job.commit(shard).totals for shard in (0, 1, 3)]
    roll_up(job.folder, job.manifest, 0)
    half = job.commit(2, [1])
    state = job.ledger.scan()
    assert list(state.pending()) == [2, 4]
    assert [state.is_complete(shard) for shard in range(5)] == [True, True, False, True, False]
    assert (state.num_shards_done, state.num_parts_done) == (3, 1)
    assert state.totals == sum(done, half.totals)
    assert state.take_ready_parts() == []


def test_state_keeps_up_with_commits(tmp_path: Path) -> None:
    """What is told as it happens gives what a later scan gives, also when told twice."""
    job = SmallJob(tmp_path)
    state = job.ledger.scan()
    infos = [job.commit(0, [1]), job.commit(0), job.commit(1)]
    state.add(infos[:1])
    assert state.totals == infos[0].totals
    state.add(infos)
    state.add(infos)
    assert state.totals == job.ledger.scan().totals == sum((i.totals for i in infos), Totals())
    assert state.take_ready_parts() == [0]
    roll_up(job.folder, job.manifest, 0)
    state.mark_part(0)
    assert state.take_ready_parts() == []
    assert list(state.pending()) == list(job.ledger.scan().pending()) == [2, 3, 4]


def test_scan_opens_no_segment_of_a_published_part(tmp_path: Path) -> None:
    """A resume costs footers of what is unfinished only; a late zombie's file harms nothing."""
    job = SmallJob(tmp_path)
    for shard in (0, 1):
        job.commit(shard)
    roll_up(job.folder, job.manifest, 0)
    zombie = job.folder.segments / segment_name(1, 0)
    zombie.write_text("torn")
    assert job.ledger.scan().num_parts_done == 1
    job.ledger.sweep()
    assert not zombie.exists()


@pytest.mark.parametrize("fault", ["gap", "fingerprint", "shard", "part"])
def test_scan_refuses_what_does_not_belong(tmp_path: Path, fault: str) -> None:
    """A lost commit, and segments and parts of another job, are named."""
    job = SmallJob(tmp_path)
    job.commit(0, [0])
    job.commit(0, [1])
    first, second = (job.folder.segments / segment_name(0, commit) for commit in (0, 1))
    culprit = first
    if fault == "gap":
        first.unlink()
    elif fault == "fingerprint":
        first.unlink()
        SmallJob(tmp_path / "other", fingerprint="f2").commit(0, [0])
        os.link(tmp_path / "other/run/.shardmill/segments" / first.name, first)
    elif fault == "shard":
        culprit = second.rename(job.folder.segments / segment_name(77, 0))
    else:
        other = SmallJob(tmp_path / "other", fingerprint="f2")
        other.finish()
        culprit = (other.path / "part-00000.parquet").rename(job.path / "part-00000.parquet")
    with pytest.raises(DamagedOutputError, match=culprit.name):
        job.ledger.scan()


def test_sweep_keeps_what_counts(tmp_path: Path) -> None:
    """Only temporary files go."""
    job = SmallJob(tmp_path)
    job.commit(0)
    (job.folder.tmp / "000000001.abc.parquet").write_text("torn")
    job.ledger.sweep()
    assert list(job.folder.tmp.iterdir()) == []
    assert [path.name for path in job.folder.segments.iterdir()] == [segment_name(0, 0)]
    assert job.folder.manifest.exists()


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    """Nothing is deleted, and the place is free for another job; also twice in a second."""
    job = SmallJob(tmp_path)
    job.finish()
    old = set_aside(job.path)
    assert old is not None
    assert old.name.startswith("run.old-")
    assert (old / "_SUCCESS").exists()
    SmallJob(tmp_path, fingerprint="f2")
    assert set_aside(job.path) not in (None, old)
    assert set_aside(job.path) is None


def test_fresh_leaves_a_running_job_alone(tmp_path: Path) -> None:
    """A folder in use is not moved from under its run."""
    job = SmallJob(tmp_path)
    with RunLock(job.path), pytest.raises(LockedError):
        set_aside(job.path)
    assert job.folder.manifest.exists()


def test_fresh_leaves_other_folders_alone(tmp_path: Path) -> None:
    """`--fresh` on a folder that is not ours moves nothing; `prepare` then refuses it."""
    (tmp_path / "thesis.tex").write_text("")
    assert set_aside(tmp_path) is None
    assert (tmp_path / "thesis.tex").exists()


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


def test_unknown_field_in_the_manifest(tmp_path: Path) -> None:
    """An unknown field of the same layout is damage, not something to pass over."""
    job = SmallJob(tmp_path)
    fields = json.loads(job.folder.manifest.read_text())
    job.folder.manifest.write_text(json.dumps(fields | {"extra": 1}))
    with pytest.raises(DamagedOutputError, match="damaged"):
        Ledger.open(job.path)
