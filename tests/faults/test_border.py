"""Anything at all as job file, input or model: a sentence and an exit code, and nothing made."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings

from tests.faults.border import Border
from tests.small_jobs import questions, write_job

CODES = {0, 65, 69, 73, 78}
"""Of the exit codes in docs/exit-codes.md those that a job on this machine may end with here."""

SOME = settings(max_examples=25, suppress_health_check=list(HealthCheck))
MANY = settings(SOME, max_examples=600)

TEXT = st.text(st.characters(exclude_characters="/~"), max_size=20)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["", ".", "*"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def border() -> Iterator[Border]:
    """Where commands are run."""
    border = Border()
    yield border
    border.close()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A job that would run, with a copy of its model beside it."""
    folder = tmp_path_factory.mktemp("border")
    shutil.copytree(llama_folder, folder / "model")
    return write_job(folder, folder / "model", questions(20))


def _check(border: Border, job: Path, *commands: str) -> None:
    """Each command ends with a sentence, or its facts, and leaves the folder as it was."""
    before = _snapshot(job.parent)
    for command in commands:
        result = border.call(command, job)
        assert result.code in CODES, result.stderr
        assert "Traceback" not in result.stderr
        if result.code:
            assert "shardmill: " in result.stderr
            assert len(result.stderr.splitlines()[-1]) > 20
        assert _snapshot(job.parent) == before


def _snapshot(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*") if path.is_file()} | {
        str(path): 0.0 for path in folder.rglob("*") if path.is_dir()
    }


@cache
def _settings_of(job: Path) -> list[tuple[str, ...]]:
    """The settings of a job file that may be there, as keys from the outside in."""
    from jobs.config import JobConfig

    blocks = {name: field.annotation for name, field in JobConfig.model_fields.items()}
    paths: list[tuple[str, ...]] = [(name,) for name in blocks]
    for name, block in blocks.items():
        paths += [(name, key) for key in getattr(block, "model_fields", {})]
    return paths


def _spoil(values: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[path[-1]] = value


def _fuzz_jobs(border: Border, job: Path, data: st.DataObject) -> None:
    """A job with some settings that are anything."""
    text = job.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    paths = st.sampled_from(_settings_of(job)) | st.tuples(TEXT) | st.tuples(TEXT, TEXT)
    for path, value in data.draw(st.lists(st.tuples(paths, VALUES), min_size=1, max_size=3)):
        _spoil(values, path, value)
    try:
        job.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        _check(border, job, "run")
    finally:
        job.write_text(text, encoding="utf-8")


def _fuzz_file(border: Border, job: Path, data: st.DataObject, path: Path, *commands: str) -> None:
    """The file is random bytes, or it has been cut, overwritten or lengthened somewhere."""
    content = path.read_bytes()
    try:
        path.write_bytes(data.draw(st.binary(max_size=200) | _damaged(content)))
        _check(border, job, *commands)
    finally:
        path.write_bytes(content)


@st.composite
def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    # Ends matter most: magic bytes, footers, headers.
    near_an_end = st.integers(0, min(64, len(content))) | st.integers(
        max(0, len(content) - 400), len(content)
    )
    first = draw(near_an_end | st.integers(0, len(content)))
    last = min(len(content), first + draw(st.integers(0, 4) | st.integers(0, len(content))))
    return content[:first] + draw(st.binary(max_size=8)) + content[last:]


@example(text=b"")
@example(text=b"a: &a [*a]")
@example(text=b"[" * 5000)
@example(text=b"name: !!python/object:os.system {}")
@example(text=b"\xff\xfe")
@given(text=st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
@SOME
def test_text_that_is_no_job(border: Border, job: Path, text: bytes) -> None:
    """Whatever stands in a job file."""
    content = job.read_bytes()
    try:
        job.write_bytes(text)
        _check(border, job, "run")
    finally:
        job.write_bytes(content)


KINDS: dict[str, Callable[[Border, Path, st.DataObject], None]] = {}


def _kind(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(fuzz: Callable[..., None]) -> Callable[..., None]:
        KINDS[name] = fuzz
        return fuzz

    return add


_kind("job")(_fuzz_jobs)


@_kind("parquet")
def _fuzz_parquet(border: Border, job: Path, data: st.DataObject) -> None:
    _fuzz_file(border, job, data, job.parent / "in.parquet", "run", "plan")


@_kind("jsonl")
def _fuzz_jsonl(border: Border, job: Path, data: st.DataObject) -> None:
    lines = b"".join(b'{"q": "%d apples", "n": [%d, null]}\n' % (n, n) for n in range(5))
    _fuzz_other_input(border, job, data, "in.jsonl", lines)


@_kind("gzip")
def _fuzz_gzip(border: Border, job: Path, data: st.DataObject) -> None:
    _fuzz_other_input(border, job, data, "in.jsonl.gz", gzip.compress(b'{"q": "x"}\n' * 9, mtime=0))


def _fuzz_other_input(
    border: Border, job: Path, data: st.DataObject, name: str, content: bytes
) -> None:
    text, path = job.read_text(encoding="utf-8"), job.parent / name
    try:
        path.write_bytes(content)
        job.write_text(text.replace("in.parquet", name), encoding="utf-8")
        _fuzz_file(border, job, data, path, "run")
    finally:
        path.unlink()
        job.write_text(text, encoding="utf-8")


@_kind("model")
def _fuzz_model(border: Border, job: Path, data: st.DataObject) -> None:
    files = sorted(path for path in (job.parent / "model").iterdir() if path.is_file())
    _fuzz_file(border, job, data, data.draw(st.sampled_from(files)), "run", "plan")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@SOME
def test_a_few(border: Border, job: Path, data: st.DataObject, kind: str) -> None:
    """A sentence and a code for anything a user may hand in."""
    check = KINDS[kind]
    check(border, job, data)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@MANY
def test_many(border: Border, job: Path, data: st.DataObject, kind: str) -> None:
    """The same, for long."""
    check = KINDS[kind]
    check(border, job, data)
