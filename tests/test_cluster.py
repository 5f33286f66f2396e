"""How a cluster is divided among workers."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.cluster import Resources, ray_cluster, shape_workers
from jobs.config import WorkersSettings
from pipeline.errors import ResourceError

MANY_SHARDS = 10_000


def test_rays_client_protocol_is_refused() -> None:
    """With a way to do it: a driver outside of the cluster sees neither its files nor its end."""
    with pytest.raises(ResourceError, match="on a node of the cluster"), ray_cluster("ray://h:1"):
        pass


@pytest.mark.parametrize(
    ("cpus", "gpus", "settings", "expected"),
    [
        (2, 0, {}, (2, 0, 1, 1)),
        (16, 0, {}, (8, 0, 2, 2)),
        (64, 0, {}, (8, 0, 8, 8)),
        (8, 0, {"count": 2}, (2, 0, 4, 4)),
        (2, 0, {"count": 4}, (4, 0, 0.5, 1)),
        (16, 4, {}, (4, 1, 0, 1)),
        (1, 8, {}, (8, 1, 0, 1)),
        (16, 4, {"gpus_per_worker": 2}, (2, 2, 0, 1)),
        (16, 4, {"count": 3}, (3, 1, 0, 1)),
        (16, 4, {"gpus_per_worker": 0}, (8, 0, 2, 2)),
        (16, 5, {"gpus_per_worker": 2}, (2, 2, 0, 1)),
        (16, 8, {"gpus_per_worker": 4, "count": 2}, (2, 4, 0, 1)),
    ],
)
def test_the_cluster_is_filled(
    cpus: int, gpus: int, settings: dict[str, object], expected: tuple[int, int, float, int]
) -> None:
    """Auto uses every GPU, or else every core, and a number is taken as it is."""
    shape = shape_workers(
        WorkersSettings.model_validate(settings), Resources((cpus,), (gpus,)), MANY_SHARDS
    )
    assert (shape.count, shape.num_gpus, shape.num_cpus, shape.num_threads) == expected


@pytest.mark.parametrize(
    ("cpus", "count", "expected"),
    [
        ((0, 1, 1), 1, (1, 1)),
        ((0, 1, 1), 3, (3, 0.5)),
        ((2, 2, 2), 2, (2, 2)),
        ((4, 4), 3, (3, 2)),
        ((3, 1), 3, (3, 1)),
        ((1, 1), 5, (5, 1 / 3)),
        ((16, 16, 16), "auto", (24, 2)),
        ((8,) * 100, "auto", (800, 1)),
    ],
)
def test_every_worker_fits_on_a_node(
    cpus: tuple[int, ...], count: object, expected: tuple[int, float]
) -> None:
    """Cores of two nodes make no room for one worker: it would wait for it in vain."""
    settings = WorkersSettings.model_validate({"count": count})
    resources = Resources(cpus, (0,) * len(cpus))
    shape = shape_workers(settings, resources, MANY_SHARDS)
    assert (shape.count, shape.num_cpus) == expected
    assert sum(int(cores / shape.num_cpus + 1e-6) for cores in cpus) >= shape.count


def test_no_more_workers_than_shards() -> None:
    """A worker without a shard would load a model for nothing."""
    assert shape_workers(WorkersSettings(), Resources((64,), (0,)), num_shards=3).count == 3


@pytest.mark.parametrize(("count", "gpus"), [("auto", 0), (1, 0), (5, 4)])
def test_gpus_that_are_not_there_are_refused(count: object, gpus: int) -> None:
    """Asking for more GPUs than there are ends at once with both numbers, not in a wait."""
    settings = WorkersSettings.model_validate({"count": count, "gpus_per_worker": 1})
    with pytest.raises(ResourceError, match=f"there are {gpus};"):
        shape_workers(settings, Resources((8,), (gpus,)), MANY_SHARDS)


@pytest.mark.parametrize(
    ("settings", "later", "expected"),
    [
        ({}, Resources((16,), (8,)), 8),
        ({}, Resources((16,), (2,)), 2),
        ({"gpus_per_worker": 2}, Resources((16,), (3, 3, 3)), 3),
        ({"count": 3}, Resources((16,), (8,)), 3),
        ({"gpus_per_worker": 0}, Resources((48,), (8,)), 24),
        ({"gpus_per_worker": 0}, Resources((3, 3, 3), (0, 0, 0)), 3),
    ],
)
def test_a_bigger_cluster_has_more_places(
    settings: dict[str, object], later: Resources, expected: int
) -> None:
    """Auto follows the cluster, and a number is taken as it is."""
    shape = shape_workers(
        WorkersSettings.model_validate(settings), Resources((16,), (4,)), MANY_SHARDS
    )
    assert shape.places(later) == expected


def test_the_gpus_of_a_worker_are_those_of_one_node() -> None:
    """What is left over on a node makes no worker, and more are refused with what there is."""
    resources = Resources((16,), (3, 3, 1))
    shape = shape_workers(WorkersSettings(gpus_per_worker=2), resources, MANY_SHARDS)
    assert (shape.count, shape.num_gpus) == (2, 2)
    with pytest.raises(ResourceError, match="from one node, which have 3, 3, 1; lower"):
        shape_workers(WorkersSettings(count=3, gpus_per_worker=2), resources, MANY_SHARDS)
    with pytest.raises(ResourceError, match="which have 3, 3, 1"):
        shape_workers(WorkersSettings(gpus_per_worker=4), resources, MANY_SHARDS)


def test_workers_that_share_a_node_are_counted() -> None:
    """Those are what its memory is divided among; of more nodes, as many as share one at least."""
    shapes = [
        shape_workers(
            WorkersSettings(count=5), Resources((16 // nodes,) * nodes, (0,) * nodes), MANY_SHARDS
        )
        for nodes in (1, 2, 8)
    ]
    assert [shape.num_per_node for shape in shapes] == [5, 2, 1]


@pytest.mark.parametrize(
    ("count", "gpus_per_worker", "beside"), [("auto", 1, 4), (3, 1, 3), ("auto", 2, 2), (1, 2, 1)]
)
def test_workers_with_gpus_that_share_a_node_are_counted(
    count: Any, gpus_per_worker: Any, beside: int
) -> None:
    """As many as the node with most GPUs can have: what their models spill is there together."""
    settings = WorkersSettings(count=count, gpus_per_worker=gpus_per_worker)
    assert shape_workers(settings, Resources((16, 16), (4, 2)), MANY_SHARDS).num_per_node == beside
