"""Takes note of what workers commit, and rolls parts up beside the run as they become whole."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

from jobs.ledger import Ledger
from jobs.parts import PartInfo
from pipeline.outcome import Released, ShardOutcome
from pipeline.records import Shard
from pipeline.segments import SegmentInfo, Totals, committed_infos, missing_positions

logger = logging.getLogger(__name__)

_ROLL_UP_THREADS = 2  # half of the time Arrow computes, or the disk is waited for


class Recorder:
    """What is done of a job, from its folder at first and from outcomes afterwards.

    Leaving the `with` block waits for the roll-ups that have begun.

    Args:
        ledger: of a folder whose lock is held.
    """

    def __init__(self, ledger: Ledger) -> None:
        ledger.sweep()
        self._ledger = ledger
        self._state = ledger.scan()
        self._pool = ThreadPoolExecutor(_ROLL_UP_THREADS, thread_name_prefix="roll-up")
        self._roll_ups: deque[Future[PartInfo]] = deque()

    def __enter__(self) -> Recorder:
        self._roll_up_ready_parts()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    @property
    def totals(self) -> Totals:
        """Over everything committed."""
        return self._state.totals

    @property
    def num_shards_left(self) -> int:
        """Shards that lack rows."""
        return self._ledger.manifest.num_shards - self._state.num_shards_done

    def shards_left(self) -> Iterator[Shard]:
        """The shards that lack rows, in order; skips those completed meanwhile."""
        return (self._ledger.manifest.shard(index) for index in self._state.pending())

    def piece(self, released: Released) -> Shard:
        """The shard, with what a worker has released as all that is to be generated of it."""
        return replace(self._ledger.manifest.shard(released.shard), chosen=released.positions)

    def record(self, outcome: ShardOutcome, *, is_last: bool = True) -> None:
        """Takes note of one attempt's commits.

        Args:
            is_last: no other worker has rows of this shard, and none will tell of them.

        Raises:
            ShardmillError: an earlier roll-up has failed.
        """
        self._state.add(outcome.commits)
        if is_last and outcome.is_complete and not self._state.is_complete(outcome.shard):
            # Completed by commits that no answer told of: their worker was lost right after.
            self._state.add(self._committed(outcome.shard))
        self._roll_up_ready_parts()

    def is_complete(self, shard: int) -> bool:
        """Whether all of a shard is committed, as far as is known."""
        return self._state.is_complete(shard)

    def missing_rows(self, shard: Shard, *, is_last: bool = True) -> list[int]:
        """The rows that a shard lacks after its worker was lost, rising, from 0 within it.

        Args:
            is_last: no other worker has rows of this shard. Then note is taken of commits that no
                answer told of.
        """
        if self._state.is_complete(shard.index):
            return []
        manifest, infos = self._ledger.manifest, self._committed(shard.index)
        if is_last:
            self._state.add(infos)
            self._roll_up_ready_parts()
        total = manifest.shard_completions(shard.index)
        missing = shard.wanted(missing_positions(infos, total))
        return sorted({position // manifest.num_samples for position in missing})

    def _committed(self, shard: int) -> list[SegmentInfo]:
        return committed_infos(self._ledger.folder, shard, self._ledger.manifest.fingerprint)

    def wait(self) -> None:
        """Waits for the roll-ups; raises what has gone wrong in them."""
        while self._roll_ups:
            self._finish_roll_up()

    def _roll_up_ready_parts(self) -> None:
        for part in self._state.take_ready_parts():
            self._roll_ups.append(self._pool.submit(self._ledger.roll_up, part))
        while self._roll_ups and self._roll_ups[0].done():
            self._finish_roll_up()

    def _finish_roll_up(self) -> None:
        """Takes note of the oldest roll-up; waits for it."""
        part = self._roll_ups[0].result().part
        self._roll_ups.popleft()
        self._state.mark_part(part)
        logger.info("%s is complete", self._ledger.manifest.part_name(part))
