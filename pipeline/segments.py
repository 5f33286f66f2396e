"""Committed pieces of shards: their names, what their footers say, reading them back.

A segment holds some of a shard's positions, in order. A position is one output row of the shard:
`row * num_samples + sample`. Commits of a shard are numbered from 0 without gaps, and no position
is in two of them. Which shards there are is not known here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipeline.errors import DamagedOutputError
from pipeline.folder import RunFolder
from pipeline.publish import is_there, read_errors

FACTS_KEY = "shardmill"
"""Key of the footer's key-value metadata under which a file explains itself, in JSON."""

_NAME = re.compile(r"(\d{9,})-(\d{3,})\.parquet")


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over some completions; zero for none. The first three add up to their number."""

    stop: int = 0
    length: int = 0
    error: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    @property
    def num_completions(self) -> int:
        """How many completions were counted."""
        return self.stop + self.length + self.error

    @property
    def num_generated(self) -> int:
        """Completions that a model has made."""
        return self.stop + self.length

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.stop + other.stop,
            self.length + other.length,
            self.error + other.error,
            self.num_prompt_tokens + other.num_prompt_tokens,
            self.num_completion_tokens + other.num_completion_tokens,
        )

    def __sub__(self, other: Totals) -> Totals:
        return Totals(
            self.stop - other.stop,
            self.length - other.length,
            self.error - other.error,
            self.num_prompt_tokens - other.num_prompt_tokens,
            self.num_completion_tokens - other.num_completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """What a segment's footer says about it.

    Attributes:
        commit: from 0; the attempt that wrote it had read exactly the commits before it.
        fingerprint: of the job.
        first_row: the shard's first row in its input file.
        num_rows: input rows of the shard, whether this segment holds them or not.
        ranges: positions held, as rising (first, end) pairs; the end is not included.
        worker: who wrote it, for people.
    """

    shard: int
    commit: int
    fingerprint: str
    first_row: int
    num_rows: int
    ranges: tuple[tuple[int, int], ...]
    worker: str
    totals: Totals

    @property
    def num_completions(self) -> int:
        """How many positions it holds."""
        return sum(end - first for first, end in self.ranges)

    def to_json(self) -> str:
        """The text that goes into the footer."""
        return _SEGMENT_INFO.dump_json(self).decode()


_SEGMENT_INFO = TypeAdapter(SegmentInfo)


def as_ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Cut `numbers` into (first, end) pairs of consecutive numbers, in the same order."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        first = number
        if ranges and ranges[-1][1] == number:
            first = ranges.pop()[0]
        ranges.append((first, number + 1))
    return ranges


def segment_name(shard: int, commit: int) -> str:
    """The file name that is commit number `commit` of `shard`."""
    return f"{shard:09d}-{commit:03d}.parquet"


def parse_segment_name(name: str) -> tuple[int, int] | None:
    """Shard and commit of a file name, or None if it is not a segment's."""
    match = _NAME.fullmatch(name)
    if match is None or name != segment_name(int(match[1]), int(match[2])):
        return None
    return int(match[1]), int(match[2])


def names_in_segments(folder: RunFolder) -> list[str]:
    """What lies among the segments; nothing where the folder is gone.

    Whoever copies a complete run folder may leave out what is empty.

    Raises:
        OutputError: the folder cannot be read.
    """
    try:
        with read_errors(folder.segments):
            return os.listdir(folder.segments)
    except FileNotFoundError:
        return []


def list_segments(folder: RunFolder) -> dict[int, list[int]]:
    """The commit numbers of each shard, rising; one listing, no file is opened.

    Raises:
        OutputError: the folder cannot be read.
    """
    commits: dict[int, list[int]] = {}
    for name in names_in_segments(folder):
        if parsed := parse_segment_name(name):
            commits.setdefault(parsed[0], []).append(parsed[1])
    return {shard: sorted(numbers) for shard, numbers in commits.items()}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what makes no sense in `path` into a `DamagedOutputError`; see also `read_errors`.

    A file that the system does not let us read may be whole, and is not to be moved away.
    """
    try:
        with read_errors(path):
            yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # names may not be UTF-8 any more
        cause = str(error).splitlines()[0]
        raise DamagedOutputError(
            f"'{path}' is not the file that Shardmill wrote there ({cause}); move it away and run "
            "the same command again"
        ) from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file of the run folder; its pages are checked against their checksums when read.

    Raises:
        DamagedOutputError: it is torn or not Parquet.
        OutputError: the operating system refuses.
        FileNotFoundError: it is not there.
    """
    with reading(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


def facts_of(file: pq.ParquetFile) -> bytes:
    """The JSON of the file's footer; empty if there is none."""
    return bytes((file.metadata.metadata or {}).get(FACTS_KEY.encode(), b""))


def read_info(path: Path, fingerprint: str) -> SegmentInfo:
    """What the segment at `path` says about itself; only its footer is read.

    Args:
        path: the segment.
        fingerprint: of the job that it should be of. A worker of the job before `--fresh` that
            wakes up late writes into the new folder, under names that are free there.

    Raises:
        DamagedOutputError: it is torn, not a segment, another job's, or its name or length
            contradicts its footer.
        FileNotFoundError: it is not there.
    """
    with open_parquet(path) as file, reading(path):
        info = _SEGMENT_INFO.validate_json(facts_of(file))
        if parse_segment_name(path.name) != (info.shard, info.commit):
            raise pa.ArrowInvalid(f"its footer says shard {info.shard}, commit {info.commit}")
        if file.metadata.num_rows != info.num_completions:
            raise pa.ArrowInvalid(f"it holds {file.metadata.num_rows} rows")
    if info.fingerprint != fingerprint:
        raise DamagedOutputError(
            f"'{path}' was written by another job; move it away and run the same command again"
        )
    return info


def committed_infos(folder: RunFolder, shard: int, fingerprint: str) -> list[SegmentInfo]:
    """The commits of one shard, read anew; [] if there are none.

    Raises:
        DamagedOutputError: one of them is torn, or not of the job with this fingerprint.
    """
    return [
        read_info(folder.segments / segment_name(shard, commit), fingerprint)
        for commit in range(count_commits(folder, shard))
    ]


def count_commits(folder: RunFolder, shard: int) -> int:
    """How many commits of one shard there are now; this is also the next one's number."""
    _look_anew(folder.segments)
    count = 0
    while is_there(folder.segments / segment_name(shard, count)):
        count += 1
    return count


def _look_anew(folder: Path) -> None:
    """Has a network file system ask its server what is new in a folder, which opening it does.

    Otherwise it may say for half a minute that a file is not there, as it was not a moment ago.
    """
    with suppress(FileNotFoundError):  # a copy may lack the folder, and then it has no commits
        os.close(os.open(folder, os.O_RDONLY))


def missing_positions(infos: Iterable[SegmentInfo], total: int) -> list[int]:
    """The positions below `total` that none of a shard's commits holds, rising.

    Raises:
        DamagedOutputError: a position is in two commits, or not below `total`.
    """
    missing = set(range(total))
    for info in infos:
        held = {position for first, end in info.ranges for position in range(first, end)}
        if not held <= missing:
            name = segment_name(info.shard, info.commit)
            raise DamagedOutputError(
                f"segment '{name}' holds rows that another commit of shard {info.shard} holds, or "
                "that the shard does not have; move it away and run the same command again"
            )
        missing -= held
    return sorted(missing)


def read_rows(folder: RunFolder, infos: Iterable[SegmentInfo]) -> pa.Table:
    """The rows of all the given commits of one shard, in the order of their positions.

    Raises:
        DamagedOutputError: a page does not match its checksum, or a file is torn.
    """
    pieces: list[tuple[int, pa.Table]] = []
    for info in infos:
        path, offset = folder.segments / segment_name(info.shard, info.commit), 0
        with open_parquet(path) as file, reading(path):
            table = file.read(use_threads=False)
        for first, end in info.ranges:
            pieces.append((first, table.slice(offset, end - first)))
            offset += end - first
    return pa.concat_tables([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])])


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], facts: str) -> None:
    """Write each table as a row group, with page checksums and `facts` in the footer.

    An exception leaves a file that reads well and lacks rows: never publish it.
    """
    options = {"compression": "zstd", "write_page_checksum": True}
    with pq.ParquetWriter(path, schema, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=table.num_rows)
        writer.add_key_value_metadata({FACTS_KEY: facts})
