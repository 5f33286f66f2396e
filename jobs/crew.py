"""The workers as the driver sees them: started, fed, watched, replaced.

Everything that asks Ray for a result is in `Crew.wait`, which never waits longer than it is told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from jobs.cluster import WorkerShape, check_ray, resources
from jobs.events import Event, RowsReleased, ShardDone, WorkerLost, WorkerReady
from jobs.logs import FILE_ONLY
from jobs.member import Member
from jobs.patience import PLACE_TIMEOUT, Patience
from jobs.progress import WorkerMetrics
from jobs.sharing import who_releases
from jobs.worker import OTHER_CALLS, Worker, WorkerSpec
from pipeline.errors import ResourceError, ShardmillError
from pipeline.records import RowRange, Shard
from pipeline.segments import Totals

logger = logging.getLogger(__name__)

REFUSED_DELAY = 600.0
"""Seconds after which a worker that could not start where others could is tried again: its node
may be mended, or memory free that another process has held."""

REFRESH_TIMEOUT = 5.0
"""Seconds to wait for the last answer how far the workers are."""

STARTING = ("place", "fetch", "load")
"""What is asked of a worker before it is ready, in this order."""

GROWTH_INTERVAL = 10.0
"""Seconds between two looks whether the cluster has got bigger."""

POLL_INTERVAL = 1.0
"""Seconds between two questions to a worker how far it is."""

SHARING_POLL_INTERVAL = 0.2
"""The same while a worker waits for rows that another one releases."""

_NODE_DIED = "its node has died"
"""What Ray's error says of an actor that was lost with its node."""


class Crew:
    """All workers of a run.

    Args:
        stall_timeout: seconds without a new token or commit after which a worker that holds
            shards counts as lost.
    """

    def __init__(self, spec: WorkerSpec, shape: WorkerShape, stall_timeout: float) -> None:
        self._spec = spec
        self._shape = shape
        self._patience = Patience(stall_timeout)
        self._shards_in_flight = spec.shards_in_flight
        self._members = [Member(index) for index in range(shape.count)]
        self._looked_at = time.monotonic()
        self._is_sharing_out = False

    @property
    def num_workers(self) -> int:
        """Workers there are to be, ready or not."""
        return len(self._members)

    @property
    def num_ready(self) -> int:
        """Workers whose model is loaded."""
        return sum(member.is_ready for member in self._members)

    @property
    def num_in_flight(self) -> int:
        """Shards that workers hold."""
        return sum(len(member.shards()) for member in self._members)

    @property
    def num_releasing(self) -> int:
        """Workers that have been asked to release rows."""
        return sum(member.is_asked("release") for member in self._members)

    @property
    def interim(self) -> Totals:
        """What is committed of shards that workers hold."""
        told = (member.progress.interim.values() for member in self._members)
        return sum(chain.from_iterable(told), Totals())

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated in this run."""
        return sum(member.metrics.num_generated_tokens for member in self._members)

    def metrics(self) -> list[WorkerMetrics]:
        """What each worker has done in this run."""
        return [WorkerMetrics(m.index, m.info, m.metrics, m.progress.peak) for m in self._members]

    def free_places(self) -> Iterator[int]:
        """The worker for each shard that can be handed out now, the emptiest first."""
        for depth in range(self._shards_in_flight):
            for member in self._members:
                if member.is_ready and not member.is_alone and len(member.shards()) <= depth:
                    yield member.index

    def least_busy(self, avoid: int) -> tuple[int, int] | None:
        """The worker that holds the fewest shards, and how many; None if all run one alone.

        Args:
            avoid: a worker that is not taken as long as another one is ready; best one on
                another node.
        """
        ready = [member for member in self._members if member.is_ready]
        others = [member for member in ready if member.index != avoid] or ready
        bad_node = self._members[avoid].node
        elsewhere = [member for member in others if member.node != bad_node] or others
        held = [
            (len(member.shards()), member.index)
            for member in elsewhere
            if not member.is_alone and not member.is_asked("release")
        ]
        return (min(held)[1], min(held)[0]) if held else None

    def hand(self, worker: int, shard: Shard, rows: RowRange | None = None) -> None:
        """Gives a shard to a worker; one of which it gets `rows` only has it to itself."""
        member = self._members[worker]
        member.is_alone = rows is not None
        if not member.shards():
            member.moved_at = time.monotonic()
        self._ask(member, "run", shard, rows)

    def holds(self, shard: int) -> bool:
        """Whether a worker has rows of this shard."""
        return any(held.index == shard for member in self._members for held in member.shards())

    def share_out(self) -> None:
        """Where workers have nothing, asks others to release rows they have not begun."""
        ready = [member for member in self._members if member.is_ready and not member.is_alone]
        self._is_sharing_out = not all(member.shards() for member in ready)
        for holder, share in who_releases(ready):
            self._ask(holder, "release", share)

    def start(self) -> None:
        """Starts an actor in every empty place whose time has come.

        Raises:
            ResourceError: there is no Ray any more.
        """
        check_ray()
        self._grow()
        for member in self._members:
            if member.actor is None and time.monotonic() >= member.start_at:
                self._start(member)

    def _grow(self) -> None:
        """Makes places on nodes that have joined; those of nodes that leave are kept for others."""
        if time.monotonic() - self._looked_at < GROWTH_INTERVAL:
            return
        self._looked_at = time.monotonic()
        for index in range(len(self._members), self._shape.places(resources())):
            logger.info("worker %d: the cluster has room for it now", index)
            self._members.append(Member(index))

    def wait(self, timeout: float) -> list[Event]:
        """What has happened, waiting at most `timeout` seconds for the first thing.

        Raises:
            ShardmillError: a worker met a condition that is the user's to mend.
        """
        self._poll()
        members = {ref: member for member in self._members for ref in member.calls}
        if not members:
            time.sleep(timeout)
            self._patience.look(self._members, waited=timeout)
            self._check_room()
            return []
        ready, rest = ray.wait(list(members), num_returns=1, timeout=timeout)
        if rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        events = [event for ref in ready for event in self._settle(members[ref], ref)]
        self._patience.look(self._members, waited=timeout)
        self._check_room()
        return events + [event for member in self._members for event in self._overdue(member)]

    def refresh(self) -> None:
        """Asks every worker once more how far it is, and waits a little for the answers."""
        for member in self._members:
            member.polled_at = -POLL_INTERVAL
        self.wait(0.0)
        deadline = time.monotonic() + REFRESH_TIMEOUT
        while any(m.is_asked("progress") for m in self._members) and time.monotonic() < deadline:
            self.wait(0.1)

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

    def _start(self, member: Member) -> None:
        options = {
            "num_cpus": self._shape.num_cpus,
            "num_gpus": self._shape.num_gpus,
            "max_concurrency": self._shards_in_flight + OTHER_CALLS,
            # At most once: the driver hands a shard out again itself, so that a lost answer
            # is not a second run.
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        member.actor = ray.remote(Worker).options(**options).remote(member.index, self._spec)
        member.moved_at = time.monotonic()
        self._ask(member, "place")

    def _ask(self, member: Member, method: str, *arguments: Any) -> None:
        shard = arguments[0] if method == "run" else None
        member.calls[getattr(member.actor, method).remote(*arguments)] = (method, shard)

    def _poll(self) -> None:
        now = time.monotonic()
        for member in self._members:
            is_soon = self._is_sharing_out and member.progress.num_unstarted
            interval = SHARING_POLL_INTERVAL if is_soon else POLL_INTERVAL
            is_due = now - member.polled_at >= interval
            if member.is_ready and is_due and not member.is_asked("progress"):
                member.polled_at = now
                self._ask(member, "progress")

    def _settle(self, member: Member, ref: Any) -> list[Event]:
        """Takes the answer to one call."""
        if ref not in member.calls:
            return []  # went with the actor, a moment ago
        method, shard = member.calls[ref]
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, ShardmillError):
                if method not in STARTING or not self._can_do_without(member):
                    raise error.cause from None
                self._give_up(member, error.cause)
                return []
            logger.error(
                "worker %d raised in %s:\n%s", member.index, method, error, extra=FILE_ONLY
            )
            return [self._lose(member, f"it raised {error.cause!r}")]
        except RayError as error:
            logger.error(
                "worker %d was lost in %s:\n%s", member.index, method, error, extra=FILE_ONLY
            )
            return [self._lose(member, _cause(error), with_node=_NODE_DIED in str(error))]
        del member.calls[ref]
        return self._take(member, method, shard, answer)

    def _can_do_without(self, member: Member) -> bool:
        """Whether there is another worker that has started, and can again if it is lost."""
        others = (other for other in self._members if other is not member)
        return any(other.info is not None and not other.is_refused for other in others)

    def _give_up(self, member: Member, cause: ShardmillError) -> None:
        """Does without a worker that cannot start where others can, for a while."""
        logger.warning("worker %d is done without: %s", member.index, cause)
        ray.kill(member.actor, no_restart=True)
        start_at = time.monotonic() + REFUSED_DELAY
        self._members[member.index] = replace(member.emptied(), is_refused=True, start_at=start_at)

    def _take(self, member: Member, method: str, shard: Shard | None, answer: Any) -> list[Event]:
        if method == "place":
            member.node, member.moved_at = answer, time.monotonic()
            self._ask(member, "fetch")
        elif method == "fetch":
            member.moved_at = time.monotonic()
            self._ask(member, "load")
        elif method == "load":
            member.is_ready, member.is_refused, member.info = True, False, answer
            return [WorkerReady(member.index, answer)]
        elif method == "progress":
            if answer.num_commits > member.progress.num_commits:
                member.num_losses = 0
            if answer != member.progress:
                member.moved_at = time.monotonic()
            member.take_progress(answer)
        elif method == "release":
            # What it has left, the next poll tells.
            member.progress = replace(member.progress, num_unstarted=0)
            return [] if answer is None else [RowsReleased(member.index, answer)]
        elif shard is not None:
            member.moved_at = time.monotonic()
            member.is_alone = False
            member.num_losses = 0
            member.forget_interim(shard)
            return [ShardDone(member.index, shard, answer)]
        return []

    def _check_room(self) -> None:
        if not self._patience.has_room(self._members):
            raise ResourceError(
                f"Ray found no room for a worker with {self._shape.num_gpus} GPUs and "
                f"{self._shape.num_cpus:g} CPUs in {PLACE_TIMEOUT:.0f} s; "
                "lower workers.gpus_per_worker or wait until the cluster is less busy"
            )

    def _overdue(self, member: Member) -> list[Event]:
        """Loses a member that has not got on for too long."""
        cause = self._patience.exhausted(member)
        return [] if cause is None else [self._lose(member, cause)]

    def _lose(self, member: Member, cause: str, *, with_node: bool = False) -> WorkerLost:
        ray.kill(member.actor, no_restart=True)
        event = WorkerLost(member.index, tuple(member.shards()), cause, with_node)
        member.calls.clear()  # their answers are errors now, and the shards go elsewhere
        self._members[member.index] = member.emptied()
        return event


def _cause(error: RayError) -> str:
    """Why a worker was lost, in words that can stand in the output."""
    if isinstance(error, OutOfMemoryError):
        return "its machine ran out of memory"
    if _NODE_DIED in str(error):
        return "its node was lost, or could not be reached"
    if isinstance(error, ActorUnavailableError):
        return "it could not be reached"
    return "its process died" if isinstance(error, RayActorError) else type(error).__name__
