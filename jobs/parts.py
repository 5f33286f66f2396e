"""Complete shards -> output files, and the mark that all are there.

Every step may be the last before a death, and every function may be called again afterwards: a
part is published before its segments go, and `_SUCCESS` comes after the last part. Only the
holder of the run's lock calls what writes here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from jobs.manifest import Manifest
from jobs.row_checks import wrong_row
from pipeline.errors import DamagedOutputError, SupersededError
from pipeline.folder import RunFolder
from pipeline.publish import is_there, output_errors, publish, sync_folder, temporary_file
from pipeline.segments import (
    SegmentInfo,
    Totals,
    committed_infos,
    count_commits,
    facts_of,
    missing_positions,
    open_parquet,
    read_rows,
    reading,
    segment_name,
    write_parquet,
)

ROW_GROUP_BYTES = 48 * 2**20
"""In memory, about; readers work row group by row group."""


_BATCH_ROWS = 2048


@dataclass(frozen=True, slots=True)
class RetriedRows:
    """The rows of a part that one retry has generated again.

    Attributes:
        retry: its number.
        created: when it was started; ISO 8601 with offset.
        versions: of Shardmill and the libraries that made the answers.
        max_new_tokens: with which the rows were generated.
        ranges: rows of the part from 0, as rising (first, end) pairs.
        totals: over these rows, as the retry left them.
    """

    retry: int
    created: str
    versions: dict[str, str]
    max_new_tokens: int
    ranges: tuple[tuple[int, int], ...]
    totals: Totals


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What a part's footer says about it.

    Attributes:
        fingerprint: of the job.
        first_shard: of `num_shards` consecutive ones.
        retries: by rising number; the last one that names a row has made its answer.
    """

    part: int
    fingerprint: str
    first_shard: int
    num_shards: int
    totals: Totals
    retries: tuple[RetriedRows, ...] = ()

    def to_json(self) -> str:
        """The text that goes into the footer."""
        return _PART_INFO.dump_json(self).decode()


_PART_INFO = TypeAdapter(PartInfo)


def read_part(folder: RunFolder, manifest: Manifest, part: int) -> PartInfo:
    """What a part says about itself; only its footer is read.

    Raises:
        DamagedOutputError: it is torn, or not this job's part of this number, or lacks rows.
        FileNotFoundError: it is not there.
    """
    return read_part_file(folder.root / manifest.part_name(part), manifest, part)


def read_part_file(path: Path, manifest: Manifest, part: int) -> PartInfo:
    """`read_part` for a part that does not have its final name yet."""
    shards = manifest.part_shards(part)
    with open_parquet(path) as file, reading(path):
        info = _PART_INFO.validate_json(facts_of(file))
        expected = (part, manifest.fingerprint, shards.start, len(shards))
        if (info.part, info.fingerprint, info.first_shard, info.num_shards) != expected:
            raise pa.ArrowInvalid("its footer names another part or another job")
        num_rows = manifest.part_completions(part)
        if not file.metadata.num_rows == info.totals.num_completions == num_rows:
            raise pa.ArrowInvalid(f"it has {file.metadata.num_rows} rows instead of {num_rows}")
        if not file.schema_arrow.equals(manifest.arrow_schema):
            raise pa.ArrowInvalid("its columns are not those of the job")
        if any(end > num_rows for retry in info.retries for _, end in retry.ranges):
            raise pa.ArrowInvalid("its footer names retried rows that it does not have")
    return info


def shards_of_part(
    file: pq.ParquetFile, manifest: Manifest, part: int, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of each shard of a part in turn, some thousand rows in memory at a time.

    All columns are decoded, for their checksums; the tables have the named ones.

    Args:
        file: the part, whose number of rows has been checked.
    """
    batches = (
        pa.Table.from_batches([batch]).select(list(columns or manifest.arrow_schema.names))
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)
    )
    waiting: list[pa.Table] = []
    for shard in manifest.part_shards(part):
        wanted = manifest.shard_completions(shard)
        while sum(table.num_rows for table in waiting) < wanted:
            batch = next(batches, None)
            if batch is None:
                raise pa.ArrowInvalid("it ends before the rows that its footer counts")
            waiting.append(batch)
        table = pa.concat_tables(waiting)
        yield table.slice(0, wanted)
        waiting = [table.slice(wanted)]


def roll_up(folder: RunFolder, manifest: Manifest, part: int) -> PartInfo:
    """Put the segments of a part together, in order, and remove them.

    A part that is there already, from a run that died, is checked and its segments are removed.

    Raises:
        DamagedOutputError: a segment is missing, torn, or does not hold the rows that belong there.
        OutputError: the part cannot be written.
    """
    if not is_there(folder.root / manifest.part_name(part)):
        _write_part(folder, manifest, part)
    info = read_part(folder, manifest, part)
    with output_errors(folder.root):
        # The name may be there and not yet durable if its writer died right after linking it.
        sync_folder(folder.root)
        remove_segments(folder, manifest.part_shards(part))
    return info


def finish(folder: RunFolder, manifest: Manifest) -> Totals:
    """Count the rows of all parts, then write `_SUCCESS`; it is empty, as Spark's is.

    Raises:
        DamagedOutputError: a part is missing or is not whole.
        OutputError: the file cannot be written.
    """
    totals = Totals()
    for part in range(manifest.num_parts):
        if not is_there(folder.root / manifest.part_name(part)):
            name = manifest.part_name(part)
            raise DamagedOutputError(f"'{folder.root}' lacks {name}; run the same command again")
        totals += read_part(folder, manifest, part).totals
    with (
        output_errors(folder.root),
        temporary_file(folder.tmp, "_SUCCESS", "") as temporary,
        suppress(SupersededError),  # finished already
    ):
        temporary.touch()
        publish(temporary, folder.success)
    return totals


def _write_part(folder: RunFolder, manifest: Manifest, part: int) -> None:
    shards = manifest.part_shards(part)
    commits = {shard: _all_commits(folder, manifest, shard) for shard in shards}
    totals = sum((info.totals for infos in commits.values() for info in infos), Totals())
    info = PartInfo(part, manifest.fingerprint, shards.start, len(shards), totals)
    tables = (_shard_rows(folder, manifest, shard, commits[shard]) for shard in shards)
    name = manifest.part_name(part)
    with temporary_file(folder.tmp, Path(name).stem, ".parquet") as temporary:
        with output_errors(folder.root):
            write_parquet(temporary, manifest.arrow_schema, grouped(tables), info.to_json())
        read_part_file(temporary, manifest, part)
        # Somebody else's part has passed the same checks and holds the same rows.
        with suppress(SupersededError):
            publish(temporary, folder.root / name)


def _all_commits(folder: RunFolder, manifest: Manifest, shard: int) -> list[SegmentInfo]:
    infos = committed_infos(folder, shard, manifest.fingerprint)
    missing = missing_positions(infos, manifest.shard_completions(shard))
    if missing:
        raise DamagedOutputError(
            f"'{folder.segments}' lacks {len(missing)} rows of shard {shard} that had been "
            "committed; run the same command again"
        )
    return infos


def _shard_rows(
    folder: RunFolder, manifest: Manifest, shard: int, infos: list[SegmentInfo]
) -> pa.Table:
    table = read_rows(folder, infos)
    if not table.schema.equals(manifest.arrow_schema):
        problem: str | None = "its columns are not those of the job"
    else:
        problem = wrong_row(table, manifest, manifest.shard(shard))
    if problem:
        path = folder.segments / segment_name(shard, 0)
        raise DamagedOutputError(
            f"'{path}' or another commit of shard {shard} is not what belongs there: {problem}; "
            "move them away and run the same command again"
        )
    return table


def grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of about `ROW_GROUP_BYTES`."""
    waiting: list[pa.Table] = []
    num_bytes = 0
    for table in tables:
        waiting.append(table)
        num_bytes += table.nbytes
        if num_bytes >= ROW_GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting, num_bytes = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def remove_segments(folder: RunFolder, shards: Iterable[int]) -> None:
    """Remove all commits of the shards; their rows must be durable elsewhere."""
    for shard in shards:
        # From the last to the first: after a death the ones left still count from 0.
        for commit in reversed(range(count_commits(folder, shard))):
            (folder.segments / segment_name(shard, commit)).unlink()
