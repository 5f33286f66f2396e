"""Run folders made ready, started, continued, refused, and moved aside."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.differences import MOST_LINES, differences
from jobs.ledger import Ledger
from jobs.lock import RunLock
from jobs.opening import check_output, open_or_create, prepare, set_aside
from pipeline.errors import (
    JobDiffersError,
    LockedError,
    OutputError,
)
from tests.run_folders import SmallJob, make_manifest

FILE = "input.file.in-0.parquet"
both = pytest.mark.parametrize("check", [prepare, check_output])
"""A run that only checks refuses what a run refuses."""


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


def test_another_limit_is_called_by_its_name(tmp_path: Path) -> None:
    """It is why files have other rows; where it is beyond them, it keeps nobody from going on."""
    rows = {FILE: "3 rows", "a": 1}
    job = SmallJob(tmp_path, (3,), job={"input": {"limit": 3}}, fingerprint_fields=rows)
    longer: dict[str, object] = {"job": {"input": {"limit": None}}}
    open_or_create(job.path, make_manifest(tmp_path / "input", [3], **longer))
    longer |= {"fingerprint": "f2", "fingerprint_fields": {FILE: "7 rows", "a": 2}}
    with pytest.raises(JobDiffersError) as caught:
        open_or_create(job.path, make_manifest(tmp_path / "input", [7], **longer))
    assert str(caught.value).splitlines()[1:] == ["  input.limit: 3 -> null", "  a: 1 -> 2"]


@pytest.mark.parametrize("limit", [3, 9])
def test_a_changed_file_is_not_laid_on_the_limit(tmp_path: Path, limit: int) -> None:
    """Another limit takes fewer rows of a file, or nothing away; it changes no byte of it."""
    rows = {FILE: "3 rows, d0"}
    job = SmallJob(tmp_path, (3,), job={"input": {"limit": limit}}, fingerprint_fields=rows)
    new = make_manifest(tmp_path / "input", [3], job={"input": {"limit": None}}, fingerprint="f2")
    changes = {"files": (new.files[0].model_copy(update={"digest": "d1"}),)}
    changes |= {"fingerprint_fields": {FILE: "3 rows, d1"}}
    with pytest.raises(JobDiffersError) as caught:
        open_or_create(job.path, new.model_copy(update=changes))
    assert str(caught.value).splitlines()[1:] == [f'  {FILE}: "3 rows, d0" -> "3 rows, d1"']


def test_a_new_file_is_not_laid_on_a_limit_that_is_not_reached(tmp_path: Path) -> None:
    """Without the limit, too, there would have been so many rows."""
    job = SmallJob(tmp_path, (3,), job={"input": {"limit": 9}}, fingerprint_fields={FILE: "d0"})
    fields = {FILE: "d0", "input.file.in-1.parquet": "d1"}
    changes: dict[str, object] = {"fingerprint": "f2", "fingerprint_fields": fields}
    new = make_manifest(tmp_path / "input", [3, 4], job={"input": {"limit": None}}, **changes)
    with pytest.raises(JobDiffersError) as caught:
        open_or_create(job.path, new)
    lines = str(caught.value).splitlines()[1:]
    assert lines == ['  input.file.in-1.parquet: (absent) -> "d1"']


def test_long_values_are_cut_around_the_change() -> None:
    """A change at the end of a long prompt is seen, and thousands of changes stay readable."""
    (line,) = differences({"t": "x" * 500 + " then"}, {"t": "x" * 500 + " now"})
    assert line.startswith('t: "…xxx')
    assert ' then"' in line
    assert ' now"' in line
    assert len(line) < 150
    assert line.count('"') == 4, "what is cut is a text still"
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


def test_a_folder_above_that_may_not_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Home folders often lie in one that users may pass through and not read."""
    run, is_open, open_ = tmp_path / "home" / "run", os.access, os.open
    run.mkdir(parents=True)

    def forbidden(path: Path, *args: int, **more: int) -> int:
        if path == run.parent:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_(path, *args, **more)

    monkeypatch.setattr(os, "access", lambda path, mode: path != run.parent and is_open(path, mode))
    monkeypatch.setattr(os, "open", forbidden)
    assert prepare(run).segments.is_dir()


def test_check_makes_nothing(tmp_path: Path) -> None:
    """A folder to be made, an empty one, a link to one and a run's own pass, unchanged."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    SmallJob(tmp_path).commit(0)
    before = sorted(tmp_path.rglob("*"))
    for name in ("a/b/c", "empty", "link", "run"):
        check_output(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


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
