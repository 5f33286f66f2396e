"""Lines of JSON -> Arrow tables, in blocks of bounded size; and which line is wrong, and how.

Arrow reads the lines. What it would guess beyond JSON's own types, it is kept from: a string that
looks like a date stays a string.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.json

from pipeline.errors import InputError
from pipeline.reader import unreadable

_BLOCK_BYTES = 8 << 20
_KINDS = {list: "list", str: "string", bool: "boolean", type(None): "null"}
_INT64 = range(-(2**63), 2**63)
_MANY_DIGITS = b"1" * len(str(2**63))
_ANY_DIGIT = bytes.maketrans(b"023456789", b"1" * 9)
_UNFIT = (ValueError, pa.ArrowException)  # Arrow's own, bad UTF-8, and a wrong number of rows


class Line(NamedTuple):
    """A line that is not blank; lines are counted from 1, the blank ones too."""

    number: int
    text: bytes


def extend_schema(known: pa.Schema, path: Path, limit: int | None) -> tuple[pa.Schema, int]:
    """A schema that fits the known one's rows and this file's.

    A null fits every type, an integer column with a fraction in it becomes float, and objects get
    the keys of all.

    Returns:
        The schema, and the number of rows: at most `limit`.

    Raises:
        InputError: a line is not a JSON object in UTF-8, a column changes its type, or an integer
            needs more than 64 bits.
    """
    num_rows = 0
    for block in _blocks(path, limit):
        try:
            known = _merged(known, block)
        except _UNFIT:
            raise _line_error(known, path, block) from None
        _refuse_long_integers(path, block)
        num_rows += len(block)
    return known, num_rows


def tables(path: Path, schema: pa.Schema, limit: int) -> Iterator[pa.Table]:
    """The file's rows, at most `limit`, block by block.

    Raises:
        InputError: the file is no longer what the schema was found from.
    """
    for block in _blocks(path, limit):
        try:
            yield _parse(block, schema)
        except _UNFIT as error:
            raise InputError(
                f"{path} has changed while it was read ({error}): run again when nothing writes it."
            ) from error


def _blocks(path: Path, limit: int | None) -> Iterator[list[Line]]:
    left, number = sys.maxsize if limit is None else limit, 1
    with _reading(path), _open(path) as file:
        while left and (texts := file.readlines(_BLOCK_BYTES)):
            lines = [Line(n, text) for n, text in enumerate(texts, number) if not text.isspace()]
            number += len(texts)
            if block := lines[:left]:
                yield block
            left -= len(block)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(str(path), error) from error


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    is_packed = path.name.lower().endswith(".gz")
    with gzip.open(path, "rb") if is_packed else path.open("rb") as file:
        # Often all of such a file is one line, too long to be read as one.
        if file.peek(64).lstrip().startswith(b"["):
            raise InputError(
                f"{path} is one JSON list, not an object on each line: convert it, for example "
                "with jq -c '.[]'."
            )
        yield file


def _parse(block: list[Line], schema: pa.Schema | None = None) -> pa.Table:
    text = b"\n".join(line.text for line in block)
    text.decode()  # Arrow does not look whether strings are UTF-8
    table = pyarrow.json.read_json(
        pa.BufferReader(text),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=schema, unexpected_field_behavior="error" if schema else "infer"
        ),
    )
    # Arrow takes two objects on a line, and one object on two.
    if table.num_rows != len(block):
        raise ValueError(f"{len(block)} lines hold {table.num_rows} objects")
    return table


def _merged(known: pa.Schema, block: list[Line]) -> pa.Schema:
    found = pa.schema([field.with_type(_json_type(field.type)) for field in _parse(block).schema])
    return pa.unify_schemas([known, found], promote_options="permissive")


def _json_type(kind: pa.DataType) -> pa.DataType:
    """The type without Arrow's guess that a string is a time."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_json_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_json_type(field.type)) for field in kind])
    return kind


def _refuse_long_integers(path: Path, block: list[Line]) -> None:
    # Arrow makes floats of them, which hold 15 digits. To look for so many digits in a row costs
    # a tenth of what Arrow takes; most of those that are found are in strings.
    for line in block:
        if _MANY_DIGITS in line.text.translate(_ANY_DIGIT) and (fault := _own_fault(line)):
            raise InputError(f"{path}, line {line.number}: {fault}")


def _line_error(known: pa.Schema, path: Path, block: list[Line]) -> InputError:
    """What is wrong with the first line that does not fit, found by halving."""
    fits, fails = 0, len(block)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if _why_unfit(known, block[:middle]) is None:
            fits = middle
        else:
            fails = middle
    line, why = block[fails - 1], _why_unfit(known, block[:fails])
    return InputError(f"{path}, line {line.number}: {_own_fault(line) or _arrow_fault(why)}")


def _why_unfit(known: pa.Schema, block: list[Line]) -> Exception | None:
    try:
        _merged(known, block)
    except _UNFIT as error:
        return error
    return None


def _own_fault(line: Line) -> str | None:
    try:
        value = json.loads(line.text.decode("utf-8-sig"), parse_int=_integer)
    except OverflowError as error:
        return str(error)
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start}); convert the file, as with iconv."
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at character {error.colno}); write one object on each line."
    if not isinstance(value, dict):
        kind = _KINDS.get(type(value), "number")
        return f"a {kind}, not an object; write one object on each line."
    return None


def _integer(text: str) -> int:
    # By length first, because `int` refuses thousands of digits.
    if len(text) > len(str(_INT64.start)) or int(text) not in _INT64:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise OverflowError(
            f"the number {shown} has more digits than 64 bits hold; write it as a string."
        )
    return int(text)


def _arrow_fault(why: Exception | None) -> str:
    reason = re.sub(r"^JSON parse error: | in row \d+$", "", str(why))
    return f"cannot be read ({reason}); give each key one value, of the same type in all lines."
