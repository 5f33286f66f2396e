"""JSONL inputs become Parquet once, whole or not at all."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import jsonl, staging
from jobs.sources import find_sources
from jobs.staging import Staged, stage_jsonl, stage_once, write_parquet
from pipeline.errors import InputError, OutputError


def _stage(folder: Path, limit: int | None = None) -> list[Staged]:
    return stage_jsonl(find_sources(["in"], folder), limit, folder / "staging")


def _put(folder: Path, **files: str) -> None:
    (folder / "in").mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / "in" / f"{name}.jsonl").write_text(text)


def test_all_files_get_one_schema(tmp_path: Path) -> None:
    """A column that only one file has, or has as float, is the same in all of them."""
    _put(tmp_path, a='{"x": 1}\n', b='{"x": 2.5, "y": "2024-01-01"}\n{"y": null}\n')
    tables = [pq.read_table(staged.path) for staged in _stage(tmp_path)]
    assert tables[0].schema.equals(pa.schema([("x", pa.float64()), ("y", pa.string())]))
    assert tables[1].schema.equals(tables[0].schema)
    assert [table.to_pylist() for table in tables] == [
        [{"x": 1.0, "y": None}],
        [{"x": 2.5, "y": "2024-01-01"}, {"x": None, "y": None}],
    ]


def test_source_is_described(tmp_path: Path) -> None:
    """Name, size and digest are the JSONL file's, so that a change of it is seen."""
    _put(tmp_path, a='{"x": 1}\n')
    [staged] = _stage(tmp_path)
    text = b'{"x": 1}\n'
    assert (staged.name, staged.size) == ("a.jsonl", len(text))
    assert staged.digest == hashlib.sha256(text).hexdigest()
    assert staged.path.is_absolute()


def test_finished_folder_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same content is not converted again; other content, or another limit, is."""
    _put(tmp_path, a='{"x": 1}\n{"x": 2}\n')
    first = _stage(tmp_path)
    monkeypatch.setattr(jsonl, "extend_schema", None)
    assert _stage(tmp_path) == first
    monkeypatch.undo()
    assert pq.read_table(_stage(tmp_path, 1)[0].path).num_rows == 1
    _put(tmp_path, a='{"x": 1}\n{"x": 3}\n')
    assert pq.read_table(_stage(tmp_path)[0].path)["x"].to_pylist() == [1, 3]


def test_limit_leaves_files_out(tmp_path: Path) -> None:
    """The limit counts through the files, and what lies after it is not looked at."""
    _put(tmp_path, a='{"x": 1}\n', b='{"x": 2}\nnonsense\n', c="nonsense\n")
    staged = _stage(tmp_path, 2)
    assert [file.name for file in staged] == ["a.jsonl", "b.jsonl"]
    assert [pq.read_table(file.path).num_rows for file in staged] == [1, 1]


def test_row_groups_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long file becomes many row groups, in order."""
    monkeypatch.setattr(staging, "ROW_GROUP_ROWS", 10)
    _put(tmp_path, a="".join(f'{{"x": {i}}}\n' for i in range(95)))
    file = pq.ParquetFile(_stage(tmp_path)[0].path)
    assert file.metadata.num_row_groups == 10
    assert file.read()["x"].to_pylist() == list(range(95))


def test_interrupted_conversion_leaves_nothing_to_reuse(tmp_path: Path) -> None:
    """A folder gets its name only when it is whole; what an earlier attempt left is removed."""

    def fail(folder: Path) -> None:
        (folder / "000007.parquet").write_bytes(b"half")
        raise InputError("cut off")

    with pytest.raises(InputError, match="cut off"):
        stage_once(tmp_path, "key", fail)
    paths = stage_once(tmp_path, "key", lambda out: _write(staging.staged_path(out, 0)))
    assert [path.name for path in paths] == ["000000.parquet"]
    assert [path.name for path in tmp_path.iterdir()] == [paths[0].parent.name]


def _write(path: Path) -> None:
    table = pa.table({"x": [1]})
    write_parquet(path, table.schema, [table], "test")


def test_type_that_parquet_lacks_is_refused(tmp_path: Path) -> None:
    """An object without keys has no Parquet type; the sentence names file and column."""
    _put(tmp_path, a='{"empty": {}}\n')
    with pytest.raises(InputError, match=r"a\.jsonl cannot be held in Parquet .*'empty'"):
        _stage(tmp_path)


def test_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the input but the run folder is to blame when the disk is full."""

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")

    _put(tmp_path, a='{"x": 1}\n')
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        _stage(tmp_path)
    monkeypatch.undo()
    assert len(_stage(tmp_path)) == 1


def test_missing_source_is_named(tmp_path: Path) -> None:
    """A file that went away after it was found is an input error."""
    _put(tmp_path, a='{"x": 1}\n')
    sources = find_sources(["in"], tmp_path)
    (tmp_path / "in" / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"a\.jsonl cannot be read"):
        stage_jsonl(sources, None, tmp_path / "staging")
