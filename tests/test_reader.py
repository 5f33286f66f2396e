"""Shards are read exactly as the file has them."""

import datetime
import os
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import reader as reader_module
from pipeline.errors import InputError, RowError
from pipeline.reader import ShardReader, file_stamp, plain_rows, read_footer
from pipeline.records import Shard

NUM_ROWS = 600


def _rich_table(num_rows: int = NUM_ROWS) -> pa.Table:
    """A column of each type that a reader may get wrong, with nulls in most."""
    numbers = list(range(num_rows))
    utc = datetime.UTC
    return pa.table(
        {
            "id": pa.array(numbers, pa.int32()),
            "word": pa.array([f"w{n % 7}" for n in numbers]).dictionary_encode(),
            "long": pa.array([None if n % 5 == 0 else "é" * (n % 9) for n in numbers]).cast(
                pa.large_string()
            ),
            "nothing": pa.nulls(num_rows),
            "price": pa.array([Decimal(n) / 100 for n in numbers], pa.decimal128(12, 2)),
            "at": pa.array(
                [
                    datetime.datetime(2024, 1, 1, tzinfo=utc) + datetime.timedelta(n)
                    for n in numbers
                ],
                pa.timestamp("us", "Europe/Vienna"),
            ),
            "nested": pa.array(
                [
                    None if n % 4 == 0 else {"tags": [str(n)] * (n % 3), "score": n / 2}
                    for n in numbers
                ],
                pa.struct([("tags", pa.list_(pa.string())), ("score", pa.float32())]),
            ),
            "map": pa.array([[("k", n)] for n in numbers], pa.map_(pa.string(), pa.int64())),
            "nested.tags": pa.array([n * 2 for n in numbers]),
        }
    )


TABLE = _rich_table()


def _write(path: Path, table: pa.Table, row_groups: list[int]) -> str:
    """Write row groups of the sizes given, in turn, until the table ends."""
    with pq.ParquetWriter(path, table.schema, write_page_checksum=True) as writer:
        start = 0
        for turn in range(len(table)):
            size = row_groups[turn % len(row_groups)]
            writer.write_table(table.slice(start, size), row_group_size=max(1, size))
            start += size
            if start >= len(table):
                break
    return str(path)


def _shard(path: str, first_row: int, num_rows: int) -> Shard:
    return Shard(0, path, "in.parquet", first_row, num_rows)


RANGES = st.lists(
    st.tuples(st.integers(0, NUM_ROWS - 1), st.integers(1, 150)).map(
        lambda pair: (pair[0], min(pair[1], NUM_ROWS - pair[0]))
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40)
@given(
    row_groups=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    ranges=RANGES,
    columns=st.none() | st.lists(st.sampled_from(TABLE.column_names), unique=True),
)
def test_any_shards_in_any_order_equal_a_plain_read(
    tmp_path_factory: pytest.TempPathFactory,
    row_groups: list[int],
    ranges: list[tuple[int, int]],
    columns: list[str] | None,
) -> None:
    """Values, types and columns are those of read_table's slice, wherever the shards begin."""
    path = _write(tmp_path_factory.mktemp("reader") / "in.parquet", TABLE, row_groups)
    whole = pq.read_table(path)
    whole = whole if columns is None else whole.select(columns)
    reader = ShardReader(columns)
    for first_row, num_rows in ranges:
        table = reader.read(_shard(path, first_row, num_rows))
        assert table.schema.equals(whole.schema)
        assert table.num_rows == num_rows
        assert table.to_pylist() == whole.slice(first_row, num_rows).to_pylist()
    reader.close()


@pytest.mark.parametrize("shard_rows", [1, 64, 127, 128, 129, 600])
def test_shards_in_order_give_the_file(tmp_path: Path, shard_rows: int) -> None:
    """Nothing is lost or doubled where shards, batches and row groups meet; empty groups too."""
    path = _write(tmp_path / "in.parquet", TABLE, [100, 0, 1, 299])
    reader = ShardReader(["id"])
    ids: list[int] = []
    for first_row in range(0, NUM_ROWS, shard_rows):
        num_rows = min(shard_rows, NUM_ROWS - first_row)
        ids += reader.read(_shard(path, first_row, num_rows))["id"].to_pylist()
    assert ids == list(range(NUM_ROWS))


def test_next_shard_goes_on_where_the_last_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards in order decode a row group once; going back, or to another group, seeks."""
    starts: list[int] = []
    real = pq.ParquetFile.iter_batches

    def count(self: pq.ParquetFile, *args: object, row_groups: range, **kwargs: object) -> object:
        starts.append(row_groups[0])
        return real(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count)
    path = _write(tmp_path / "in.parquet", TABLE, [300])
    reader = ShardReader()
    for first_row in range(0, NUM_ROWS, 50):
        reader.read(_shard(path, first_row, 50))
    assert starts == [0]
    reader.read(_shard(path, 310, 5))
    reader.read(_shard(path, 400, 5))
    reader.read(_shard(path, 10, 5))
    reader.read(_shard(path, 500, 5))
    assert starts == [0, 1, 0, 1]


def test_two_files_in_turn_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retried shard of the file before closes nothing; a third file closes the idlest."""
    opened: list[str] = []
    real = reader_module.read_footer

    def count(path: str) -> reader_module.Footer:
        opened.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(reader_module, "read_footer", count)
    a, b, c = (_write(tmp_path / name, TABLE, [200]) for name in "abc")
    reader = ShardReader()
    for path in (a, b, a, c, a, b):
        reader.read(_shard(path, 0, 5))
    assert opened == ["a", "b", "c", "b"]


def test_no_columns_still_counts_rows(tmp_path: Path) -> None:
    """A job may need no column at all; there is one row for each all the same."""
    path = _write(tmp_path / "in.parquet", TABLE, [70])
    assert ShardReader([]).read(_shard(path, 60, 20)).num_rows == 20


def test_vanished_file_is_named(tmp_path: Path) -> None:
    """A file that is gone stops the job with its name."""
    with pytest.raises(InputError, match=r"gone\.parquet cannot be read \(No such file"):
        ShardReader().read(_shard(str(tmp_path / "gone.parquet"), 0, 1))


def test_changed_file_is_named(tmp_path: Path) -> None:
    """A file that is not the planned one is refused, whatever it holds."""
    path = _write(tmp_path / "in.parquet", TABLE, [100])
    stamps = {path: file_stamp(path)}
    ShardReader(None, stamps).read(_shard(path, 0, 1))
    _write(tmp_path / "in.parquet", TABLE, [150])
    with pytest.raises(InputError, match=r"in\.parquet has changed since the job was planned"):
        ShardReader(None, stamps).read(_shard(path, 0, 1))


def test_file_written_to_while_it_is_open(tmp_path: Path) -> None:
    """Shards of one file are not read from two versions of it, though it stays the same file."""
    path = _write(tmp_path / "in.parquet", TABLE, [100])
    other = Path(_write(tmp_path / "other.parquet", TABLE.slice(1), [100])).read_bytes()
    reader = ShardReader(["id"], {path: file_stamp(path)})
    reader.read(_shard(path, 0, 100))
    with open(path, "r+b") as file:
        file.write(other)
    with pytest.raises(InputError, match=r"in\.parquet has changed since the job was planned"):
        reader.read(_shard(path, 100, 1))


def test_shorter_file_and_lost_column_are_named(tmp_path: Path) -> None:
    """Without a stamp, what the plan relies on is still checked."""
    path = _write(tmp_path / "in.parquet", TABLE, [100])
    with pytest.raises(InputError, match=r"has 600 rows, .* at least 601"):
        ShardReader().read(_shard(path, 600, 1))
    with pytest.raises(InputError, match="has no column 'gone'"):
        ShardReader(["id", "gone"]).read(_shard(path, 0, 1))


def test_damaged_page_is_an_error_not_wrong_data(tmp_path: Path) -> None:
    """A flipped byte in a file with checksums is found; rows are not made up."""
    path = tmp_path / "in.parquet"
    table = pa.table({"text": [f"row {i}" for i in range(1000)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"row 500")] ^= 1
    path.write_bytes(data)
    reader = ShardReader()
    for first_row in (450, 900):  # after the damaged page there is no knowing where rows begin
        with pytest.raises(InputError, match=r"in\.parquet cannot be read"):
            reader.read(_shard(str(path), first_row, 100))


def test_reader_goes_on_after_an_error(tmp_path: Path) -> None:
    """A failed read does not spoil the next one of the same file."""
    path = _write(tmp_path / "in.parquet", TABLE, [100])
    reader = ShardReader(["id"])
    reader.read(_shard(path, 0, 10))
    with pytest.raises(InputError):
        reader.read(_shard(path, 590, 20))
    assert reader.read(_shard(path, 590, 10))["id"].to_pylist() == list(range(590, 600))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"question,answer\n", "is not a Parquet file"),
        (b"PAR1 and no more", "is cut short"),
        (b"PAR1", "is cut short"),
        (b"PAR1" + b"\xff" * 20 + b"\0\1\0\0PAR1", "is cut short"),
        (b"PAR1" + b"\xff" * 20 + b"\x14\0\0\0PAR1", "cannot be read"),
    ],
)
def test_what_is_no_parquet_file_is_one_sentence(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    """Each way of not being Parquet is named with the file."""
    path = tmp_path / "in.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"in\.parquet {sentence}"):
        read_footer(str(path))


def test_cut_file_is_found_at_every_length(tmp_path: Path) -> None:
    """However much of a Parquet file is missing at its end, it is not taken for whole."""
    whole = Path(_write(tmp_path / "whole.parquet", _rich_table(5), [5])).read_bytes()
    path = tmp_path / "cut.parquet"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.parquet"):
            read_footer(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file_is_named(tmp_path: Path) -> None:
    """A file without permission is named with the reason."""
    path = Path(_write(tmp_path / "in.parquet", _rich_table(5), [5]))
    path.chmod(0)
    with pytest.raises(InputError, match=r"in\.parquet cannot be read \(Permission denied"):
        read_footer(str(path))


def test_plain_rows_are_python_values() -> None:
    """Values come as Python has them, maps as dictionaries, and only the columns named."""
    [row] = plain_rows(TABLE.slice(5, 1), ["map", "price", "nested", "long"])
    assert row == {
        "map": {"k": 5},
        "price": Decimal("0.05"),
        "nested": {"tags": ["5", "5"], "score": 2.5},
        "long": None,
    }
    assert plain_rows(TABLE.slice(0, 2), []) == [{}, {}]


def test_value_that_python_cannot_hold_costs_its_row() -> None:
    """A year 10000, broken UTF-8 or a doubled key is that row's error, and nobody else's."""
    offsets, data = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffc")
    table = pa.table(
        {
            "text": pa.Array.from_buffers(pa.string(), 3, [None, offsets, data]),
            "at": pa.array([0, 0, 9 * 10**17], pa.timestamp("us")),
        }
    )
    rows = plain_rows(table, ["text", "at"])
    assert rows[0] == {"text": "a", "at": datetime.datetime(1970, 1, 1)}
    assert [type(row) for row in rows[1:]] == [RowError, RowError]
    assert str(rows[1]).startswith("value: a value cannot be read: 'utf-8'")
