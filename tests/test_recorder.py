"""What the driver learns of commits that no answer tells of."""

from __future__ import annotations

from pathlib import Path

from jobs.recorder import Recorder
from tests.run_folders import SmallJob


def test_commits_of_a_lost_worker_are_found(tmp_path: Path) -> None:
    """Only rows that lack a sample are missing, and what is there is counted, once."""
    job = SmallJob(tmp_path, rows=(4,), shard_rows=4, num_samples=2)
    with Recorder(job.ledger) as recorder:
        shard = job.manifest.shard(0)
        assert recorder.missing_rows(shard) == [0, 1, 2, 3]
        job.commit(0, [0, 1, 2, 7])
        assert recorder.missing_rows(shard) == [1, 2, 3]
        assert recorder.missing_rows(shard) == [1, 2, 3]
        assert recorder.totals.num_completions == 4


def test_a_shard_that_was_completed_unseen_lacks_nothing(tmp_path: Path) -> None:
    """A worker that is lost between its last commit and its answer leaves nothing to be done.

    Its part is put together then and there, after which the folder has no segments of it.
    """
    job = SmallJob(tmp_path, rows=(3,), shard_rows=3)
    with Recorder(job.ledger) as recorder:
        job.commit(0)
        shard = job.manifest.shard(0)
        assert recorder.missing_rows(shard) == []
        recorder.wait()
        assert recorder.num_shards_left == 0
        assert recorder.missing_rows(shard) == []
        assert not list(job.folder.segments.iterdir())
        assert job.output() == job.expected()
