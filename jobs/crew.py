"""The workers as the driver sees them: started, fed, watched, replaced.

Everything that asks Ray for a result is in `Crew.wait`, which never waits longer than it is told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from jobs.cluster import WorkerShape
from jobs.logs import FILE_ONLY
from jobs.worker import CONCURRENCY, SHARDS_IN_FLIGHT, Worker, WorkerSpec
from pipeline.errors import ResourceError, ShardmillError
from pipeline.outcome import Progress, ShardOutcome, WorkerInfo
from pipeline.records import Shard
from pipeline.segments import Totals

logger = logging.getLogger(__name__)

PLACE_TIMEOUT = 300.0
"""Seconds for Ray to find room for a worker's process and start it."""

LOAD_TIMEOUT = 3600.0
"""Seconds to load a model: hundreds of gigabytes from a slow disk fit in."""

POLL_INTERVAL = 1.0
"""Seconds between two questions to a worker how far it is."""


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A worker has answered for a shard."""

    shard: Shard
    outcome: ShardOutcome


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded its model."""

    worker: int
    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone, with the shards it held."""

    worker: int
    shards: tuple[Shard, ...]
    cause: str


Event = ShardDone | WorkerReady | WorkerLost


@dataclass(eq=False)
class _Member:
    """A worker's place, and the actor that fills it now.

    Attributes:
        calls: what has been asked of the actor: the method, and the shard for `run`.
        is_alone: whether it holds one shard and shall be given no other beside it.
        moved_at: monotonic seconds when it last got on.
        start_at: monotonic seconds when a new actor may be started.
    """

    index: int
    actor: Any = None
    calls: dict[Any, tuple[str, Shard | None]] = field(default_factory=dict)
    is_ready: bool = False
    progress: Progress = field(default_factory=Progress)
    is_alone: bool = False
    moved_at: float = 0.0
    polled_at: float = 0.0
    start_at: float = 0.0

    def shards(self) -> list[Shard]:
        return [shard for _, shard in self.calls.values() if shard is not None]

    def is_asked(self, method: str) -> bool:
        return any(name == method for name, _ in self.calls.values())


class Crew:
    """All workers of a run.

    Args:
        stall_timeout: seconds without a new token or commit after which a worker that holds
            shards counts as lost.
    """

    def __init__(self, spec: WorkerSpec, shape: WorkerShape, stall_timeout: float) -> None:
        self._spec = spec
        self._shape = shape
        self._stall_timeout = stall_timeout
        self._members = [_Member(index) for index in range(shape.count)]
        self._generated_before = 0  # by actors that are gone

    @property
    def num_ready(self) -> int:
        """Workers whose model is loaded."""
        return sum(member.is_ready for member in self._members)

    @property
    def num_in_flight(self) -> int:
        """Shards that workers hold."""
        return sum(len(member.shards()) for member in self._members)

    @property
    def num_commits(self) -> int:
        """Segments that the present actors have published."""
        return sum(member.progress.num_commits for member in self._members)

    @property
    def interim(self) -> Totals:
        """What is committed of shards that workers hold."""
        return sum((member.progress.interim for member in self._members), Totals())

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated in this run."""
        return self._generated_before + sum(m.progress.num_generated_tokens for m in self._members)

    def free_places(self) -> Iterator[int]:
        """The worker for each shard that can be handed out now, the emptiest first."""
        for depth in range(SHARDS_IN_FLIGHT):
            for member in self._members:
                if member.is_ready and not member.is_alone and len(member.shards()) <= depth:
                    yield member.index

    def least_busy(self) -> tuple[int, int] | None:
        """The ready worker that holds the fewest shards, and how many; None if there is none."""
        ready = [member for member in self._members if member.is_ready and not member.is_alone]
        held = [(len(member.shards()), member.index) for member in ready]
        return (min(held)[1], min(held)[0]) if held else None

    def hand(self, worker: int, shard: Shard, *, alone: bool = False) -> None:
        """Gives a shard to a worker; `alone` keeps others away until it has answered."""
        member = self._members[worker]
        member.is_alone = alone
        if not member.shards():
            member.moved_at = time.monotonic()
        self._ask(member, "run", shard)

    def start(self) -> None:
        """Starts an actor in every empty place whose time has come."""
        for member in self._members:
            if member.actor is None and time.monotonic() >= member.start_at:
                self._start(member)

    def wait(self, timeout: float) -> list[Event]:
        """What has happened, waiting at most `timeout` seconds for the first thing.

        Raises:
            ShardmillError: a worker met a condition that is the user's to mend.
        """
        self._poll()
        members = {ref: member for member in self._members for ref in member.calls}
        if not members:
            time.sleep(timeout)
            return []
        ready, rest = ray.wait(list(members), num_returns=1, timeout=timeout)
        if rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        events = [event for ref in ready for event in self._settle(members[ref], ref)]
        return events + [event for member in self._members for event in self._overdue(member)]

    def drain(self) -> None:
        """Asks every worker to commit what is finished and to answer for its shards."""
        for member in self._members:
            if member.is_ready:
                self._ask(member, "drain")

    def close(self) -> None:
        """Ends every actor."""
        for member in self._members:
            if member.actor is not None:
                ray.kill(member.actor, no_restart=True)

    def _start(self, member: _Member) -> None:
        options = {
            "num_cpus": self._shape.num_cpus,
            "num_gpus": self._shape.num_gpus,
            "max_concurrency": CONCURRENCY,
            # At most once: the driver hands a shard out again itself, so that a lost answer
            # is not a second run.
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        member.actor = ray.remote(Worker).options(**options).remote(member.index, self._spec)
        member.moved_at = time.monotonic()
        self._ask(member, "place")

    def _ask(self, member: _Member, method: str, shard: Shard | None = None) -> None:
        arguments = () if shard is None else (shard,)
        member.calls[getattr(member.actor, method).remote(*arguments)] = (method, shard)

    def _poll(self) -> None:
        now = time.monotonic()
        for member in self._members:
            is_due = now - member.polled_at >= POLL_INTERVAL
            if member.is_ready and is_due and not member.is_asked("progress"):
                member.polled_at = now
                self._ask(member, "progress")

    def _settle(self, member: _Member, ref: Any) -> list[Event]:
        """Takes the answer to one call."""
        if ref not in member.calls:
            return []  # went with the actor, a moment ago
        method, shard = member.calls[ref]
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, ShardmillError):
                raise error.cause from None
            logger.error(
                "worker %d raised in %s:\n%s", member.index, method, error, extra=FILE_ONLY
            )
            return [self._lose(member, f"it raised {error.cause!r}")]
        except RayError as error:
            logger.error(
                "worker %d was lost in %s:\n%s", member.index, method, error, extra=FILE_ONLY
            )
            return [self._lose(member, type(error).__name__)]
        del member.calls[ref]
        return self._take(member, method, shard, answer)

    def _take(self, member: _Member, method: str, shard: Shard | None, answer: Any) -> list[Event]:
        if method == "place":
            member.moved_at = time.monotonic()
            self._ask(member, "load")
        elif method == "load":
            member.is_ready = True
            return [WorkerReady(member.index, answer)]
        elif method == "progress":
            if answer != member.progress:
                member.progress, member.moved_at = answer, time.monotonic()
        elif shard is not None:
            member.moved_at = time.monotonic()
            member.is_alone = False
            return [ShardDone(shard, answer)]
        return []

    def _overdue(self, member: _Member) -> list[Event]:
        """Loses a member that has not got on for too long."""
        silence = time.monotonic() - member.moved_at
        if member.is_asked("place") and silence > PLACE_TIMEOUT:
            if self.num_ready == 0:
                raise ResourceError(
                    f"Ray found no room for a worker with {self._shape.num_gpus} GPUs and "
                    f"{self._shape.num_cpus:g} CPUs in {PLACE_TIMEOUT:.0f} s; "
                    "lower workers.gpus_per_worker or wait until the cluster is less busy"
                )
            return [self._lose(member, "Ray found no room for it")]
        if member.is_asked("load") and silence > LOAD_TIMEOUT:
            return [self._lose(member, f"its model was not loaded in {LOAD_TIMEOUT:.0f} s")]
        if member.shards() and silence > self._stall_timeout:
            return [self._lose(member, f"it stood still for {self._stall_timeout:.0f} s")]
        return []

    def _lose(self, member: _Member, cause: str) -> WorkerLost:
        ray.kill(member.actor, no_restart=True)
        event = WorkerLost(member.index, tuple(member.shards()), cause)
        member.calls.clear()  # their answers are errors now, and the shards go elsewhere
        self._generated_before += member.progress.num_generated_tokens
        self._members[member.index] = _Member(member.index, start_at=time.monotonic() + 1.0)
        return event
