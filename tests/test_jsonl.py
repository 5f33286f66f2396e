"""JSON lines -> Arrow tables."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import jsonl
from pipeline.errors import InputError

EMPTY = pa.schema([])


def _write(path: Path, content: bytes | str) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _read(path: Path, limit: int | None = None) -> pa.Table:
    schema, num_rows = jsonl.extend_schema(EMPTY, path, limit)
    return pa.concat_tables([schema.empty_table(), *jsonl.tables(path, schema, num_rows)])


@pytest.fixture(params=["one block", "tiny blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer is due whether lines share a block or are each in their own."""
    if request.param == "tiny blocks":
        monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 1)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_types_are_those_of_json(tmp_path: Path, name: str) -> None:
    """Dates stay strings at any depth, int and float are float, objects merge, blanks are none."""
    path = _write(
        tmp_path / name,
        '\ufeff{"d": "2024-01-31", "n": 1, "o": {"t": "2024-01-31T00:00:00Z"}, "z": null}\r\n'
        "\n  \n"
        '{"d": "2024-02-01", "n": 2.5, "o": {"l": ["2024-01-01"]}, "e": []}\n'
        '{"d": "grüße 🎉", "n": null, "o": null, "e": [{"x": true}]}',
    )
    table = _read(path)
    assert table.schema.equals(
        pa.schema(
            [
                ("d", pa.string()),
                ("n", pa.float64()),
                ("o", pa.struct([("t", pa.string()), ("l", pa.list_(pa.string()))])),
                ("z", pa.null()),
                ("e", pa.list_(pa.struct([("x", pa.bool_())]))),
            ]
        )
    )
    assert table.to_pylist() == [
        {
            "d": "2024-01-31",
            "n": 1.0,
            "o": {"t": "2024-01-31T00:00:00Z", "l": None},
            "z": None,
            "e": None,
        },
        {"d": "2024-02-01", "n": 2.5, "o": {"t": None, "l": ["2024-01-01"]}, "z": None, "e": []},
        {"d": "grüße 🎉", "n": None, "o": None, "z": None, "e": [{"x": True}]},
    ]


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize(
    ("lines", "number", "sentence"),
    [
        (b'{"a": 1}\n\n{"a": }\n{"a": "x"}', 3, "not JSON"),
        (b'{"a": 1}\n{"a":\n2}\n', 2, "not JSON"),
        (b'{"a": 1}\n{"a": 2} {"a": 3}\n', 2, "not JSON"),
        (b'{"a": 1}\n{"a": 2', 2, "not JSON"),
        (b'{"a": 1}\n\n[2]\n', 3, "a list, not an object"),
        (b'{"a": 1}\n"x"\n', 2, "a string, not an object"),
        (b'{"a": 1}\n2\n', 2, "a number, not an object"),
        (b'{"a": "x"}\n{"a": "\xff"}\n', 2, "not UTF-8"),
        (b'{"a": 1}\n{"a": 2}\n{"a": "x"}\n{"a": 3}', 3, "same type"),
        (b'{"a": 1}\n\n{"a": 2}\n{"a": "x"}\n', 4, "same type"),
        (b'{"a": {"b": 1}}\n\n{"a": {"b": [1]}}\n', 3, "same type"),
        (b'{"a": 1}\n{"a": true}\n', 2, "same type"),
        (b'{"b": 1}\n{"a": 1, "a": 2}\n', 2, "same type"),
        (b'{"a": 1}\n\n{"a": 99999999999999999999999}\n', 3, "99999999999999999999999 has more"),
        (b'{"a": 1}\n{"a": 9223372036854775808}\n', 2, "9223372036854775808 has more digits"),
        (b'{"a": 1}\n{"a":-9223372036854775809}\n', 2, "write it as a string"),
        (b'{"a": [{"b": [0.5,18446744073709551615]}]}\n', 1, "18446744073709551615 has more"),
        (b'{"a": 1}\n{"a": 1' + b"0" * 5000 + b"}\n", 2, "the number 10{39}… has more digits"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, lines: bytes, number: int, sentence: str) -> None:
    """The sentence has the file, the line and what is wrong with it."""
    path = _write(tmp_path / "a.jsonl", lines)
    with pytest.raises(InputError, match=rf"a\.jsonl, line {number}: .*{sentence}") as caught:
        _read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("block_size")
def test_digits_that_are_no_long_integer(tmp_path: Path) -> None:
    """Whole 64-bit integers, fractions and digits in strings and keys are read as they are."""
    rows = [
        {"a": 2**63 - 1, "b": 0.12345678901234567890, "c": "9" * 30, "9" * 20: 1},
        {"a": -(2**63), "b": 1e25, "c": "-99999999999999999999, 99999999999999999999", "9" * 20: 2},
    ]
    path = _write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert _read(path).to_pylist() == rows


def test_json_list_is_refused_without_reading_it(tmp_path: Path) -> None:
    """A list in one line, as most .json files are, is told how to become lines."""
    with pytest.raises(InputError, match="jq"):
        _read(_write(tmp_path / "a.jsonl", '\n [{"a": 1}]'))


@pytest.mark.parametrize(
    "data", [b"plain", gzip.compress(b'{"a": 1}\n' * 99)[:-9]], ids=["plain", "cut short"]
)
def test_torn_gzip_is_named(tmp_path: Path, data: bytes) -> None:
    """What is no gzip file, or not all of one, is an error and not a short input."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz cannot be read"):
        _read(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A file that went away is an error that names it."""
    with pytest.raises(InputError, match=r"gone\.jsonl cannot be read \(No such file"):
        _read(tmp_path / "gone.jsonl")


@pytest.mark.usefixtures("block_size")
def test_limit_reads_no_further(tmp_path: Path) -> None:
    """Rows after the limit are neither taken nor looked at."""
    path = _write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\nnonsense\n')
    assert _read(path, 2)["a"].to_pylist() == [1, 2]


@pytest.mark.parametrize("line", ['{"a": "x"}', '{"a": 1, "b": 2}'])
def test_file_that_changes_between_the_passes_is_refused(tmp_path: Path, line: str) -> None:
    """The second pass holds the file to the schema of the first."""
    path = _write(tmp_path / "a.jsonl", '{"a": 1}\n')
    schema, num_rows = jsonl.extend_schema(EMPTY, path, None)
    _write(path, line)
    with pytest.raises(InputError, match="has changed while it was read"):
        list(jsonl.tables(path, schema, num_rows))


@settings(max_examples=30)
@given(
    column=st.sampled_from([st.integers(-9, 9), st.text(max_size=5), st.lists(st.text())]).flatmap(
        lambda values: st.lists(st.none() | values, min_size=1, max_size=8)
    ),
    per_block=st.integers(1, 50),
)
def test_values_survive(
    tmp_path_factory: pytest.TempPathFactory, column: list[object], per_block: int
) -> None:
    """Whatever JSON holds of one type comes back as it was, however the lines fall into blocks."""
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("".join(json.dumps({"a": value}) + "\n" for value in column))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_BLOCK_BYTES", per_block)
        assert _read(path)["a"].to_pylist() == column
