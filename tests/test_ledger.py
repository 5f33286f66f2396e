"""Tests of `jobs.ledger`, and of the state that it finds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.parts import roll_up
from pipeline.errors import (
    DamagedOutputError,
)
from pipeline.segments import Totals, segment_name
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
