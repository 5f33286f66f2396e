"""How many workers a run may lose."""

from __future__ import annotations

import pytest

from jobs.losses import MAX_FAILED_STARTS, Losses
from pipeline.errors import WorkerError


def test_a_run_that_has_grown_may_lose_more() -> None:
    """A node that joined takes all its workers with it, however few the run began with."""
    num_workers = 1
    losses = Losses(lambda: num_workers)
    num_workers = 9
    for _ in range(9 * MAX_FAILED_STARTS - 1):
        losses.add("its node was lost", held_rows=False)
    with pytest.raises(WorkerError, match="before they had begun"):
        losses.add("its node was lost", held_rows=False)
