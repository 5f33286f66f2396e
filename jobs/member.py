"""A worker's place in the crew, and the actor that fills it now. Asks Ray for nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.metrics import EngineMetrics
from pipeline.outcome import Progress, WorkerInfo
from pipeline.records import Shard

RESTART_DELAY = 1.0
MAX_RESTART_DELAY = 60.0
"""Seconds before a lost actor is replaced: doubled, up to this, with each one that is lost in the
same place with no commit in between."""


@dataclass(eq=False)
class Member:
    """A place and its actor.

    Attributes:
        calls: what has been asked of the actor: the method, and the shard for `run`.
        info: of the last actor that was ready.
        before: what the actors that are gone have done.
        node: where the actor runs, or the one before it ran; empty if there was none.
        is_alone: whether it holds one shard and shall be given no other beside it.
        is_refused: whether its last actor could not be started for a reason that lies in its place.
        answered_for: shards whose answer is newer than what is asked of its progress.
        num_losses: actors lost one after the other, with no commit in between.
        moved_at: monotonic seconds when it last got on.
        start_at: monotonic seconds when a new actor may be started.
    """

    index: int
    actor: Any = None
    calls: dict[Any, tuple[str, Shard | None]] = field(default_factory=dict)
    info: WorkerInfo | None = None
    before: EngineMetrics = field(default_factory=EngineMetrics)
    node: str = ""
    is_ready: bool = False
    progress: Progress = field(default_factory=Progress)
    is_alone: bool = False
    is_refused: bool = False
    answered_for: set[Shard] = field(default_factory=set)
    num_losses: int = 0
    moved_at: float = 0.0
    polled_at: float = 0.0
    start_at: float = 0.0

    @property
    def has_room(self) -> bool:
        """Whether Ray has found a node for its actor."""
        return self.actor is not None and not self.is_asked("place")

    @property
    def metrics(self) -> EngineMetrics:
        """What has been done in this place, in this run."""
        return self.before + self.progress.metrics

    @property
    def speed(self) -> float | None:
        """Tokens per second of its actor's decode steps; None as long as there is none."""
        metrics = self.progress.metrics
        is_known = metrics.num_generated_tokens and metrics.decode_seconds
        return metrics.num_generated_tokens / metrics.decode_seconds if is_known else None

    def take_progress(self, progress: Progress) -> None:
        """Takes what the actor says of how far it is."""
        interim = {
            shard: totals
            for shard, totals in progress.interim.items()
            if shard not in self.answered_for
        }
        self.progress = replace(progress, interim=interim)
        self.answered_for.clear()

    def forget_interim(self, shard: Shard) -> None:
        """Counts a shard's commits no more, since the answer for it counts them."""
        if self.is_asked("progress"):
            self.answered_for.add(shard)  # what it says next may still have them
        interim = {each: totals for each, totals in self.progress.interim.items() if each != shard}
        self.progress = replace(self.progress, interim=interim)

    def shards(self) -> list[Shard]:
        """What it holds."""
        return [shard for _, shard in self.calls.values() if shard is not None]

    def is_asked(self, method: str) -> bool:
        """Whether it has a call of this method to answer."""
        return any(name == method for name, _ in self.calls.values())

    def emptied(self) -> Member:
        """The same place after the loss of its actor, to be filled again after a while."""
        delay = min(MAX_RESTART_DELAY, RESTART_DELAY * 2**self.num_losses)
        return Member(
            self.index,
            info=self.info,
            before=self.metrics,
            node=self.node,
            num_losses=self.num_losses + 1,
            start_at=time.monotonic() + delay,
        )
