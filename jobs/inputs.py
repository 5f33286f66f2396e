"""The `input` block -> the Parquet files that the workers read, checked by their footers alone.

Memory grows with the number of files; not with rows, and not with row groups.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pyarrow as pa
from pydantic import Field, model_validator

from jobs.content import content_digests
from jobs.dataset import DatasetRequest, stage_dataset
from jobs.manifest import PlannedFile
from jobs.sources import find_sources
from jobs.staging import Staged, stage_jsonl
from pipeline.errors import InputError
from pipeline.reader import file_stamp, read_footer
from pipeline.settings import Settings

logger = logging.getLogger(__name__)

_WORTH_A_WORD = 2**29  # bytes that take a second or so to read
_FOOTER_THREADS = 16  # waiting for a network file system, most of the time


class InputSettings(Settings):
    """Where the prompts come from."""

    path: str | Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="File, folder or glob, or a list of them; all Parquet, or all JSONL (.jsonl or "
        ".ndjson, also with .gz).",
    )
    dataset: str | None = Field(
        default=None,
        description="Hugging Face hub id, or a folder written by datasets' save_to_disk.",
    )
    config: str | None = Field(
        default=None, description="Configuration of a hub data set, such as 'main'."
    )
    split: str = Field(default="train", description="Split of a data set.")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub data set; recorded as a commit."
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Only the first so many rows of the whole input."
    )

    @model_validator(mode="after")
    def _one_source(self) -> InputSettings:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs exactly one of 'path' and 'dataset'")
        if self.dataset is None and (self.config is not None or self.revision is not None):
            raise ValueError("has 'config' or 'revision', which only a 'dataset' has")
        return self


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input.

    Attributes:
        name: how `row_id` names it, unique: the source's path relative to the folder that all
            sources share, or the split of a data set.
        path: the Parquet file that workers read, absolute.
        source: what the user has: the same file, a JSONL file or a data set.
        size: of the source, in bytes.
        num_rows: rows taken from it, from its first on; 0 is possible.
        stamp: of the file at `path`; see `file_stamp`.
        digest: sha256 of a JSONL file's content; of a data set's commit (or fingerprint),
            configuration and split; empty for a Parquet file, which is read in full only when
            its digest is asked for.
    """

    name: str
    path: str
    source: str
    size: int
    num_rows: int
    stamp: str
    digest: str


@dataclass(frozen=True, slots=True)
class Inputs:
    """The rows of a job.

    Attributes:
        files: in order; rows are counted through them.
        schema: of every file; the order of the columns is the first file's.
        revision: the commit of a hub data set.
    """

    files: tuple[InputFile, ...]
    schema: pa.Schema
    revision: str | None = None

    @property
    def num_rows(self) -> int:
        """At least 1."""
        return sum(file.num_rows for file in self.files)

    @property
    def stamps(self) -> dict[str, str]:
        """By path, for `ShardReader`: the files of the user, which may change under us."""
        return {file.path: file.stamp for file in self.files if file.path == file.source}


def with_digests(files: Sequence[InputFile], known: Mapping[str, PlannedFile]) -> list[InputFile]:
    """The files with their digests; those that have changed since they were known are read.

    Args:
        files: from `open_inputs`.
        known: by path, as an earlier run has seen them.

    Raises:
        InputError: a file cannot be read.
    """
    unread = [file for file in files if not file.digest and not _is_known(file, known)]
    size = sum(file.size for file in unread)
    if size >= _WORTH_A_WORD:
        logger.info("reading %.1f GiB of input, to know it again", size / 2**30)
    paths = [file.path for file in unread]
    digests = dict(zip(paths, content_digests([Path(path) for path in paths]), strict=True))
    digests = {path: file.digest for path, file in known.items()} | digests
    return [file if file.digest else replace(file, digest=digests[file.path]) for file in files]


def _is_known(file: InputFile, known: Mapping[str, PlannedFile]) -> bool:
    return file.path in known and known[file.path].stamp == file.stamp


def open_inputs(settings: InputSettings, base: Path, staging: Path) -> Inputs:
    """Find the input, convert what is not Parquet, and check that it can be used.

    Args:
        settings: the `input` block.
        base: the folder that relative paths start from.
        staging: the folder for converted inputs; made when it is needed.

    Raises:
        InputError: there is no input, or it cannot be read as one table.
        OutputError: the staging folder cannot be written.
    """
    candidates, revision = _parquet_files(settings, base, staging)
    first = _checked_schema(candidates[0])
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        opened = pool.map(lambda file: _opened(file, candidates[0], first), candidates)
        files = tuple(_limited(opened, settings.limit))
    inputs = Inputs(files, first, revision)
    if not inputs.num_rows or not first.names:
        raise InputError(
            f"the input has no rows, or no columns (its first file is {files[0].source}): add some."
        )
    return inputs


def _parquet_files(
    settings: InputSettings, base: Path, staging: Path
) -> tuple[Sequence[InputFile], str | None]:
    if settings.dataset is not None:
        request = DatasetRequest(
            settings.dataset, settings.config, settings.split, settings.revision, settings.limit
        )
        staged, commit = stage_dataset(request, base, staging.absolute())
        return [_from_staged(staged)], commit
    assert settings.path is not None, "the settings have one of the two"
    entries = (settings.path,) if isinstance(settings.path, str) else settings.path
    sources = find_sources(entries, base)
    if sources[0].is_jsonl:
        converted = stage_jsonl(sources, settings.limit, staging.absolute())
        return [_from_staged(staged) for staged in converted], None
    paths = [(source.name, str(source.path)) for source in sources]
    return [InputFile(name, path, path, 0, 0, "", "") for name, path in paths], None


def _from_staged(staged: Staged) -> InputFile:
    path = str(staged.path)
    return InputFile(staged.name, path, staged.source, staged.size, 0, "", staged.digest)


def _checked_schema(file: InputFile) -> pa.Schema:
    schema = read_footer(file.path).schema.remove_metadata()
    for name, count in Counter(schema.names).items():
        if count > 1:
            raise InputError(
                f"{file.source} has {count} columns named '{name}': rename all but one."
            )
    return schema


def _opened(file: InputFile, first: InputFile, schema: pa.Schema) -> InputFile:
    """The file with what its footer says; the footer itself, which may be large, is let go."""
    footer = read_footer(file.path)
    if difference := _difference(schema, footer.schema):
        raise InputError(
            f"{file.source} and {first.source} are not one table: {difference}; give all files the "
            "same columns, or name only those that have them in input.path."
        )
    num_rows = footer.metadata.num_rows
    size = file.size if file.digest else footer.size
    return replace(file, num_rows=num_rows, size=size, stamp=file_stamp(file.path))


def _difference(first: pa.Schema, other: pa.Schema) -> str | None:
    """What distinguishes two schemas, order and metadata apart."""
    for field in first:
        count = other.names.count(field.name)
        if count != 1:
            return f"column '{field.name}' is there {count} times and {_type(field)} once"
        if not field.equals(other.field(field.name)):
            name = field.name
            return f"column '{name}' is {_type(other.field(name))} there and {_type(field)} here"
    extra = sorted(set(other.names) - set(first.names))
    return f"only one of them has column '{extra[0]}'" if extra else None


def _type(field: pa.Field) -> str:
    return f"{field.type}{'' if field.nullable else ' not null'}"


def _limited(files: Iterator[InputFile], limit: int | None) -> Iterator[InputFile]:
    """The files up to the limit, the last one cut to it."""
    left = limit
    for file in files:
        if left is None:
            yield file
            continue
        yield replace(file, num_rows=min(left, file.num_rows))
        left -= min(left, file.num_rows)
        if not left:
            return
