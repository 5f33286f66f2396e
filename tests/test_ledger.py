"""Tests of `jobs.ledger`, and of the state that it finds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from jobs.ledger import Ledger
from jobs.manifest import Manifest
from jobs.parts import PartInfo, finish, read_part, roll_up
from pipeline.errors import (
    DamagedOutputError,
    OutputError,
)
from pipeline.folder import RunFolder
from pipeline.segments import Totals, segment_name
from tests.closed import close
from tests.run_folders import SmallJob


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


def test_sweep_beside_a_late_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file may be gone by the time it is to be removed: its writer was alive."""
    job, unlink = SmallJob(tmp_path), os.unlink
    (job.folder.tmp / "000000001.abc.parquet").write_text("torn")

    def second(path: Path, **more: object) -> None:
        with suppress(FileNotFoundError):
            unlink(path)
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", second)
    job.ledger.sweep()
    assert list(job.folder.tmp.iterdir()) == []


@pytest.mark.parametrize("fault", ["torn", "foreign"])
@pytest.mark.parametrize("is_noted", [True, False])
def test_sweep_keeps_what_a_bad_part_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, is_noted: bool
) -> None:
    """A file of a part's name is no part: the rows are still there when it is moved away."""
    job = SmallJob(tmp_path)
    job.commit_all()
    with monkeypatch.context() as patch:
        patch.setattr("jobs.parts.remove_segments", lambda *_: None)
        info = roll_up(job.folder, job.manifest, 0)
    if is_noted:
        job.ledger.note(info)
    segments, part = sorted(job.folder.segments.iterdir()), job.path / "part-00000.parquet"
    if fault == "torn":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        shutil.copy(job.manifest.files[0].path, part)
    with pytest.raises(DamagedOutputError, match=r"part-00000\.parquet.*move it away"):
        job.ledger.sweep()
    assert sorted(job.folder.segments.iterdir()) == segments
    part.unlink()
    job.finish()
    assert job.output() == job.expected()


@pytest.mark.parametrize(("noted", "opened"), [((), [0]), ((0,), [])])
def test_sweep_opens_few_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: tuple[int, ...], opened: list[int]
) -> None:
    """Only those that have segments left and are not known, however many parts there are."""
    job, found = SmallJob(tmp_path), list[int]()
    job.finish()
    for part in noted:
        job.ledger.note(read_part(job.folder, job.manifest, part))
    job.commit(0)

    def recorded(folder: RunFolder, manifest: Manifest, part: int) -> PartInfo:
        found.append(part)
        return read_part(folder, manifest, part)

    monkeypatch.setattr("jobs.ledger.read_part", recorded)
    job.ledger.sweep()
    assert found == opened
    assert list(job.folder.segments.iterdir()) == []


@pytest.mark.parametrize(
    "look",
    [
        lambda job: job.ledger.is_complete,
        lambda job: job.ledger.scan(),
        lambda job: job.infos(0),
        lambda job: finish(job.folder, job.manifest),
    ],
)
def test_a_name_that_cannot_be_looked_up_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[SmallJob], object]
) -> None:
    """A file system that fails, or is gone, gets a sentence wherever it is noticed first."""
    job = SmallJob(tmp_path)
    job.commit(0)
    close(job.path, monkeypatch)
    with pytest.raises(OutputError, match="cannot be read: Permission denied"):
        look(job)


def test_a_closed_folder_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's run in a folder that may not be entered gets a sentence."""
    job = SmallJob(tmp_path)
    close(tmp_path, monkeypatch)
    with pytest.raises(OutputError, match=r"manifest\.json' cannot be read: Permission denied"):
        Ledger.open(job.path)
