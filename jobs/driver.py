"""Hands shards to workers until every one is complete, or the run is to stop.

The driver holds no prompt and no completion. What is done it learns from the run folder before it
starts and from the workers' answers afterwards; if it dies, the folder still tells.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass

from jobs.crew import Crew
from jobs.events import Event, RowsReleased, ShardDone, WorkerLost, WorkerReady
from jobs.failed_rows import too_many_failed
from jobs.losses import Losses
from jobs.progress import Rate, Reporter, Snapshot
from jobs.recorder import Recorder
from jobs.stop import StopRequest
from jobs.suspects import Suspects
from pipeline.errors import TooManyFailedRowsError, WorkerError
from pipeline.records import Shard
from pipeline.segments import Totals

logger = logging.getLogger(__name__)

WAIT = 0.5
"""Seconds to wait for an event before looking at signals and limits again."""

REPORT_INTERVAL = 0.5
"""Seconds between two reports, which add up the figures of all workers."""


def check_failed(totals: Totals, max_failed: int) -> None:
    """Refuses to go on, or to call a job complete, with too many failed rows.

    Raises:
        TooManyFailedRowsError: with both numbers.
    """
    if totals.error > max_failed:
        raise TooManyFailedRowsError(too_many_failed(totals.error, max_failed))


@dataclass(kw_only=True)
class Driver:
    """One run over the shards that are still to be done.

    Attributes:
        recorder: knows what is done and what is left.
        num_completions: of the whole job, done or not.
        max_failed: completions that may be errors.
        num_generated_before: completions of the job that the recorder does not know of.
        grace: seconds that workers have to commit when the run is to stop.
    """

    crew: Crew
    recorder: Recorder
    num_completions: int
    max_failed: int
    stop: StopRequest
    reporter: Reporter
    grace: float
    num_generated_before: int = 0

    def __post_init__(self) -> None:
        self._shards = self.recorder.shards_left()
        self._again: deque[Shard] = deque()
        self._suspects = Suspects()
        self._lost_with_node: set[Shard] = set()
        self._losses = Losses(lambda: self.crew.num_workers)
        self._num_generated = self._committed().num_generated
        self._has_generated = False
        self._is_handed_out = False
        self._rate = Rate()
        self._ready_at: float | None = None
        self._reported_at = -math.inf

    @property
    def seconds_generating(self) -> float:
        """Since the first worker was ready."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def run(self) -> None:
        """Returns when all shards are complete.

        Raises:
            StoppedError: asked to stop; all that was finished is committed.
            TooManyFailedRowsError: likewise, because of `max_failed`.
            WorkerError: workers keep dying.
            ShardmillError: a worker met a condition that is the user's to mend.
        """
        while self._is_other_left or self._suspects:
            self._check_limits()
            self.crew.start()
            self._look_at_held_rows()
            self._hand_out()
            for event in self.crew.wait(WAIT):
                self._handle(event)
            self._look_for_success()
            self._look_for_orphans()
            if time.monotonic() - self._reported_at >= REPORT_INTERVAL:
                self._report()
        self.crew.refresh()
        self._report()

    def _check_limits(self) -> None:
        if self.recorder.totals.error > self.max_failed:
            self._drain()
            check_failed(self.recorder.totals, self.max_failed)
        if self.stop.reason():
            self._drain()
            self.stop.check()

    def _hand_out(self) -> None:
        # After many losses other shards come first: they show whether workers work at all.
        are_suspects_due = not (self._losses.are_many and self._is_other_left)
        reserved = self._hand_out_suspects() if are_suspects_due else None
        for worker in self.crew.free_places():
            if worker == reserved:
                continue
            shard = self._next_shard()
            if shard is None:
                self._is_handed_out = True
                self.crew.share_out()
                return
            self.crew.hand(worker, shard)

    @property
    def _is_other_left(self) -> bool:
        """Whether there is anything to do besides suspects, or a worker has something."""
        in_flight = self.crew.num_in_flight + self.crew.num_releasing
        return bool(not self._is_handed_out or self._again or in_flight)

    def _next_shard(self) -> Shard | None:
        """What runs next; not what another attempt has completed meanwhile."""
        while self._again:
            shard = self._again.popleft()
            if not self.recorder.is_complete(shard.index):
                return shard
        return next(self._shards, None)

    def _hand_out_suspects(self) -> int | None:
        """Gives each suspect to a worker that holds nothing; the worker kept free for the next."""
        while suspect := self._suspects.next():
            if self.recorder.is_complete(suspect.shard.index):
                self._suspects.clear(suspect)
                continue
            worker, num_held = self.crew.least_busy(suspect.worker) or (None, 0)
            if worker is None or num_held:
                return worker
            self._suspects.run(suspect, worker)
            self.crew.hand(worker, suspect.shard, suspect.rows)
        return None

    def _look_at_held_rows(self) -> None:
        """Tries them again where no other row is left to show whether workers work."""
        if self._is_other_left or not self._suspects.held:
            return
        if self._suspects.are_all_held and not self._num_generated + self.num_generated_before:
            first = self._suspects.held[0]
            raise WorkerError(
                f"no row of this job was ever done, and workers were lost with row {first.row_id} "
                "alone; the logs in .shardmill/logs say more"
            )
        # Many rows of one shard may kill; where several shards do, it is not their rows.
        is_one_shard = self._suspects.are_of_one_shard and self._has_generated
        if self._suspects.are_all_held or (self._losses.are_many and is_one_shard):
            self._suspects.retry_held()

    def _look_for_success(self) -> None:
        """Rows that were generated show that workers work, and that the lost ones had a cause."""
        num_generated = self._committed().num_generated
        if num_generated > self._num_generated:
            self._has_generated = True
            self._losses.forget()
            self._suspects.retry_held()
        # What a lost worker had committed is not counted until its loss is looked at.
        self._num_generated = max(num_generated, self._num_generated)

    def _look_for_orphans(self) -> None:
        """Begins anew with rows that nobody has: their worker died as it released them."""
        if not self._is_other_left and not self._suspects and self.recorder.num_shards_left:
            self._shards, self._is_handed_out = self.recorder.shards_left(), False

    def _committed(self) -> Totals:
        return self.recorder.totals + self.crew.interim

    def _drain(self) -> None:
        """Has every worker commit what is finished, waiting at most `grace` seconds."""
        logger.info("stopping: committing what is finished")
        self.crew.drain()
        deadline = time.monotonic() + self.grace
        while self.crew.num_in_flight and time.monotonic() < deadline:
            for event in self.crew.wait(WAIT):
                if isinstance(event, ShardDone):
                    self._account(event)
        self._report()

    def _handle(self, event: Event) -> None:
        if isinstance(event, WorkerReady):
            self._introduce(event)
        elif isinstance(event, WorkerLost):
            self._replace(event)
        elif isinstance(event, RowsReleased):
            self._again.append(self.recorder.piece(event.released))
        else:
            self._account(event)
            self._settle(event)

    def _settle(self, event: ShardDone) -> None:
        """Closes what was handed out, or has it run again."""
        is_complete = event.outcome.is_complete
        suspect = self._suspects.answered(event.worker, is_complete=is_complete)
        if suspect is None and not is_complete:
            # Another attempt has committed some of it: look again what is missing.
            self._again.append(event.shard)
        elif suspect is not None and suspect.rows.error is not None and is_complete:
            logger.warning("row %s became an error row: %s", suspect.row_id, suspect.rows.error)
            self._losses.forget()  # they have their explanation

    def _introduce(self, event: WorkerReady) -> None:
        self._losses.started()
        self._ready_at = self._ready_at or time.monotonic()
        info = event.info
        where = f"{info.node}, GPU {info.devices}" if info.devices else info.node
        logger.info("worker %d on %s: %s", event.worker, where, info.model)
        for note in info.notes:
            logger.warning("worker %d: %s", event.worker, note)

    def _account(self, event: ShardDone) -> None:
        is_last = not self.crew.holds(event.shard.index)
        self.recorder.record(event.outcome, is_last=is_last)

    def _replace(self, event: WorkerLost) -> None:
        """Has the lost shards run again, alone; the crew fills the empty place by itself."""
        logger.warning(
            "worker %d was lost (%s) with %s",
            event.worker,
            event.cause,
            " and ".join(self._suspects.describe(event.worker, each) for each in event.shards)
            or "no rows",
        )
        for shard in event.shards:
            is_last = not self.crew.holds(shard.index)
            missing = self.recorder.missing_rows(shard, is_last=is_last)
            if missing and self._is_nodes_fault(event, shard):
                self._again.append(shard)
            else:
                self._suspects.lost(shard, missing, event.worker, event.cause)
        self._losses.add(event.cause, held_rows=bool(event.shards))

    def _is_nodes_fault(self, event: WorkerLost, shard: Shard) -> bool:
        """Nodes come and go, and their rows need not run alone; unless it happens to them again."""
        if not event.with_node or self._suspects.has(event.worker):
            return False
        is_first = shard not in self._lost_with_node
        self._lost_with_node.add(shard)
        return is_first

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        committed = self._committed()
        num_done = min(committed.num_completions, self.num_completions)
        rate = self._rate.update(self.crew.num_generated_tokens, num_done)
        num_left = self.num_completions - num_done
        self.reporter.update(
            Snapshot(
                num_rows=self.num_completions,
                num_rows_done=num_done,
                num_rows_failed=committed.error,
                num_workers=self.crew.num_ready,
                tokens_per_second=rate.tokens_per_second,
                seconds_left=num_left / rate.rows_per_second if rate.rows_per_second else None,
                seconds_generating=self.seconds_generating,
                workers=self.crew.metrics(),
            )
        )
