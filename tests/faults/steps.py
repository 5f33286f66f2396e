"""What is interrupted: a small job from its manifest to `_SUCCESS`, without Ray."""

from __future__ import annotations

from pathlib import Path

from jobs.verify import verify
from tests.run_folders import SmallJob, make_manifest

ROWS = (4,)


def make_input(folder: Path) -> None:
    """Makes what the job reads, which is not to be interrupted."""
    make_manifest(folder / "input", ROWS)


def commit_and_roll_up(folder: Path) -> SmallJob:
    """Starts or continues a job of two shards and completes it; the first in two commits."""
    job = SmallJob(folder, rows=ROWS)
    if not job.infos(0) and not job.ledger.has_part(0):
        job.commit(0, [1])
    job.finish()
    return job


def check_leftovers(folder: Path) -> None:
    """What an interrupted run has left is whole; the same command completes it."""
    if (folder / "run/.shardmill/manifest.json").exists():
        assert verify(folder / "run").damage == []
    job = commit_and_roll_up(folder)
    assert job.output() == job.expected()
    assert verify(job.path).state == "complete"
    assert list(job.folder.tmp.iterdir()) == list(job.folder.segments.iterdir()) == []
