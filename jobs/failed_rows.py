"""What is said of a job of which more rows have failed than it allows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

from jobs.manifest import Manifest
from pipeline.errors import DamagedOutputError, ShardmillError
from pipeline.folder import RunFolder
from pipeline.publish import is_there, read_errors, write_json
from pipeline.segments import open_parquet, reading

MOST_FILES = 64
"""That are looked through for an example."""


def too_many_failed(num_failed: int, max_failed: int) -> str:
    """Both numbers, and what to do."""
    return (
        f"{num_failed:,} rows ended in an error and failure.max_failed_rows allows {max_failed:,}; "
        "raise that and run the same command to keep them as they are (`shardmill retry` runs them "
        "again later), or mend the cause and start over with --fresh"
    )


def note_limit(folder: RunFolder, max_failed: int) -> None:
    """Leaves word that a run ends because more rows have failed than the job allows by now."""
    # Without the note a folder says to run the same command again, which ends the same way.
    with suppress(ShardmillError):
        write_json(folder.failed, {"max_failed_rows": max_failed})


def noted_limit(folder: RunFolder) -> int | None:
    """Failed rows that the last run allowed, if it ended because there were more.

    Raises:
        OutputError: the note cannot be read.
        DamagedOutputError: it is no such note.
    """
    with read_errors(folder.failed):
        if not is_there(folder.failed):
            return None
        note = folder.failed.read_bytes()
    try:
        return int(json.loads(note)["max_failed_rows"])
    except (ValueError, KeyError, TypeError):
        raise DamagedOutputError(f"'{folder.failed}' is damaged; remove it") from None


def example(folder: RunFolder, manifest: Manifest) -> str:
    """One of the failed rows with its error, as the end of a sentence; empty if none is found."""
    parts = (folder.root / manifest.part_name(part) for part in range(manifest.num_parts))
    # What cannot be read is told where it matters; this is an example, and by the way.
    with suppress(ShardmillError, OSError):
        files = islice(chain(sorted(folder.segments.iterdir()), parts), MOST_FILES)
        for error in (error for path in files for error in _errors(path, manifest)):
            return f". One of them, {error}"
    return ""


def _errors(path: Path, manifest: Manifest) -> Iterator[str]:
    names = [manifest.output_prefix + name for name in ("row_id", "error")]
    # A segment may become part of a part at this moment.
    with suppress(FileNotFoundError), open_parquet(path) as file, reading(path):
        for batch in file.iter_batches(columns=names):
            for row_id, error in zip(*(batch[name].to_pylist() for name in names), strict=True):
                if error is not None:
                    yield f"{row_id}: {error}"
