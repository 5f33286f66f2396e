"""The `input` block becomes checked Parquet files."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from jobs.inputs import Inputs, InputSettings, open_inputs, with_digests
from jobs.manifest import PlannedFile
from pipeline.errors import InputError
from pipeline.reader import ShardReader
from pipeline.records import Shard


def _write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="none")
    return path


def _open(folder: Path, **settings: Any) -> Inputs:
    return open_inputs(InputSettings(**settings), folder, folder / "staging")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "exactly one of 'path' and 'dataset'"),
        ({"path": "a", "dataset": "b"}, "exactly one of 'path' and 'dataset'"),
        ({"path": []}, "at least 1 item"),
        ({"path": "a", "revision": "main"}, "which only a 'dataset' has"),
        ({"path": "a", "limit": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, Any], sentence: str) -> None:
    """The block says one thing, or it is refused while the job file is read."""
    with pytest.raises(ValidationError, match=sentence):
        InputSettings(**values)
    assert InputSettings(path=["a", "b"]).path == ("a", "b")  # type: ignore[arg-type]


def test_parquet_files_are_described(tmp_path: Path) -> None:
    """Names, counts and schema are those of the files, which are read where they are."""
    a = _write(tmp_path / "in/a.parquet", q=["x", "y"], n=[1, 2])
    _write(tmp_path / "in/sub/b.parquet", n=[3], q=["z"])
    inputs = _open(tmp_path, path="in")
    assert [(file.name, file.num_rows) for file in inputs.files] == [
        ("a.parquet", 2),
        ("sub/b.parquet", 1),
    ]
    assert inputs.files[0].path == inputs.files[0].source == str(a)
    assert inputs.files[0].size == a.stat().st_size
    assert inputs.schema.equals(pa.schema([("q", pa.string()), ("n", pa.int64())]))
    assert inputs.num_rows == 3
    assert not (tmp_path / "staging").exists()


def test_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    """A copy is the same input; other values of the same size are not, even uncompressed."""
    path = _write(tmp_path / "a/x.parquet", q=["one", "two"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _write(tmp_path / "c/x.parquet", q=["one", "six"])
    files = [_open(tmp_path, path=name).files[0] for name in "abc"]
    a, b, c = with_digests(files, {})
    assert a.digest == b.digest != c.digest
    assert a.size == c.size == path.stat().st_size


def test_only_files_that_were_touched_are_read_again(tmp_path: Path) -> None:
    """A known file keeps its digest unread; a touched one is read, and may be the same."""
    path = _write(tmp_path / "x.parquet", q=["one", "two"])
    [file] = _open(tmp_path, path="x.parquet").files
    values = {name: getattr(file, name) for name in ("name", "path", "size", "stamp", "num_rows")}
    known = {file.path: PlannedFile(**values, digest="known")}
    assert with_digests([file], known)[0].digest == "known"
    os.utime(path, ns=(1, 1))
    [touched] = _open(tmp_path, path="x.parquet").files
    assert with_digests([touched], known)[0].digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_reader_sees_a_file_that_changes_after_planning(tmp_path: Path) -> None:
    """The stamps of the plan, given to the reader, stop it from mixing two inputs."""
    path = _write(tmp_path / "x.parquet", q=["one", "two"])
    stamps = _open(tmp_path, path="x.parquet").stamps
    _write(path, q=["one", "six"])
    with pytest.raises(InputError, match="has changed since the job was planned"):
        ShardReader(None, stamps).read(Shard(0, str(path), "x.parquet", 0, 1))


def test_jsonl_is_read_as_parquet(tmp_path: Path) -> None:
    """Workers get Parquet, while row_id and messages keep the JSONL file."""
    (tmp_path / "in.jsonl").write_text('{"d": "2024-01-31"}\n\n{"d": "x"}\n')
    inputs = _open(tmp_path, path="in.jsonl")
    [file] = inputs.files
    assert (file.name, file.source) == ("in.jsonl", str(tmp_path / "in.jsonl"))
    assert (file.num_rows, file.size) == (2, 32)
    assert pq.read_table(file.path)["d"].to_pylist() == ["2024-01-31", "x"]
    assert Path(file.path).is_relative_to(tmp_path / "staging")
    assert inputs.stamps == {}


def test_saved_dataset_is_read_as_parquet(tmp_path: Path) -> None:
    """A folder of save_to_disk is an input like any other."""
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"q": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
    inputs = _open(tmp_path, dataset="saved", limit=1)
    assert [(file.name, file.num_rows) for file in inputs.files] == [("train", 1)]
    assert inputs.schema.names == ["q"]
    assert inputs.revision is None


@pytest.mark.parametrize(
    ("limit", "taken"),
    [
        (1, [("a.parquet", 1)]),
        (2, [("a.parquet", 2)]),
        (3, [("a.parquet", 2), ("b.parquet", 0), ("c.parquet", 1)]),
        (99, [("a.parquet", 2), ("b.parquet", 0), ("c.parquet", 3)]),
    ],
)
def test_limit_counts_through_the_files(
    tmp_path: Path, limit: int, taken: list[tuple[str, int]]
) -> None:
    """Files after the limit are left out, and the last one is cut."""
    _write(tmp_path / "in/a.parquet", q=["x", "y"])
    _write(tmp_path / "in/b.parquet", q=pa.array([], pa.string()))
    _write(tmp_path / "in/c.parquet", q=["1", "2", "3"])
    inputs = _open(tmp_path, path="in", limit=limit)
    assert [(file.name, file.num_rows) for file in inputs.files] == taken
    assert inputs.num_rows == min(limit, 5)


def test_limit_asks_nothing_of_further_files(tmp_path: Path) -> None:
    """A file after the limit may be anything."""
    _write(tmp_path / "in/a.parquet", q=["x", "y"])
    (tmp_path / "in/b.parquet").write_bytes(b"")
    assert _open(tmp_path, path="in", limit=2).num_rows == 2


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"q": ["x"], "n": [1.5]}, "column 'n' is double there and int64 here"),
        ({"q": ["x"]}, "column 'n' is there 0 times and int64 once"),
        ({"q": ["x"], "n": [1], "extra": [1]}, "only one of them has column 'extra'"),
    ],
)
def test_files_that_are_not_one_table(
    tmp_path: Path, columns: dict[str, Any], sentence: str
) -> None:
    """The sentence names both files, the first column that differs, and how."""
    _write(tmp_path / "in/a.parquet", q=["x"], n=[1])
    _write(tmp_path / "in/b.parquet", **columns)
    with pytest.raises(InputError, match=rf"b\.parquet and .*a\.parquet .*{sentence}") as caught:
        _open(tmp_path, path="in")
    assert "\n" not in str(caught.value)


def test_metadata_and_order_of_columns_do_not_matter(tmp_path: Path) -> None:
    """Files of several writers are one table when names and types are the same."""
    _write(tmp_path / "in/a.parquet", q=["x"], n=[1])
    other = pa.table({"n": [2], "q": ["y"]}).replace_schema_metadata({"writer": "another"})
    pq.write_table(other, tmp_path / "in/b.parquet")
    inputs = _open(tmp_path, path=["in/b.parquet", "in/a.parquet"])
    assert inputs.schema.names == ["n", "q"]
    assert inputs.schema.metadata is None


def test_doubled_column_is_named(tmp_path: Path) -> None:
    """Two columns of one name cannot be told apart, in the first file or a later one."""
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["q", "q"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has 2 columns named 'q'"):
        _open(tmp_path, path="b.parquet")
    _write(tmp_path / "a.parquet", q=[1])
    with pytest.raises(InputError, match=r"b\.parquet and .*column 'q' is there 2 times"):
        _open(tmp_path, path="*.parquet")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "keys.jsonl"])
def test_input_without_rows_is_refused(tmp_path: Path, name: str) -> None:
    """Nothing to do is a mistake, named with the file."""
    (tmp_path / "rows.jsonl").write_text("\n \n")
    (tmp_path / "keys.jsonl").write_text("{}\n{}\n")
    _write(tmp_path / "rows.parquet", q=pa.array([], pa.string()))
    with pytest.raises(InputError, match=rf"no rows, or no columns .*{name}"):
        _open(tmp_path, path=name)


def test_damaged_file_among_good_ones_is_named(tmp_path: Path) -> None:
    """Of many files, the one that is cut short is named."""
    for name in "abc":
        _write(tmp_path / f"in/{name}.parquet", q=["x"])
    damaged = tmp_path / "in/b.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"b\.parquet is cut short"):
        _open(tmp_path, path="in")
