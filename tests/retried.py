"""Retries of small jobs without Ray or a model, for tests of what is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from jobs.config import load_job
from jobs.ledger import Ledger
from jobs.opening import open_or_create, prepare
from jobs.parts import finish
from jobs.prepare import prepare_job
from jobs.recorder import Recorder
from jobs.retries import Retry, RetryResult, finish_retry, read_retries, start_retry
from jobs.retry_ledger import RetryLedger, retried
from pipeline.outcome import ShardOutcome
from pipeline.records import Completion, FinishReason, RequestId, Shard
from pipeline.segments import SegmentInfo, Totals, missing_positions
from pipeline.writer import Seen, SegmentWriter

Answer = Callable[[Shard, int, int], Completion]


def good(shard: Shard, row: int, sample: int) -> Completion:
    """What the pretended model says when it is asked again."""
    text = f"at last {shard.row_id(row)}/{sample}"
    return Completion(RequestId(shard.index, row, sample), text, FinishReason.STOP, None, 10, 4)


def bad(shard: Shard, row: int, sample: int) -> Completion:
    """A row that fails again."""
    identity = RequestId(shard.index, row, sample)
    return Completion(identity, None, FinishReason.ERROR, error="test: failed again")


def make_retry(number: int = 1, *only: FinishReason, max_new_tokens: int = 8) -> Retry:
    """A retry of error rows, or of those named."""
    return Retry(
        number=number,
        created="2026-01-02T00:00:00+00:00",
        versions={"torch": "1"},
        only=only or (FinishReason.ERROR,),
        max_new_tokens=max_new_tokens,
        fingerprint=f"retry {number}",
    )


def open_retry(base: Ledger, retry: Retry) -> RetryLedger:
    """The retry's ledger, read anew; the retry is started if it was not."""
    ledger = RetryLedger.choose(base, retry, base.parts(), base.manifest.files)
    if retry.number not in [record.retry.number for record in read_retries(base.folder)]:
        start_retry(base.folder, retry)
    return ledger


def commit(ledger: RetryLedger, shard: Shard, answer: Answer = good) -> SegmentInfo:
    """Commits what a shard of the retry wants, as the worker would."""
    manifest = ledger.manifest
    writer = SegmentWriter(
        ledger.folder.root,
        fingerprint=manifest.fingerprint,
        schema=manifest.arrow_schema,
        num_samples=manifest.num_samples,
        worker="worker-0",
    )
    wanted = shard.wanted(missing_positions([], manifest.shard_completions(shard.index)))
    completions = [answer(shard, *divmod(p, manifest.num_samples)) for p in wanted]
    return writer.write(shard, _input_rows(shard), completions, Seen(0))


def _input_rows(shard: Shard) -> pa.Table:
    return pq.read_table(shard.path).slice(shard.first_row, shard.num_rows)


def do_retry(base: Ledger, retry: Retry, answer: Answer = good) -> RetryLedger:
    """A whole retry, from wherever an earlier one was left."""
    ledger = open_retry(base, retry)
    with Recorder(ledger) as recorder:
        for shard in list(recorder.shards_left()):
            recorder.record(ShardOutcome(shard.index, (commit(ledger, shard, answer),), True))
        recorder.wait()
    made = [rows.totals for info in base.parts() if (rows := retried(info, retry.number))]
    finish_retry(base.folder, retry, RetryResult(finished="now", totals=sum(made, Totals())))
    finish(base.folder, base.manifest)
    return ledger


def make_finished(job: Path, *, is_good: bool = False) -> Path:
    """The complete run folder of a job file; row 1 failed and row 2 was cut, unless all is good."""
    config = load_job(job)
    folder = prepare(Path(config.output.path))
    prepared = prepare_job(config, folder.input)
    ledger = open_or_create(folder.root, prepared.manifest())
    manifest = ledger.manifest
    for index in range(manifest.num_shards):
        shard = manifest.shard(index)
        answers = [good(shard, row, 0) for row in range(shard.num_rows)]
        if index == 0 and not is_good:
            answers[1] = bad(shard, 1, 0)
            answers[2] = replace(good(shard, 2, 0), finish_reason=FinishReason.LENGTH)
        writer = SegmentWriter(
            folder.root,
            fingerprint=manifest.fingerprint,
            schema=manifest.arrow_schema,
            num_samples=1,
            worker="worker-0",
        )
        writer.write(shard, _input_rows(shard), answers, Seen(0))
    for part in range(manifest.num_parts):
        ledger.roll_up(part)
    finish(folder, manifest)
    return folder.root


def read(folder: Path) -> pa.Table:
    """The output as any reader sees it."""
    return ds.dataset(folder, format="parquet").to_table()
