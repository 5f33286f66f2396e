"""`input.dataset` -> Parquet: a hub data set, or a folder that `datasets` has saved.

The only module that knows the `datasets` library, which it imports when there is something to
load: the import takes seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.staging import ROW_GROUP_ROWS, Staged, stage_once, staged_path, write_parquet
from pipeline.errors import InputError
from pipeline.reader import unreadable

_BATCH_BYTES = 16 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class DatasetRequest:
    """Which data set.

    Attributes:
        name: a hub id, or a folder.
        config: the data set's configuration; None is its only or default one.
        revision: branch, tag or commit of a hub data set.
        limit: most rows.
    """

    name: str
    config: str | None
    split: str
    revision: str | None
    limit: int | None


def stage_dataset(request: DatasetRequest, base: Path, staging: Path) -> tuple[Staged, str | None]:
    """Convert a data set, with its types as Arrow has them.

    Args:
        request: which one.
        base: the folder that a relative folder starts from.
        staging: the folder for staged folders.

    Returns:
        The file, and the commit of a hub data set.

    Raises:
        InputError: the data set, the split or the revision is not there.
        OutputError: the staging folder cannot be written.
    """
    folder = base / Path(request.name).expanduser()
    is_here = os.path.isdir(folder)
    data, commit = (_saved(folder, request), None) if is_here else _from_hub(request)
    identity = [request.config, request.split, commit or data._fingerprint]
    [path] = stage_once(
        staging, ["dataset", request.limit, identity], lambda out: _write(data, request, out)
    )
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()
    return Staged(request.split, path, request.name, data.data.nbytes, digest), commit


def _saved(folder: Path, request: DatasetRequest) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    # A folder with anything in it may make the library raise anything.
    except Exception as error:
        raise InputError(
            f"input.dataset: folder '{folder}' was not written by save_to_disk, or not all of it "
            f"({_reason(error)}); for a folder of Parquet or JSONL files use input.path."
        ) from error
    splits = data if isinstance(data, dict) else {str(data.split or request.split): data}
    if request.split not in splits:
        raise InputError(_no_split(request, list(splits)))
    return splits[request.split]


def _from_hub(request: DatasetRequest) -> tuple[Any, str | None]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(
            request.name, request.config, revision=request.revision
        )
        builder.download_and_prepare()
        data = builder.as_dataset(split=request.split)
    # The library, and those under it, raise anything; at this border it is the input that failed.
    except Exception as error:
        raise InputError(
            f"input.dataset '{request.name}', split '{request.split}', cannot be loaded "
            f"({_reason(error)}): check name, config, split, revision and network."
        ) from error
    commit = builder.hash if _COMMIT.fullmatch(builder.hash or "") else None
    # Without network the library takes any revision that it has in its cache.
    if _COMMIT.fullmatch(request.revision or "") and commit != request.revision:
        raise InputError(
            f"input.dataset '{request.name}' is to be of revision '{request.revision}', but only "
            f"'{builder.hash}' is to be had: connect to the hub, or correct input.revision."
        )
    return data, commit


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _no_split(request: DatasetRequest, splits: list[str]) -> str:
    return (
        f"input.dataset '{request.name}' has no split '{request.split}': set input.split to one of "
        f"{', '.join(splits)}."
    )


def _write(data: Any, request: DatasetRequest, out: Path) -> None:
    if request.limit is not None:
        data = data.select(range(min(request.limit, data.num_rows)))
    schema = _storage(data.data.schema)
    write_parquet(staged_path(out, 0), schema, _tables(data, schema), request.name)


def _tables(data: Any, schema: pa.Schema) -> Iterator[pa.Table]:
    row_bytes = data.data.nbytes // max(1, data.num_rows) + 1
    num_rows = max(1, min(ROW_GROUP_ROWS, _BATCH_BYTES // row_bytes))
    try:
        for table in data.with_format("arrow").iter(num_rows):
            yield table.cast(schema)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(str(data), error) from error


def _storage(schema: pa.Schema) -> pa.Schema:
    """The schema without the extension types of `datasets`, which workers do not load."""
    return pa.schema(
        [
            field.with_type(field.type.storage_type)
            if isinstance(field.type, pa.ExtensionType)
            else field
            for field in schema
        ]
    )
