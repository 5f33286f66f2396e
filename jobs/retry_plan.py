"""What a retry is asked for, held against the run folder: the same job, but for one setting."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from jobs import __version__
from jobs.config import JobConfig, build_job
from jobs.differences import differences
from jobs.fingerprint import fingerprint
from jobs.ledger import Ledger
from jobs.manifest import Manifest, PlannedFile
from jobs.opening import job_differences
from jobs.parts import PartInfo
from jobs.prepare import PreparedJob, prepare_job
from jobs.retries import Retry
from pipeline.errors import JobDiffersError, JobFileError
from pipeline.records import FinishReason

logger = logging.getLogger(__name__)

LIMIT = "generation.max_new_tokens"
"""The one setting that changes answers and may be raised: a row it did not cut stays as it is."""


@dataclass(frozen=True, slots=True)
class RetryPlan:
    """A retry that can go on.

    Attributes:
        prepared: the folder's job, with the retry's `LIMIT`.
        files: the input, as it is named now.
        is_new: nothing of it has been written yet.
    """

    retry: Retry
    prepared: PreparedJob
    files: tuple[PlannedFile, ...]
    is_new: bool


def now() -> str:
    """The moment, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plan_retry(
    base: Ledger,
    infos: Sequence[PartInfo],
    number: int,
    only: Sequence[FinishReason],
    overrides: Sequence[str],
) -> RetryPlan:
    """A new retry; nothing is written.

    Args:
        base: of a complete folder.
        infos: of all its parts.
        number: of the retry.
        only: the finish reasons of the rows to be generated again.
        overrides: `a.b=value` each.

    Raises:
        JobFileError: it would leave the rows as they are, or lower `LIMIT`.
        JobDiffersError: it would change another setting that changes answers.
        ShardmillError: the job can no longer run; see `prepare_job`.
    """
    before = _limit(base, infos)
    prepared, manifest = _prepare(base, before, overrides)
    limit = prepared.sampling.max_new_tokens
    if limit < before:
        raise JobFileError(
            f"{LIMIT} {limit} is less than {before}, with which rows of this folder were "
            "generated; a retry can only raise it"
        )
    if FinishReason.LENGTH in only and limit == before:
        raise JobFileError(
            f"--only length needs --set {LIMIT}=N with more than {before}: with the same limit "
            "the same rows would be cut at the same place"
        )
    created = now()
    retry = Retry(
        number=number,
        created=created,
        versions={"shardmill": __version__, **manifest.versions},
        only=tuple(only),
        max_new_tokens=limit,
        fingerprint=fingerprint({"retry": number, "at": created, "job": manifest.fingerprint}),
    )
    return RetryPlan(retry, prepared, manifest.files, is_new=True)


def plan_continued(
    base: Ledger, retry: Retry, only: Sequence[FinishReason], overrides: Sequence[str]
) -> RetryPlan:
    """An unfinished retry; `only` and `LIMIT` may be left out, or must be the ones it has.

    Raises:
        JobDiffersError: they are not.
        ShardmillError: see `plan_retry`.
    """
    prepared, manifest = _prepare(base, retry.max_new_tokens, overrides)
    has_other_rows = bool(only) and set(only) != set(retry.only)
    if has_other_rows or prepared.sampling.max_new_tokens != retry.max_new_tokens:
        reasons = ",".join(reason.value for reason in retry.only)
        raise JobDiffersError(
            f"retry {retry.number} of '{base.folder.root}' is unfinished, with --only {reasons} "
            f"and {LIMIT} {retry.max_new_tokens}; go on with these, or end it as it stands and "
            "start another one with --fresh"
        )
    return RetryPlan(retry, prepared, manifest.files, is_new=False)


def _limit(base: Ledger, infos: Sequence[PartInfo]) -> int:
    """The largest `LIMIT` that rows of the folder were generated with."""
    limits = [rows.max_new_tokens for info in infos for rows in info.retries]
    return max(_limit_of(base), *limits, 0)


def _limit_of(base: Ledger) -> int:
    """`LIMIT` of the run itself."""
    return _job(base, ()).generation.max_new_tokens


def _job(base: Ledger, overrides: Sequence[str]) -> JobConfig:
    values = copy.deepcopy(dict(base.manifest.job))
    return build_job(values, overrides, base.folder.manifest)


def _prepare(base: Ledger, limit: int, overrides: Sequence[str]) -> tuple[PreparedJob, Manifest]:
    job = _job(base, (f"{LIMIT}={limit}", *overrides))
    if job.prompt.overlong != "error" and job.generation.max_new_tokens != _limit_of(base):
        raise JobDiffersError(
            f"{LIMIT} cannot be raised where prompt.overlong is {job.prompt.overlong}: long "
            "prompts would be cut further, and answered anew; retry with the limit as it is"
        )
    prepared = prepare_job(job, base.folder.input)
    manifest = prepared.manifest(base.manifest.files)
    _check_job(base, manifest)
    return prepared, manifest


def _check_job(base: Ledger, new: Manifest) -> None:
    """Refuses whatever would give other answers, but for `LIMIT`."""
    old = base.manifest
    fields = new.fingerprint_fields | {LIMIT: old.fingerprint_fields[LIMIT]}
    same = {"fingerprint_fields": fields, "fingerprint": fingerprint(fields)}
    if lines := job_differences(old, new.model_copy(update=same)):
        raise JobDiffersError(
            f"output folder '{base.folder.root}' was started with another job, and a retry may "
            f"change no setting that changes answers, but for {LIMIT}; put back what differs "
            "(then -> now):\n  " + "\n  ".join(lines)
        )
    if changed := differences(old.versions, new.versions):
        logger.warning("the folder was started with other libraries: %s", "; ".join(changed))
