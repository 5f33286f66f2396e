"""What the published parts hold, noted in one file, so that not every part must be opened for it.

    .shardmill/parts.jsonl     [part, size, time of change, stop, length, error, tokens, tokens]

A note counts only for the file it was made of, told by size and time of change; where none does,
the part's own footer is read. So the file may lag behind, be torn or be gone. No part is taken to
be there because of it, and neither `verify` nor the end of a run looks at it.
"""

from __future__ import annotations

import json
from dataclasses import astuple, fields
from pathlib import Path

from pipeline.folder import RunFolder
from pipeline.publish import output_errors, read_errors
from pipeline.segments import Totals

Stamp = tuple[int, int]
"""Size in bytes, and time of change in nanoseconds."""


def stamp_of(path: Path) -> Stamp | None:
    """What tells a file from one that takes its place later; None if it is not there.

    Raises:
        OutputError: the operating system does not say.
    """
    try:
        with read_errors(path):
            status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def note(folder: RunFolder, name: str, part: int, totals: Totals) -> None:
    """Notes what the part of this name holds. Only the holder of the run's lock calls this.

    Raises:
        OutputError: the operating system refuses.
    """
    stamp = stamp_of(folder.root / name)
    assert stamp is not None, "the part is there"
    line = json.dumps([part, *stamp, *astuple(totals)])
    with output_errors(folder.root), folder.tally.open("a", encoding="ascii") as file:
        file.write(line + "\n")


def read_notes(folder: RunFolder) -> dict[tuple[int, Stamp], Totals]:
    """All notes, by part and stamp; lines that make no sense are passed over."""
    with read_errors(folder.tally):
        lines = folder.tally.read_bytes().splitlines() if folder.tally.exists() else []
    return {(part, stamp): totals for part, stamp, totals in filter(None, map(_parsed, lines))}


def _parsed(line: bytes) -> tuple[int, Stamp, Totals] | None:
    try:
        part, size, changed, *counts = json.loads(line)
    except (ValueError, TypeError):
        return None
    if len(counts) != len(fields(Totals)):
        return None
    return part, (size, changed), Totals(*counts)
