"""Where a job stands, from its folder alone, whether it runs or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.failed_rows import noted_limit
from jobs.ledger import Ledger
from jobs.lock import Owner, read_owner
from jobs.retries import RetryRecord, read_retries
from jobs.state import JobState
from pipeline.segments import Totals

WATCH_INTERVAL = 2.0
"""Seconds between two looks."""

_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class Status:
    """Where a job stands.

    Attributes:
        num_completions: output rows there are to be: rows times samples.
        totals: over what is committed.
        is_complete: `_SUCCESS` and all parts are there.
        max_failed: completions that the last run allowed to be errors, if it ended because there
            were more.
        owner: the run that works on it now, or None.
        retries: of the complete folder, by rising number.
    """

    created: str
    job: dict[str, object]
    num_rows: int
    num_samples: int
    num_completions: int
    totals: Totals
    num_parts: int
    num_parts_done: int
    is_complete: bool
    max_failed: int | None
    owner: Owner | None
    retries: tuple[RetryRecord, ...] = ()

    @property
    def has_failed(self) -> bool:
        """Whether it has stopped because too many rows have failed."""
        return not self.is_complete and self.owner is None and self.max_failed is not None


def read_status(folder: Path) -> Status:
    """Where the job of a run folder stands; takes no lock and writes nothing.

    Raises:
        InputError: it is no run folder.
        OutputError: it is a newer Shardmill's, or a file of it cannot be read.
        DamagedOutputError: a file of it is torn or foreign.
    """
    ledger = Ledger.open(folder)
    manifest = ledger.manifest
    # Before anything is counted: if nobody is at work now, nothing comes after the count.
    owner = read_owner(folder)
    is_at_work, is_complete = owner is not None and owner.is_alive(), ledger.is_complete
    state = _scan(ledger)
    return Status(
        created=manifest.created,
        job=dict(manifest.job),
        num_rows=manifest.num_rows,
        num_samples=manifest.num_samples,
        num_completions=manifest.num_completions,
        totals=state.totals,
        num_parts=manifest.num_parts,
        num_parts_done=state.num_parts_done,
        is_complete=is_complete,
        max_failed=noted_limit(ledger.folder),
        owner=owner if is_at_work else None,
        retries=tuple(read_retries(ledger.folder)),
    )


def watch_status(folder: Path) -> Iterator[Status]:
    """As `read_status`, again and again until nobody works on the job, complete or not."""
    while True:
        status = read_status(folder)
        yield status
        if status.owner is None:
            return
        time.sleep(WATCH_INTERVAL)


def _scan(ledger: Ledger) -> JobState:
    # A running driver may roll up, and so remove, segments between our listing and our reading.
    for _ in range(_ATTEMPTS - 1):
        try:
            return ledger.scan()
        except FileNotFoundError:
            continue
    return ledger.scan()
