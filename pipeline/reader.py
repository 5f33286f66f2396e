"""Shard -> its rows as an Arrow table, and Arrow table -> plain rows for the prompts.

Knows Parquet files and nothing of prompts, models or jobs. Memory stays near one shard and one
batch, however large a row group is.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, RowError
from pipeline.records import Shard

_MAGIC = b"PAR1"
_BATCH_ROWS = 128  # small, because a row may be a megabyte
_BUFFER_BYTES = 256 * 1024  # per column: without it Arrow loads a column's whole chunk at once
_OPEN_FILES = 2  # the one being read, and the one before: retried shards go back a little
_ARROW_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last of a column's name


@dataclass(frozen=True, slots=True)
class Footer:
    """What a Parquet file says of itself at its end.

    Attributes:
        size: of the file, in bytes.
        metadata: as pyarrow parses it; large for a file of many columns, so not for keeping.
        schema: of the rows, with the schema's metadata.
    """

    size: int
    metadata: pq.FileMetaData
    schema: pa.Schema


def read_footer(path: str) -> Footer:
    """Open a Parquet file by its footer alone.

    Raises:
        InputError: the file is missing, unreadable, cut short or not Parquet.
    """
    try:
        with open(path, "rb") as file:
            size, tail = _size_and_tail(file, path)
        metadata = pq.read_metadata(pa.BufferReader(tail))
        return Footer(size, metadata, metadata.schema.to_arrow_schema())
    except _ARROW_ERRORS as error:
        raise unreadable(path, error) from error


def file_stamp(path: str) -> str:
    """Size and time of the last change: if equal, the file was not written to in between.

    Raises:
        InputError: the file is missing or unreadable.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return f"{status.st_size} bytes, changed {status.st_mtime_ns}"


def unreadable(path: str, error: Exception) -> InputError:
    """The sentence for a file that the system, or Arrow, fails to read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(
        f"{path} cannot be read ({reason}): check that it is there, whole and allowed to be read."
    )


def _size_and_tail(file: BinaryIO, path: str) -> tuple[int, bytes]:
    head = file.read(len(_MAGIC))
    if not head:
        raise InputError(f"{path} is empty (0 bytes), not a Parquet file: write or copy it again.")
    if head != _MAGIC:
        raise InputError(
            f"{path} is not a Parquet file: it begins with {head!r} instead of {_MAGIC!r}; "
            "give it the ending of what it is, or convert it."
        )
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC or length + 12 > size:
        raise InputError(
            f"{path} is cut short: it begins as Parquet and has no Parquet footer at its end "
            f"({size} bytes); copy or write it again."
        )
    file.seek(size - 8 - length)
    return size, file.read()


class ShardReader:
    """Reads shards, best in the order of the plan.

    Args:
        columns: names of the columns to read, in the order wanted; None is all, in file order.
        stamps: by path, the `file_stamp` of each file when the job was planned; a path that is
            not in it is not checked.
    """

    def __init__(
        self, columns: Sequence[str] | None = None, stamps: Mapping[str, str] | None = None
    ) -> None:
        self._columns = None if columns is None else list(columns)
        self._stamps = stamps or {}
        self._cursors: OrderedDict[str, _Cursor] = OrderedDict()

    def read(self, shard: Shard) -> pa.Table:
        """The shard's rows, types exactly as the file has them.

        Raises:
            InputError: the file is gone, damaged, or not what the plan saw.
        """
        cursor = self._cursors.pop(shard.path, None)
        if cursor is None:
            cursor = _Cursor(shard.path, self._columns, self._stamps.get(shard.path))
        table = cursor.read(shard.first_row, shard.num_rows)
        cursor.check_unchanged()  # a file may be written to in place while it is open
        # Put back only now, as the newest: a cursor that raised is of no more use.
        self._cursors[shard.path] = cursor
        while len(self._cursors) > _OPEN_FILES:
            self._cursors.popitem(last=False)[1].close()
        return table

    def close(self) -> None:
        """Close the open files."""
        while self._cursors:
            self._cursors.popitem()[1].close()


class _Cursor:
    """One open file, and the row reached in it."""

    def __init__(self, path: str, columns: list[str] | None, stamp: str | None) -> None:
        self._path, self._stamp = path, stamp
        footer = read_footer(path)
        self.check_unchanged()
        self._num_rows: int = footer.metadata.num_rows
        self._starts = _row_group_starts(footer.metadata)
        self._file = self._open(footer.metadata)
        self._columns = self._checked(columns)
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._rest: pa.RecordBatch | None = None
        self._position = 0  # the file's row that comes next

    def read(self, first_row: int, num_rows: int) -> pa.Table:
        if first_row + num_rows > self._num_rows:
            raise InputError(
                f"{self._path} has {self._num_rows} rows, but the job was planned with at least "
                f"{first_row + num_rows}: put the old file back, or start the job again in a new "
                "folder."
            )
        try:
            self._seek(first_row)
            table = pa.Table.from_batches(list(self._pieces(num_rows)))
        except _ARROW_ERRORS as error:
            raise unreadable(self._path, error) from error
        return table if self._columns is None else table.select(self._columns)

    def check_unchanged(self) -> None:
        if self._stamp is not None and self._stamp != file_stamp(self._path):
            raise InputError(
                f"{self._path} has changed since the job was planned: put the old file back, or "
                "start the job again in a new folder."
            )

    def close(self) -> None:
        self._batches = self._rest = None
        self._file.close()

    def _open(self, metadata: pq.FileMetaData) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(
                self._path,
                metadata=metadata,
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            )
        except _ARROW_ERRORS as error:
            raise unreadable(self._path, error) from error

    def _checked(self, columns: list[str] | None) -> list[str] | None:
        missing = set(columns or ()) - set(self._file.schema_arrow.names)
        if missing:
            raise InputError(
                f"{self._path} has no column '{min(missing)}', which it had when the job was "
                "planned: put the old file back, or start the job again in a new folder."
            )
        return columns

    def _seek(self, row: int) -> None:
        """Go to `row`; forward within a row group by decoding, else by the row groups' sizes."""
        group = bisect_right(self._starts, row) - 1
        here = bisect_right(self._starts, self._position) - 1
        if self._batches is None or row < self._position or group != here:
            self._batches = self._file.iter_batches(
                _BATCH_ROWS,
                row_groups=range(group, len(self._starts)),
                columns=self._columns,
                use_threads=False,
            )
            self._rest, self._position = None, self._starts[group]
        for _ in self._pieces(row - self._position):
            pass

    def _pieces(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        assert self._batches is not None, "seek first"
        while num_rows:
            if self._rest is None or not self._rest.num_rows:
                self._rest = next(self._batches)
            piece = self._rest.slice(0, num_rows)
            self._rest = self._rest.slice(piece.num_rows)
            self._position += piece.num_rows
            num_rows -= piece.num_rows
            yield piece


def _row_group_starts(metadata: pq.FileMetaData) -> list[int]:
    """The first row of each row group, ascending."""
    sizes = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return list(accumulate(sizes, initial=0))[:-1]


def plain_rows(table: pa.Table, columns: Sequence[str]) -> list[dict[str, object] | RowError]:
    """The table's rows as Python values, of the named columns only.

    A value that Python cannot hold (a year 10000, text that is not UTF-8, a map with a key twice)
    costs its row: a RowError of kind `value` stands in its place.
    """
    chosen = table.select(list(columns))
    try:
        return _to_python(chosen)
    except (pa.ArrowException, ValueError, OverflowError, KeyError):
        return [_row_or_error(chosen.slice(i, 1)) for i in range(chosen.num_rows)]


def _to_python(table: pa.Table) -> list[dict[str, object] | RowError]:
    rows: list[dict[str, object] | RowError] = table.to_pylist(maps_as_pydicts="strict")
    return rows


def _row_or_error(row: pa.Table) -> dict[str, object] | RowError:
    try:
        return _to_python(row)[0]
    except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:
        return RowError("value", f"a value cannot be read: {error}")
