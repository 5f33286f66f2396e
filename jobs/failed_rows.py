"""What is said of a job of which more rows have failed than it allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from jobs.manifest import Manifest
from pipeline.folder import RunFolder
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


def example(folder: RunFolder, manifest: Manifest) -> str:
    """One of the failed rows with its error, as the end of a sentence; empty if none is found.

    Raises:
        ShardmillError: a file of the folder is damaged, or cannot be read.
    """
    files = (*sorted(folder.segments.iterdir()), *sorted(folder.root.glob("part-*.parquet")))
    found = (error for path in files[:MOST_FILES] for error in _errors(path, manifest))
    return "".join(f". One of them, {error}" for error in islice(found, 1))


def _errors(path: Path, manifest: Manifest) -> Iterator[str]:
    names = [manifest.output_prefix + name for name in ("row_id", "error")]
    # A segment may become part of a part at this moment.
    with suppress(FileNotFoundError), open_parquet(path) as file, reading(path):
        for batch in file.iter_batches(columns=names):
            for row_id, error in zip(*(batch[name].to_pylist() for name in names), strict=True):
                if error is not None:
                    yield f"{row_id}: {error}"
