"""How a cluster is divided among workers."""

from __future__ import annotations

import pytest

from jobs.cluster import Resources, shape_workers
from jobs.config import WorkersSettings
from pipeline.errors import ResourceError

MANY_SHARDS = 10_000


@pytest.mark.parametrize(
    ("cpus", "gpus", "settings", "expected"),
    [
        (2, 0, {}, (2, 0, 1, 1)),
        (16, 0, {}, (8, 0, 2, 2)),
        (64, 0, {}, (8, 0, 8, 8)),
        (8, 0, {"count": 2}, (2, 0, 4, 4)),
        (2, 0, {"count": 4}, (4, 0, 0.5, 1)),
        (16, 4, {}, (4, 1, 1, 1)),
        (16, 4, {"gpus_per_worker": 2}, (2, 2, 1, 1)),
        (16, 4, {"count": 3}, (3, 1, 1, 1)),
        (16, 4, {"gpus_per_worker": 0}, (8, 0, 2, 2)),
    ],
)
def test_the_cluster_is_filled(
    cpus: int, gpus: int, settings: dict[str, object], expected: tuple[int, int, float, int]
) -> None:
    """Auto uses every GPU, or else every core, and a number is taken as it is."""
    shape = shape_workers(
        WorkersSettings.model_validate(settings), Resources(cpus, gpus), MANY_SHARDS
    )
    assert (shape.count, shape.num_gpus, shape.num_cpus, shape.num_threads) == expected


def test_no_more_workers_than_shards() -> None:
    """A worker without a shard would load a model for nothing."""
    assert shape_workers(WorkersSettings(), Resources(64, 0), num_shards=3).count == 3


@pytest.mark.parametrize(("count", "gpus"), [("auto", 0), (1, 0), (5, 4)])
def test_gpus_that_are_not_there_are_refused(count: object, gpus: int) -> None:
    """Asking for more GPUs than there are ends at once with both numbers, not in a wait."""
    settings = WorkersSettings.model_validate({"count": count, "gpus_per_worker": 1})
    with pytest.raises(ResourceError, match=f"there are {gpus};"):
        shape_workers(settings, Resources(8, gpus), MANY_SHARDS)
