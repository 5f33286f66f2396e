"""Inputs that are not Parquet -> Parquet, once, in a folder that is there whole or not at all.

Everything after it knows Parquet only. What is in a staged folder follows from its name, so a
later run takes it as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import jsonl
from jobs.content import content_digests
from jobs.sources import Source
from pipeline.errors import InputError
from pipeline.publish import output_errors, sync_folder

ROW_GROUP_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Staged:
    """A Parquet file, and what it was made from.

    Attributes:
        name: how `row_id` names the source.
        path: the Parquet file, absolute.
        source: what the user knows it as.
        size: of the source, in bytes.
        digest: sha256 of the source's content.
    """

    name: str
    path: Path
    source: str
    size: int
    digest: str


def stage_jsonl(sources: Sequence[Source], limit: int | None, staging: Path) -> list[Staged]:
    """Convert JSONL files, all to one schema.

    Args:
        sources: the files.
        limit: most rows of all files together; files after it are left out.
        staging: the folder for staged folders; made if it is not there.

    Raises:
        InputError: a file cannot be read, or a line does not fit.
        OutputError: the staging folder cannot be written.
    """
    digests = content_digests([source.path for source in sources])
    key = [[source.name, digest] for source, digest in zip(sources, digests, strict=True)]
    paths = stage_once(staging, ["jsonl", limit, key], lambda out: _convert(sources, limit, out))
    # With a limit, only the first sources have a file.
    return [
        Staged(source.name, path, str(source.path), source.path.stat().st_size, digest)
        for source, path, digest in zip(sources, paths, digests, strict=False)
    ]


def _convert(sources: Sequence[Source], limit: int | None, out: Path) -> None:
    schema, counts = pa.schema([]), list[int]()
    for source in sources:
        left = None if limit is None else limit - sum(counts)
        if left == 0:
            break
        schema, num_rows = jsonl.extend_schema(schema, source.path, left)
        counts.append(num_rows)
    for index, (source, num_rows) in enumerate(zip(sources, counts, strict=False)):
        tables = jsonl.tables(source.path, schema, num_rows)
        write_parquet(staged_path(out, index), schema, tables, str(source.path))


def staged_path(folder: Path, index: int) -> Path:
    """Where the `index`-th file of a staged folder goes; names sort like indexes."""
    return folder / f"{index:06d}.parquet"


def stage_once(staging: Path, key: object, write: Callable[[Path], None]) -> list[Path]:
    """The Parquet files of a staged folder, written now if no earlier run has finished it.

    Args:
        staging: where staged folders are; one process at a time works there.
        key: all that the content follows from, as JSON can hold it.
        write: writes the files into the folder that it is given.

    Raises:
        OutputError: the staging folder cannot be written.
    """
    final = staging / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if not final.is_dir():
        unfinished = final.with_suffix(".tmp")
        with output_errors(staging):
            if unfinished.exists():
                shutil.rmtree(unfinished)
            unfinished.mkdir(parents=True)
        write(unfinished)
        with output_errors(staging):
            sync_folder(unfinished)
            unfinished.rename(final)
            sync_folder(staging)
    return sorted(final.glob("*.parquet"))


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], source: str) -> None:
    """Write a new Parquet file, and see it onto the disk.

    Args:
        path: must not exist yet.
        schema: of every table.
        tables: the rows, in order.
        source: what the tables come from, for the message.

    Raises:
        InputError: a column has a type that Parquet cannot hold.
        OutputError: the folder cannot be written.
    """
    try:
        with output_errors(path.parent), path.open("xb") as file:
            with pq.ParquetWriter(
                file, schema, compression="zstd", write_page_checksum=True
            ) as writer:
                for table in tables:
                    writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            file.flush()
            os.fsync(file.fileno())
    except pa.ArrowNotImplementedError as error:
        raise InputError(
            f"{source} cannot be held in Parquet ({error}): drop or change that column."
        ) from error
