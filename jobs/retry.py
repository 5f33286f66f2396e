"""`shardmill retry`: chosen rows of a complete run folder, generated again and put in place.

lock the folder -> the job it was started with -> which rows -> Ray -> workers -> parts -> result
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.cluster import shape_workers
from jobs.ledger import Ledger
from jobs.lock import RunLock
from jobs.opening import prepare
from jobs.parts import PartInfo, finish
from jobs.plan import choose_shards_in_flight
from jobs.prepare import PreparedJob
from jobs.progress import Reporter
from jobs.retries import (
    Retry,
    RetryResult,
    finish_retry,
    prepare_retry,
    read_retries,
    start_retry,
)
from jobs.retry_ledger import RetryLedger, retried
from jobs.retry_plan import RetryPlan, now, plan_continued, plan_retry
from jobs.run import Budget, Run, RunOptions, logging_to
from jobs.stop import StopRequest
from pipeline.errors import InputError
from pipeline.records import FinishReason
from pipeline.segments import Totals

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetrySummary:
    """How a retry ended that is finished.

    Attributes:
        number: of the retry; None if there was nothing to do.
        only: the finish reasons of the rows it was for.
        made: what came of the rows it generated again, over all its runs.
        totals: over the whole output, afterwards.
        max_new_tokens: for these rows.
        tokens_per_second: of what this run committed, since its first worker was ready.
    """

    output: Path
    number: int | None
    only: tuple[FinishReason, ...]
    made: Totals
    totals: Totals
    max_new_tokens: int
    seconds: float
    tokens_per_second: float


def retry_rows(
    folder: Path,
    only: Sequence[FinishReason],
    overrides: Sequence[str],
    options: RunOptions,
    reporter: Reporter,
) -> RetrySummary:
    """Generates the rows with these finish reasons again, and swaps them in.

    A retry that was interrupted is continued.

    Args:
        folder: of a complete run.
        only: empty is what the unfinished retry has, or else errors.
        overrides: `a.b=value` each: settings that change no answer, and `retry_plan.LIMIT`.
        options: `fresh` ends an unfinished retry as it stands.

    Raises:
        ShardmillError: see `pipeline.errors`; what was committed stays.
    """
    stop = StopRequest(options.stop_file, options.max_walltime)
    with stop.listening():
        stop.check()
        # In full, because workers are told the path.
        base = Ledger.open(folder.absolute())
        root = base.folder.root
        with RunLock(root), logging_to(prepare(root)):  # a copy may lack what was empty
            return _Retrying(base, options, stop, reporter).run(only, overrides)


@dataclass(frozen=True, slots=True)
class _Retrying:
    base: Ledger
    options: RunOptions
    stop: StopRequest
    reporter: Reporter

    def run(self, only: Sequence[FinishReason], overrides: Sequence[str]) -> RetrySummary:
        started = time.monotonic()
        self._check_complete()
        infos = self.base.parts()
        plan = self._plan(infos, only, overrides)
        self.stop.check()
        ledger = RetryLedger.choose(self.base, plan.retry, infos, plan.files)
        if plan.is_new and ledger.is_complete:
            self._end_unfinished()
            return self._summary(plan.retry, None, Totals(), started, 0.0)
        rate = self._complete(ledger, plan)
        made = self._end(plan.retry)
        return self._summary(plan.retry, plan.retry.number, made, started, rate)

    def _check_complete(self) -> None:
        if not self.base.is_complete:
            raise InputError(
                f"the run in '{self.base.folder.root}' is not complete, and a retry needs all rows "
                "to be there; finish it first with `shardmill run` and its job file"
            )

    def _plan(
        self, infos: Sequence[PartInfo], only: Sequence[FinishReason], overrides: Sequence[str]
    ) -> RetryPlan:
        records = read_retries(self.base.folder)
        if records and records[-1].result is None and not self.options.fresh:
            return plan_continued(self.base, records[-1].retry, only, overrides)
        numbers = [record.retry.number for record in records]
        numbers += [rows.retry for info in infos for rows in info.retries]
        number = max(numbers, default=0) + 1
        return plan_retry(self.base, infos, number, only or [FinishReason.ERROR], overrides)

    def _complete(self, ledger: RetryLedger, plan: RetryPlan) -> float:
        """Does what is left; returns the tokens per second."""
        self._log(ledger, plan.prepared)
        if not plan.is_new:
            prepare_retry(self.base.folder, plan.retry.number)
        if ledger.is_complete:
            ledger.sweep()  # died between its last part and its result
            return 0.0
        job = plan.prepared.job
        budget = Budget(
            ledger.num_completions,
            ledger.num_completions,  # no row fails that did not fail before
            shards_in_flight(ledger, job.engine.batch_size),
            num_generated_before=sum(info.totals.num_generated for info in self.base.parts()),
        )
        run = Run(plan.prepared, self.base.folder, self.options, self.stop, self.reporter)
        with run.ray() as resources:
            # A retry that asks for more than there is leaves nothing behind.
            shape_workers(job.workers, resources, num_shards=1)
            if plan.is_new:
                self._end_unfinished()
                start_retry(self.base.folder, plan.retry)
            return run.complete(ledger, resources, budget).tokens_per_second

    def _log(self, ledger: RetryLedger, prepared: PreparedJob) -> None:
        retry = ledger.retry
        logger.info(
            "retry %d: %d of %d rows (%s), %d of them put in already -> %s",
            retry.number,
            ledger.num_completions,
            self.base.manifest.num_completions,
            ", ".join(reason.value for reason in retry.only),
            ledger.num_completions - ledger.chosen.num_completions,
            self.base.folder.root,
        )
        logger.info("generation: %s", prepared.describe_generation())

    def _end_unfinished(self) -> None:
        for record in read_retries(self.base.folder):
            if record.result is None:
                self._end(record.retry)
                logger.info("retry %d was ended as it stood", record.retry.number)

    def _end(self, retry: Retry) -> Totals:
        """Writes down what the retry has put in."""
        infos = self.base.parts()
        made = sum((x.totals for info in infos if (x := retried(info, retry.number))), Totals())
        finish_retry(self.base.folder, retry, RetryResult(finished=now(), totals=made))
        return made

    def _summary(
        self, retry: Retry, number: int | None, made: Totals, started: float, rate: float
    ) -> RetrySummary:
        return RetrySummary(
            output=self.base.folder.root,
            number=number,
            only=retry.only,
            made=made,
            totals=finish(self.base.folder, self.base.manifest),
            max_new_tokens=retry.max_new_tokens,
            seconds=time.monotonic() - started,
            tokens_per_second=rate,
        )


def shards_in_flight(ledger: RetryLedger, batch_size: int) -> int:
    """As in a run, though little is left of each shard."""
    shards = [shard for part in ledger.chosen.parts for shard in ledger.manifest.part_shards(part)]
    num_shards = sum(bool(ledger.chosen.of_shard(shard)) for shard in shards)
    return choose_shards_in_flight(ledger.chosen.num_completions / num_shards, batch_size)
