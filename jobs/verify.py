"""Proof, from the files alone, that every input row is in the output exactly once and in order.

Reads every page of every part, checksums included, a few thousand rows at a time. Knows nothing
of the runs that made the files.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from jobs.failed_rows import noted_limit, too_many_failed
from jobs.ledger import Ledger
from jobs.lock import read_owner
from jobs.parts import PartInfo, read_part, shards_of_part
from jobs.retries import read_retries
from jobs.retry_counts import RetryCounts
from jobs.row_checks import count, wrong_row, wrong_status
from pipeline.errors import DamagedOutputError, LockedError
from pipeline.segments import (
    SegmentInfo,
    Totals,
    committed_infos,
    list_segments,
    missing_positions,
    names_in_segments,
    open_parquet,
    parse_segment_name,
    read_rows,
    reading,
    segment_name,
)
from pipeline.writer import OUTPUT_FIELDS


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found. Damage outweighs missing rows.

    Attributes:
        num_completions: output rows there are to be.
        totals: over the rows that were found good.
        damage: what is torn, altered, foreign or doubled, a sentence for each file.
        missing: what a run has yet to do, a sentence for each part.
        notes: what is worth knowing and harms nothing, such as an input that is gone.
        attempts: how many good rows were generated once, twice and so on; every retry that
            generated a row is an attempt.
    """

    num_rows: int
    num_samples: int
    num_completions: int
    totals: Totals = field(default_factory=Totals)
    damage: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """`damaged`, `incomplete` or `complete`."""
        if self.damage:
            return "damaged"
        return "incomplete" if self.missing else "complete"


def verify(folder: Path) -> VerifyReport:
    """Check the run folder; changes nothing.

    Raises:
        InputError: it is no run folder.
        OutputError: it is a newer Shardmill's, or a file of it cannot be read.
        DamagedOutputError: its manifest is damaged, so that nothing can be checked against it.
        LockedError: a run works in it.
    """
    # In full, because what the report names may be read elsewhere.
    ledger = Ledger.open(folder.absolute())
    owner = read_owner(folder)
    if owner is not None and owner.is_alive():
        raise LockedError(
            f"output folder '{folder}' is in use by another run, {owner}; verify it when that has "
            "ended, or look at `shardmill status` now"
        )
    manifest = ledger.manifest
    report = VerifyReport(manifest.num_rows, manifest.num_samples, manifest.num_completions)
    retries, segments = RetryCounts(), list_segments(ledger.folder)
    for part in range(manifest.num_parts):
        if not ledger.has_part(part):
            _check_segments(ledger, part, segments, report)
        elif info := _check_part(ledger, part, report):
            retries.add(info)
    _check_retries(ledger, retries, report)
    _check_strangers(ledger, report)
    _check_segment_names(ledger, report)
    _check_success(ledger, report)
    _check_inputs(ledger, report)
    return report


def _check_part(ledger: Ledger, part: int, report: VerifyReport) -> PartInfo | None:
    """What the part says about itself, if its rows are what they should be."""
    try:
        info = read_part(ledger.folder, ledger.manifest, part)
        totals = _check_pages(ledger, part)
    except DamagedOutputError as error:
        report.damage.append(str(error))
        return None
    if totals != info.totals:
        name = ledger.manifest.part_name(part)
        report.damage.append(f"the counts in the footer of '{name}' are not those of its rows")
    report.totals += totals
    return info


def _check_pages(ledger: Ledger, part: int) -> Totals:
    manifest = ledger.manifest
    path = ledger.folder.root / manifest.part_name(part)
    totals = Totals()
    with open_parquet(path) as file, reading(path):
        added = manifest.arrow_schema.names[-len(OUTPUT_FIELDS) :]
        pieces = shards_of_part(file, manifest, part, added)
        for shard, table in zip(manifest.part_shards(part), pieces, strict=True):
            problem = wrong_row(table, manifest, manifest.shard(shard)) or wrong_status(
                table, manifest.output_prefix
            )
            if problem:
                raise DamagedOutputError(f"'{path}', shard {shard}: {problem}")
            totals += count(table, manifest.output_prefix)
    return totals


def _check_segments(
    ledger: Ledger, part: int, segments: Collection[int], report: VerifyReport
) -> None:
    """Checks what there is of a part that is not put together yet.

    Args:
        segments: the shards of which there are any; no other one is looked at.
    """
    manifest = ledger.manifest
    num_missing = manifest.part_completions(part)
    for shard in (shard for shard in manifest.part_shards(part) if shard in segments):
        num_missing -= manifest.shard_completions(shard)
        try:
            infos = committed_infos(ledger.folder, shard, manifest.fingerprint)
            missing = missing_positions(infos, manifest.shard_completions(shard))
            if infos:
                report.totals += _check_shard(ledger, shard, infos, missing)
        except DamagedOutputError as error:
            report.damage.append(str(error))
            continue
        num_missing += len(missing)
    report.missing.append(
        f"{manifest.part_name(part)} is not put together yet; {num_missing} of its rows are not "
        "generated yet"
    )


def _check_shard(
    ledger: Ledger, shard: int, infos: list[SegmentInfo], missing: list[int]
) -> Totals:
    manifest = ledger.manifest
    table = read_rows(ledger.folder, infos)
    problem = None if table.schema.equals(manifest.arrow_schema) else "it has other columns"
    held = sorted(set(range(manifest.shard_completions(shard))) - set(missing))
    problem = (
        problem
        or wrong_row(table, manifest, manifest.shard(shard), held)
        or wrong_status(table, manifest.output_prefix)
    )
    totals = Totals() if problem else count(table, manifest.output_prefix)
    if problem is None and totals != sum((info.totals for info in infos), Totals()):
        problem = "the counts in the footer are not those of the rows"
    if problem:
        path = ledger.folder.segments / segment_name(shard, 0)
        raise DamagedOutputError(f"'{path}' or another commit of shard {shard}: {problem}")
    return totals


def _check_retries(ledger: Ledger, retries: RetryCounts, report: VerifyReport) -> None:
    report.attempts = retries.attempts(report.totals.num_completions)
    try:
        records = read_retries(ledger.folder)
    except DamagedOutputError as error:
        report.damage.append(str(error))
        return
    report.notes += retries.notes(records, ledger.folder.root)


def _check_strangers(ledger: Ledger, report: VerifyReport) -> None:
    manifest, root = ledger.manifest, ledger.folder.root
    expected = {manifest.part_name(part) for part in range(manifest.num_parts)} | {"_SUCCESS"}
    for top in sorted(root.iterdir()):
        if top.name in expected or top.name.startswith("."):
            continue
        for path in (top, *sorted(top.rglob("*"))):
            if path.suffix == ".parquet":
                report.damage.append(f"'{path}' is no part of this job, yet readers take it in")
            elif path.is_file():
                report.notes.append(f"'{path}' is not of this job")


def _check_segment_names(ledger: Ledger, report: VerifyReport) -> None:
    for name in sorted(names_in_segments(ledger.folder)):
        if parse_segment_name(name) is None:
            report.damage.append(f"'{ledger.folder.segments / name}' is no segment")
    num_leftovers = 0
    for shard, commits in list_segments(ledger.folder).items():
        if ledger.is_rolled_up(shard):
            # A worker that woke up late may have committed once more, under any number.
            num_leftovers += len(commits)
        elif shard >= ledger.manifest.num_shards or commits != list(range(len(commits))):
            report.damage.append(
                f"'{ledger.folder.segments / segment_name(shard, commits[-1])}' belongs to no "
                "shard of this job, or an earlier commit of its shard is gone"
            )
    if num_leftovers:
        report.notes.append(
            f"'{ledger.folder.segments}' still holds segments of shards that are in a part "
            f"({num_leftovers}); the next run removes them"
        )


def _check_success(ledger: Ledger, report: VerifyReport) -> None:
    exists = ledger.folder.success.exists()
    if exists and report.missing:
        report.damage.append(f"'{ledger.folder.success}' is there although parts are missing")
    if exists or report.missing or report.damage:
        return
    problem = "run the same command again to finish"
    if (max_failed := noted_limit(ledger.folder)) is not None:
        problem = too_many_failed(report.totals.error, max_failed)
    report.missing.append(f"_SUCCESS: all parts are there; {problem}")


def _check_inputs(ledger: Ledger, report: VerifyReport) -> None:
    for file in ledger.manifest.files:
        staged = _staged(ledger, Path(file.path))
        path = staged or Path(file.path)
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            report.notes.append(f"input '{path}' is gone")
        except OSError as error:
            report.notes.append(f"input '{path}' cannot be looked at: {error.strerror}")
        else:
            if staged is None and size != file.size:
                report.notes.append(f"input '{path}' has changed since the job was started")


def _staged(ledger: Ledger, path: Path) -> Path | None:
    """Where an input that we converted is now, as the run folder may have been moved.

    Its recorded size is that of the user's file. None if it is the user's own.
    """
    if path.parts[-4:-2] != ledger.folder.input.parts[-2:]:
        return None
    return ledger.folder.input / path.parent.name / path.name
