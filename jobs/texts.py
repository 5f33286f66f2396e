"""Facts as text for a person. Returns strings and prints nothing."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.failed_rows import too_many_failed
from jobs.progress import duration
from jobs.retries import RetryRecord
from jobs.status import Status
from jobs.verify import VerifyReport
from pipeline.host_memory import readable
from pipeline.metrics import EngineMetrics
from pipeline.segments import Totals

if TYPE_CHECKING:
    from jobs.preview import JobPlan
    from jobs.retry import RetrySummary
    from jobs.run import RunSummary


def run_text(summary: RunSummary) -> str:
    """The closing summary of a run."""
    facts = [("finished by", _reasons(summary.totals)), ("tokens", _tokens(summary.totals))]
    work = summary.work
    if work.num_new:
        rate = f"{work.tokens_per_second:,.0f} tokens/s once a worker was ready"
        facts += [("rate", rate), ("engine", _engine(work.metrics))]
    earlier = summary.totals.num_completions - work.num_new
    if earlier:
        facts.append(("earlier", f"{_count(earlier, 'completion')} by runs before this one"))
    return _lines(
        f"complete: {_count(summary.num_rows, 'row')} in {duration(summary.seconds)}",
        *facts,
        ("output", f"{_shown(summary.output)} ({_count(summary.num_parts, 'part')})"),
        ("next", f"shardmill verify {_shown(summary.output)}"),
    )


def retry_text(summary: RetrySummary) -> str:
    """The closing summary of a retry."""
    reasons = " or ".join(reason.value for reason in summary.only)
    if summary.number is None:
        return f"nothing to retry: no row of {_shown(summary.output)} is finished by {reasons}"
    facts = [("now finished by", _reasons(summary.made))]
    if summary.tokens_per_second:
        rate = f"{summary.tokens_per_second:,.0f} tokens/s once a worker was ready"
        facts.append(("rate", rate))
    rows, took = _count(summary.made.num_completions, "row"), duration(summary.seconds)
    return _lines(
        f"retried: {rows} that had been finished by {reasons}, in {took}",
        *facts,
        ("all rows", _reasons(summary.totals)),
        ("max_new_tokens", f"{summary.max_new_tokens} for the retried rows"),
        ("output", _shown(summary.output)),
        ("next", f"shardmill verify {_shown(summary.output)}"),
    )


def status_text(status: Status) -> str:
    """Where a job stands."""
    share = status.totals.num_completions / status.num_completions
    if status.is_complete and status.owner is not None:
        state = f"complete; a retry works on it: {status.owner}"
    elif status.is_complete:
        state = "complete"
    elif status.owner is not None:
        state = f"running: {status.owner}"
    elif status.has_failed and status.max_failed is not None:
        state = f"stopped: {too_many_failed(status.totals.error, status.max_failed)}"
    else:
        state = "not complete, and nobody works on it; run the same command again to continue"
    return _lines(
        state,
        (
            "completions",
            f"{status.totals.num_completions:,} of {status.num_completions:,} ({share:.1%})",
        ),
        ("finished by", _reasons(status.totals)),
        ("tokens", _tokens(status.totals)),
        ("parts", f"{status.num_parts_done} of {status.num_parts}"),
        *((f"retry {record.retry.number}", _retry(record)) for record in status.retries),
        ("started", status.created),
    )


def _retry(record: RetryRecord) -> str:
    retry = record.retry
    reasons = ", ".join(reason.value for reason in retry.only)
    asked = f"{reasons} with max_new_tokens {retry.max_new_tokens}, started {retry.created}"
    if record.result is None:
        return f"{asked}: not finished; `shardmill retry` on this folder goes on with it"
    return f"{asked}: {_reasons(record.result.totals)}"


def verify_text(report: VerifyReport) -> str:
    """What verify has found."""
    checked = (
        f"{report.totals.num_completions:,} of {report.num_completions:,} completions are there"
    )
    verdicts = {
        "complete": f"complete: every row exactly once, in order ({checked})",
        "incomplete": f"incomplete, and nothing is wrong with what is there: {checked}",
        "damaged": f"damaged: {checked}",
    }
    return "\n".join([verdicts[report.state], *report.damage, *report.missing, *report.notes])


def plan_text(plan: JobPlan) -> str:
    """What a job would do."""
    rows = plan.rows
    sampled = _count(rows.num_sampled, "sampled row")
    prompts = (
        f"{rows.prompt_tokens_median} tokens at the median, {rows.prompt_tokens_p90} at the 90th "
        f"percentile, {rows.prompt_tokens_max} at most, of {sampled}"
    )
    files, samples = _count(plan.num_files, "file"), _count(plan.num_samples, "sample")
    shards, parts = _count(rows.num_shards, "shard"), _count(rows.num_parts, "part")
    return _lines(
        f"plan of {plan.name}",
        ("rows", f"{rows.num_rows:,} in {files}, {samples} each"),
        ("cut into", f"{shards} of at most {plan.shard_rows} rows, {parts}"),
        ("prompts", prompts),
        ("too long", f"{rows.num_overlong} of {sampled}"),
        ("failing", f"{rows.num_failed} of {sampled}"),
        *(("", failure) for failure in rows.failures),
        ("completions", f"at most {plan.max_new_tokens} tokens each, {plan.most_tokens:,} in all"),
        ("generation", plan.generation),
        ("model", plan.model),
        ("memory", _memory(plan)),
        ("columns", ", ".join(plan.columns)),
        ("output", f"{_shown(Path(plan.output))}: {plan.state}"),
        ("time", "shown by the run itself, once the first rows are done"),
    )


def _memory(plan: JobPlan) -> str:
    memory = plan.memory
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    return (
        f"{readable(memory.weights)} weights and {readable(memory.cache)} cache for each worker, "
        f"{readable(memory.available)} {memory.where}: {verdict}"
    )


def _lines(title: str, *parts: tuple[str, str]) -> str:
    width = max(len(name) for name, _ in parts)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in parts)])


def _engine(metrics: EngineMetrics) -> str:
    """How a worker's time was spent, on average, and how well its slots were used."""
    busy = metrics.prefill_seconds + metrics.decode_seconds
    parts = [
        f"slots {metrics.slot_occupancy:.0%} full",
        f"{metrics.prefill_seconds / busy if busy else 0:.0%} of the time prefill",
        f"{metrics.padding_share:.0%} padding",
    ]
    if metrics.num_saved_tokens:
        parts.append(f"{metrics.num_saved_tokens:,} prompt tokens shared")
    return ", ".join(parts)


def _reasons(totals: Totals) -> str:
    return f"stop {totals.stop:,}, length {totals.length:,}, error {totals.error:,}"


def _tokens(totals: Totals) -> str:
    return f"{totals.num_prompt_tokens:,} prompt, {totals.num_completion_tokens:,} completion"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _shown(path: Path) -> str:
    """As short as it can be typed, and quoted for a shell."""
    short = os.path.relpath(path)
    return shlex.quote(short if len(short) < len(str(path)) else str(path))
