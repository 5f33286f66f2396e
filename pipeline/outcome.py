"""What a worker tells of its work: counts, never prompts or completions.

Apart from `shard_runner`, so that the driver can read it without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.metrics import EngineMetrics
from pipeline.records import Shard
from pipeline.segments import SegmentInfo, Totals


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """What one attempt at a shard came to.

    Attributes:
        commits: the segments this attempt published.
        is_complete: no row that was asked for, and not released, is missing any more.
    """

    shard: int
    commits: tuple[SegmentInfo, ...]
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Released:
    """What a worker has given up, for another one to do.

    Attributes:
        positions: of the shard, as rising (first, end) pairs.
    """

    shard: int
    positions: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The most memory that a process has taken at a time, in bytes.

    Attributes:
        host: mapped files included, which workers on one machine share.
        gpus: of each that it sees.
    """

    host: int = 0
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a worker is; every number only grows, but for `interim` and `num_unstarted`.

    Attributes:
        metrics: of its engine.
        interim: what it has committed of each shard that it has not answered for yet.
        peak: of its memory; that it grows is no sign that the worker gets on.
        num_unstarted: completions that wait for a slot, of which it may release some; no sign
            of anything either.
    """

    metrics: EngineMetrics = field(default_factory=EngineMetrics)
    num_commits: int = 0
    interim: Mapping[Shard, Totals] = field(default_factory=dict)
    peak: MemoryPeak = field(default_factory=MemoryPeak, compare=False)
    num_unstarted: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that is ready.

    Attributes:
        devices: its `CUDA_VISIBLE_DEVICES`; empty without a GPU.
        model: one line about the loaded model: size, type, device.
        notes: what a user should know about how it was loaded.
        self_check: the figures of its `SelfCheck`; None if there was none.
        load_seconds: from reading the files to the model on its devices.
    """

    node: str
    devices: str
    model: str
    notes: tuple[str, ...]
    self_check: dict[str, Any] | None = None
    load_seconds: float = 0.0
