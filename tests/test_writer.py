"""Tests of `pipeline.writer`."""

from __future__ import annotations

import datetime
import decimal
import json
import resource
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import segments
from pipeline.errors import JobFileError, OutputError, SupersededError
from pipeline.folder import RunFolder
from pipeline.records import Completion, FinishReason, RequestId, Shard
from pipeline.segments import SegmentInfo, committed_infos, read_rows
from pipeline.writer import OUTPUT_FIELDS, Seen, SegmentWriter, output_schema

NAMES = [field.name for field in OUTPUT_FIELDS]


def _through_parquet(table: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return pq.read_table(pa.BufferReader(sink.getvalue()))


def _folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.segments.mkdir(parents=True)
    folder.tmp.mkdir()
    return folder


def _writer(folder: RunFolder, table: pa.Table, num_samples: int = 1, prefix: str = ""):
    schema = output_schema(table.schema, prefix)
    return SegmentWriter(
        folder.root, fingerprint="f", schema=schema, num_samples=num_samples, worker="w"
    )


def _done(row: int, sample: int = 0, text: str | None = "fine", **more: object) -> Completion:
    return Completion(RequestId(0, row, sample), text, FinishReason.STOP, **more)


def _shard(table: pa.Table) -> Shard:
    return Shard(0, "in.parquet", "in.parquet", 0, table.num_rows)


def _all_types() -> pa.Table:
    """Three rows of every type that Parquet gives back, a null in each column."""
    moment = datetime.datetime(2024, 2, 29, 12, 30)
    plain = {
        "bool": ([True, None, False], pa.bool_()),
        "int8": ([1, None, -3], pa.int8()),
        "uint64": ([1, None, 2**64 - 1], pa.uint64()),
        "half": ([0.5, None, 2.0], pa.float16()),
        "double": ([0.1, None, 3.0], pa.float64()),
        "string": (["", None, "é\0ü"], pa.string()),
        "large_string": (["a", None, "b"], pa.large_string()),
        "string_view": (["a", None, "b" * 20], pa.string_view()),
        "binary": ([b"\xff", None, b""], pa.binary()),
        "binary_view": ([b"\xff", None, b""], pa.binary_view()),
        "fixed_binary": ([b"abc", None, b"def"], pa.binary(3)),
        "null": ([None, None, None], pa.null()),
        "decimal": ([decimal.Decimal("1.25"), None, decimal.Decimal(-2)], pa.decimal128(30, 5)),
        "decimal256": ([decimal.Decimal("1.25"), None, None], pa.decimal256(60, 5)),
        "date": ([moment.date(), None, moment.date()], pa.date32()),
        "time": ([moment.time(), None, moment.time()], pa.time64("us")),
        "naive": ([moment, None, moment], pa.timestamp("ms")),
        "zoned": ([moment, None, moment], pa.timestamp("ns", "Europe/Berlin")),
        "duration": ([datetime.timedelta(1), None, datetime.timedelta(2)], pa.duration("us")),
        "dictionary": (["a", None, "b"], pa.dictionary(pa.int8(), pa.string())),
        "list": ([[1, None], None, []], pa.list_(pa.int64())),
        "large_list": ([["a"], None, []], pa.large_list(pa.string())),
        "list_view": ([[1], None, []], pa.list_view(pa.int64())),
        "fixed_list": ([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)),
        "struct": ([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}], _STRUCT),
        "map": ([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        "messages": ([[{"role": "user", "content": "hi"}], None, []], _MESSAGES),
        "uuid": ([b"0123456789abcdef", None, b"x" * 16], pa.uuid()),
    }
    fields = [pa.field(name, kind, metadata={"note": name}) for name, (_, kind) in plain.items()]
    arrays = [pa.array(values, kind) for values, kind in plain.values()]
    return _through_parquet(pa.Table.from_arrays(arrays, schema=pa.schema(fields)))


_STRUCT = pa.struct([("a", pa.int8()), ("b", pa.list_(pa.string()))])
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@pytest.mark.parametrize("num_samples", [1, 2])
def test_every_type_passes_through(tmp_path: Path, num_samples: int) -> None:
    """Types, values, nulls and field metadata come out as they went in, also across commits."""
    table = _all_types()
    folder = _folder(tmp_path)
    writer = _writer(folder, table, num_samples)
    ids = [(row, sample) for row in range(3) for sample in range(num_samples)]
    writer.write(_shard(table), table, [_done(*i) for i in ids[::2]], Seen(0))
    writer.write(_shard(table), table, [_done(*i) for i in reversed(ids[1::2])], Seen(1))
    rows = read_rows(folder, committed_infos(folder, 0, "f"))
    assert rows.schema.equals(output_schema(table.schema))
    for name in table.column_names:
        values = [value for value in table[name].to_pylist() for _ in range(num_samples)]
        assert rows.schema.field(name).type == table.schema.field(name).type
        assert rows.schema.field(name).metadata[b"note"] == name.encode()
        assert rows[name].to_pylist() == values
    assert rows["row_id"].to_pylist() == [f"in.parquet#{row}" for row, _ in ids]


def test_output_columns(tmp_path: Path) -> None:
    """The added columns hold the completion's fields, under the prefix."""
    table = pa.table({"completion": [1, 2]})
    folder = _folder(tmp_path)
    failed = Completion(RequestId(0, 1, 0), None, FinishReason.ERROR, error="k: m")
    good = _done(0, text="hi", stop_reason="\n", num_prompt_tokens=3, num_completion_tokens=2)
    info = _writer(folder, table, prefix="o_").write(_shard(table), table, [failed, good], Seen(0))
    assert read_rows(folder, [info]).to_pylist() == [
        {"completion": 1}
        | {
            f"o_{n}": v
            for n, v in zip(NAMES, ["in.parquet#0", 0, "hi", "stop", "\n", 3, 2, None], strict=True)
        },
        {"completion": 2}
        | {
            f"o_{n}": v
            for n, v in zip(
                NAMES, ["in.parquet#1", 0, None, "error", None, 0, 0, "k: m"], strict=True
            )
        },
    ]


def test_schema_is_fixed_by_the_input_alone(tmp_path: Path) -> None:
    """A shard of failed rows has the schema of any other."""
    table = pa.table({"a": pa.array([None], pa.int16())})
    folder = _folder(tmp_path)
    failed = Completion(RequestId(0, 0, 0), None, FinishReason.ERROR, error="k: m")
    info = _writer(folder, table).write(_shard(table), table, [failed], Seen(0))
    types = {field.name: field.type for field in read_rows(folder, [info]).schema}
    assert types == {"a": pa.int16()} | {field.name: field.type for field in OUTPUT_FIELDS}


def test_kept_columns_and_nullability() -> None:
    """Only the columns asked for stay, and a column without nulls may get one in a later file."""
    schema = pa.schema([pa.field("a", pa.int8(), nullable=False), ("completion", pa.string())])
    output = output_schema(schema, columns=["a"])
    assert output.names == ["a", *NAMES]
    assert output.field("a").nullable


def test_schema_is_what_files_give_back() -> None:
    """Types that Parquet does not know are replaced at once, not found to differ in a part."""
    kinds = {"seconds": pa.timestamp("s"), "numbers": pa.dictionary(pa.int32(), pa.int64())}
    output = output_schema(pa.schema(list(kinds.items())))
    assert output.types[:2] == [pa.timestamp("ms"), pa.int64()]


def test_clash_names_column_and_setting() -> None:
    """Two columns of one name are refused before anything runs."""
    with pytest.raises(JobFileError, match=r"output\.prefix.*'error'"):
        output_schema(pa.schema([("error", pa.string())]))


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("a\ud800b", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("\udce9", "\ufffd"),
        ("\ufeffé\0", "\ufeffé\0"),
    ],
)
def test_surrogates(tmp_path: Path, text: str, stored: str) -> None:
    """Text that UTF-8 cannot hold costs a character, not the shard; other text is unchanged."""
    table = pa.table({"a": [1]})
    folder = _folder(tmp_path)
    info = _writer(folder, table).write(
        _shard(table), table, [_done(0, text=text, stop_reason=text)], Seen(0)
    )
    rows = read_rows(folder, [info])
    assert rows["completion"].to_pylist() == rows["stop_reason"].to_pylist() == [stored]


def test_hugging_face_features_grow_with_the_columns(tmp_path: Path) -> None:
    """`datasets` reads labels as labels and sees the added columns."""
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    source = datasets.Dataset.from_dict({"label": [1]}, features=features)
    source.to_parquet(tmp_path / "in.parquet")
    table = pq.read_table(tmp_path / "in.parquet")
    output = output_schema(table.schema)
    assert datasets.Features.from_arrow_schema(output)["label"] == features["label"]
    described = json.loads(output.metadata[b"huggingface"])["info"]["features"]
    assert datasets.Features.from_dict(described).arrow_schema.names == ["label", *NAMES]


def test_metadata_of_pandas_is_dropped(tmp_path: Path) -> None:
    """A frame with numbered columns makes an output that pandas can read.

    With the input's own entry, pandas takes the added names for numbers and raises.
    """
    pd.DataFrame({0: [1, 2], 1: ["a", "b"]}, index=[5, 6]).to_parquet(tmp_path / "in.parquet")
    table = pq.read_table(tmp_path / "in.parquet")
    folder = _folder(tmp_path)
    writer = _writer(folder, table)
    writer.write(_shard(table), table, [_done(0), _done(1)], Seen(0))
    frame = pd.read_parquet(next(folder.segments.iterdir()))
    assert list(frame.columns) == ["0", "1", "__index_level_0__", *NAMES]


def test_second_attempt_at_a_row_is_superseded(tmp_path: Path) -> None:
    """The first to publish it wins; the other leaves nothing behind."""
    table = pa.table({"a": [1, 2]})
    folder = _folder(tmp_path)
    writer = _writer(folder, table)
    first = writer.write(_shard(table), table, [_done(0, text="first")], Seen(0))
    with pytest.raises(SupersededError):
        writer.write(_shard(table), table, [_done(0, text="zombie"), _done(1)], Seen(0))
    assert read_rows(folder, [first])["completion"].to_pylist() == ["first"]
    assert list(folder.tmp.iterdir()) == []


def test_full_disk_publishes_nothing(tmp_path: Path) -> None:
    """A file that the system cuts short ends as exit 73, leaves no trace, and can be done again."""
    table = pa.table({"a": [1]})
    folder = _folder(tmp_path)
    writer = _writer(folder, table)
    text = "".join(chr(0x4E00 + i * i % 20000) for i in range(20000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"File too large.*free space") as caught:
            writer.write(_shard(table), table, [_done(0, text=text)], Seen(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 73
    assert list(folder.tmp.iterdir()) == list(folder.segments.iterdir()) == []
    info = writer.write(_shard(table), table, [_done(0, text=text)], Seen(0))
    assert read_rows(folder, [info])["completion"].to_pylist() == [text]


def test_interrupted_write_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow closes a file that an exception leaves into a valid one; it must not be taken."""
    table = pa.table({"a": [1]})
    folder = _folder(tmp_path)

    def interrupt(*_args: object) -> str:
        raise KeyboardInterrupt

    class Writer(pq.ParquetWriter):
        add_key_value_metadata = interrupt

    monkeypatch.setattr(segments.pq, "ParquetWriter", Writer)
    with pytest.raises(KeyboardInterrupt):
        _writer(folder, table).write(_shard(table), table, [_done(0)], Seen(0))
    assert list(folder.tmp.iterdir()) == list(folder.segments.iterdir()) == []


def test_file_that_reads_back_otherwise_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A footer that is not what was to be written stops the commit."""
    table = pa.table({"a": [1]})
    folder = _folder(tmp_path)
    monkeypatch.setattr(SegmentInfo, "num_completions", 2)
    with pytest.raises(segments.DamagedOutputError, match="read back"):
        _writer(folder, table).write(_shard(table), table, [_done(0)], Seen(0))
    assert list(folder.segments.iterdir()) == []


@pytest.mark.parametrize(
    "completions",
    [[], [_done(0), _done(0)], [Completion(RequestId(1, 0, 0), "", FinishReason.STOP)]],
    ids=["none", "doubled", "other shard"],
)
def test_our_own_mistakes_are_caught(tmp_path: Path, completions: list[Completion]) -> None:
    """A caller that mixes up completions fails loudly instead of committing them."""
    table = pa.table({"a": [1]})
    folder = _folder(tmp_path)
    with pytest.raises(AssertionError):
        _writer(folder, table).write(_shard(table), table, completions, Seen(0))
    assert list(folder.segments.iterdir()) == []


def test_no_input_columns(tmp_path: Path) -> None:
    """With no column kept, the output is the added columns alone."""
    table = pa.table({"a": [1, 2]})
    folder = _folder(tmp_path)
    schema = output_schema(table.schema, columns=[])
    writer = SegmentWriter(folder.root, fingerprint="f", schema=schema, num_samples=1, worker="w")
    info = writer.write(_shard(table), table.select([]), [_done(1)], Seen(0))
    assert read_rows(folder, [info])["row_id"].to_pylist() == ["in.parquet#1"]
