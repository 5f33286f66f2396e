"""What happens to workers, as the crew tells it to the driver."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.outcome import Released, ShardOutcome, WorkerInfo
from pipeline.records import Shard


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A worker has answered for a shard."""

    worker: int
    shard: Shard
    outcome: ShardOutcome


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded its model."""

    worker: int
    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone, with the shards it held.

    Attributes:
        with_node: its whole node is gone, or cannot be reached any more.
    """

    worker: int
    shards: tuple[Shard, ...]
    cause: str
    with_node: bool = False


@dataclass(frozen=True, slots=True)
class RowsReleased:
    """A worker has given up rows of a shard, for one that has none."""

    worker: int
    released: Released


Event = ShardDone | WorkerReady | WorkerLost | RowsReleased
