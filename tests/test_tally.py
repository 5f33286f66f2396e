"""Tests of `jobs.tally`: a quick look that is never believed against the files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import jobs.ledger
from jobs.manifest import Manifest
from jobs.parts import PartInfo, read_part
from jobs.state import JobState
from jobs.status import read_status
from jobs.verify import verify
from pipeline.errors import DamagedOutputError
from pipeline.folder import RunFolder
from tests.retried import do_retry, make_retry
from tests.run_folders import SmallJob


@pytest.fixture
def job(tmp_path: Path) -> SmallJob:
    """A complete job of three parts, put together as a run does it."""
    job = SmallJob(tmp_path, num_samples=2)
    job.commit_all()
    for part in range(job.manifest.num_parts):
        job.ledger.roll_up(part)
    return job


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts whose footers a ledger reads from now on."""
    parts: list[int] = []

    def read(folder: RunFolder, manifest: Manifest, part: int) -> PartInfo:
        parts.append(part)
        return read_part(folder, manifest, part)

    monkeypatch.setattr(jobs.ledger, "read_part", read)
    return parts


def _facts(state: JobState) -> tuple[object, ...]:
    return state.totals, state.num_parts_done, state.num_shards_done, list(state.pending())


def test_no_part_is_opened_twice(job: SmallJob, opened: list[int]) -> None:
    """What was noted when a part was published is what its footer says."""
    noted = job.ledger.scan()
    assert opened == []
    job.folder.tally.unlink()
    assert _facts(job.ledger.scan()) == _facts(noted)
    assert sorted(opened) == [0, 1, 2]


def test_a_note_is_of_one_file(job: SmallJob, opened: list[int]) -> None:
    """A part that was written to since is opened, whatever was noted of it."""
    os.utime(job.path / job.manifest.part_name(1), ns=(0, 0))
    job.ledger.scan()
    assert opened == [1]


def test_a_retry_notes_what_it_puts_in(job: SmallJob, opened: list[int]) -> None:
    """Where a part takes another's place, its note does too."""
    job.finish()
    do_retry(job.ledger, make_retry())
    opened.clear()
    assert read_status(job.path).totals == verify(job.path).totals
    assert opened == []


def test_a_noted_part_may_be_gone_or_torn(job: SmallJob) -> None:
    """No note stands for a part: one that is gone is done again, one that is torn is found."""
    part = job.path / job.manifest.part_name(1)
    content = part.read_bytes()
    part.unlink()
    state = job.ledger.scan()
    assert (state.num_parts_done, list(state.pending())) == (2, list(job.manifest.part_shards(1)))
    part.write_bytes(content[:-1])
    with pytest.raises(DamagedOutputError, match="part-00001"):
        job.ledger.scan()


@pytest.mark.parametrize("tail", [b"[1, 2", b'"\xff"\n', b"7\n", b"{}\n", b"\0\0", "three numbers"])
def test_a_torn_tally_costs_footers(job: SmallJob, opened: list[int], tail: bytes | str) -> None:
    """A death or a power cut while a note is written takes that note and harms none before it."""
    before = _facts(job.ledger.scan())
    first, second, third = job.folder.tally.read_bytes().splitlines(keepends=True)
    if isinstance(tail, str):
        tail = json.dumps(json.loads(third)[:3]).encode()
    job.folder.tally.write_bytes(first + second + tail)
    assert _facts(job.ledger.scan()) == before
    assert opened == [2]
