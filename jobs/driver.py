"""Hands shards to workers until every one is complete, or the run is to stop.

The driver holds no prompt and no completion. What is done it learns from the run folder before it
starts and from the workers' answers afterwards; if it dies, the folder still tells.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from dataclasses import dataclass

from jobs.crew import Crew, Event, ShardDone, WorkerLost, WorkerReady
from jobs.progress import Reporter, Snapshot
from jobs.recorder import Recorder
from jobs.stop import StopRequest
from pipeline.errors import TooManyFailedRowsError, WorkerError
from pipeline.records import Shard
from pipeline.segments import Totals

logger = logging.getLogger(__name__)

WAIT = 0.5
"""Seconds to wait for an event before looking at signals and limits again."""

MAX_LOSSES_OF_SHARD = 3
"""Workers that may be lost with the same shard before the run ends."""

MAX_LOSSES_WITHOUT_COMMIT = 6
"""Workers that may be lost one after the other with nothing committed in between."""


def check_failed(totals: Totals, max_failed: int) -> None:
    """Refuses to go on, or to call a job complete, with too many failed rows.

    Raises:
        TooManyFailedRowsError: with both numbers.
    """
    if totals.error > max_failed:
        raise TooManyFailedRowsError(
            f"{totals.error} rows ended in an error and failure.max_failed_rows allows "
            f"{max_failed}; raise that and run the same command to keep them as they are, or mend "
            "the cause and start over with --fresh"
        )


@dataclass(kw_only=True)
class Driver:
    """One run over the shards that are still to be done.

    Attributes:
        recorder: knows what is done and what is left.
        num_completions: of the whole job, done or not.
        max_failed: completions that may be errors.
        grace: seconds that workers have to commit when the run is to stop.
    """

    crew: Crew
    recorder: Recorder
    num_completions: int
    max_failed: int
    stop: StopRequest
    reporter: Reporter
    grace: float

    def __post_init__(self) -> None:
        self._shards = self.recorder.shards_left()
        self._again: deque[Shard] = deque()
        self._losses_of_shard: Counter[int] = Counter()
        self._losses_in_a_row = 0
        self._num_commits = 0
        self._suspects: deque[Shard] = deque()
        self._is_handed_out = False
        self._rate = _Rate()
        self._ready_at: float | None = None

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
        while not self._is_handed_out or self.crew.num_in_flight or self._again or self._suspects:
            self._check_limits()
            self.crew.start()
            self._hand_out()
            for event in self.crew.wait(WAIT):
                self._handle(event)
            self._report()

    def _check_limits(self) -> None:
        if self.recorder.totals.error > self.max_failed:
            self._drain()
            check_failed(self.recorder.totals, self.max_failed)
        if self.stop.reason():
            self._drain()
            self.stop.check()

    def _hand_out(self) -> None:
        reserved = self._hand_out_suspects()
        for worker in self.crew.free_places():
            if worker == reserved:
                continue
            shard = self._again.popleft() if self._again else next(self._shards, None)
            if shard is None:
                self._is_handed_out = True
                return
            self.crew.hand(worker, shard)

    def _hand_out_suspects(self) -> int | None:
        """Gives each suspect to a worker that holds nothing; the worker kept free for the next."""
        while self._suspects:
            worker, num_held = self.crew.least_busy() or (None, 0)
            if worker is None or num_held:
                return worker
            self.crew.hand(worker, self._suspects.popleft(), alone=True)
        return None

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
        else:
            self._account(event)
            if not event.outcome.is_complete:
                # Another attempt, of a run that died, has committed: look again what is missing.
                self._again.append(event.shard)

    def _introduce(self, event: WorkerReady) -> None:
        self._ready_at = self._ready_at or time.monotonic()
        info = event.info
        where = f"{info.node}, GPU {info.devices}" if info.devices else info.node
        logger.info("worker %d on %s: %s", event.worker, where, info.model)
        for note in info.notes:
            logger.warning("worker %d: %s", event.worker, note)

    def _account(self, event: ShardDone) -> None:
        self.recorder.record(event.outcome)

    def _replace(self, event: WorkerLost) -> None:
        """Puts the lost shards back; the crew fills the empty place by itself."""
        held = f"{len(event.shards)} shards, which run again"
        logger.warning("worker %d was lost (%s) with %s", event.worker, event.cause, held)
        # One of them may be what the worker died of: each runs alone from now on, so that the
        # next loss names the right one.
        self._suspects.extend(event.shards)
        self._losses_in_a_row += 1
        self._losses_of_shard.update(shard.index for shard in event.shards)
        for shard in event.shards:
            if self._losses_of_shard[shard.index] >= MAX_LOSSES_OF_SHARD:
                last = shard.first_row + shard.num_rows - 1
                raise WorkerError(
                    f"{MAX_LOSSES_OF_SHARD} workers were lost while they held rows "
                    f"{shard.row_id(0)} to {last} (the last one: {event.cause}); the logs in "
                    ".shardmill/logs say more"
                )
        if self._losses_in_a_row >= MAX_LOSSES_WITHOUT_COMMIT:
            raise WorkerError(
                f"{self._losses_in_a_row} workers were lost and nothing was committed in between "
                f"(the last one: {event.cause}); the logs in .shardmill/logs say more"
            )

    def _report(self) -> None:
        if self.crew.num_commits != self._num_commits:
            self._num_commits, self._losses_in_a_row = self.crew.num_commits, 0
        committed = self.recorder.totals + self.crew.interim
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
            )
        )


class _Rate:
    """Tokens per second over the last half minute, rows per second over the run."""

    WINDOW = 30.0

    def __init__(self) -> None:
        self._tokens: deque[tuple[float, int]] = deque()
        self._first: tuple[float, int] | None = None
        self.tokens_per_second = 0.0
        self.rows_per_second = 0.0

    def update(self, num_tokens: int, num_rows: int) -> _Rate:
        now = time.monotonic()
        if num_tokens and self._first is None:
            self._first = (now, num_rows)
        self._tokens.append((now, num_tokens))
        while now - self._tokens[0][0] > self.WINDOW and len(self._tokens) > 2:
            self._tokens.popleft()
        since, before = self._tokens[0]
        if now > since:
            self.tokens_per_second = (num_tokens - before) / (now - since)
        if self._first is not None and now > self._first[0]:
            self.rows_per_second = (num_rows - self._first[1]) / (now - self._first[0])
        return self
