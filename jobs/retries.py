"""The record of a run folder's retries: what was asked for, and what came of it.

    .shardmill/retries/1/retry.json     written first; the retry exists from then on
    .shardmill/retries/1/result.json    written last; without it the retry is unfinished
    .shardmill/retries/1/.shardmill/    segments/, tmp/, logs/ of the retry

Which rows a retry has put in is told by the parts themselves.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from pipeline.errors import DamagedOutputError
from pipeline.folder import RunFolder
from pipeline.publish import make_folders, output_errors, write_json
from pipeline.records import FinishReason
from pipeline.segments import Totals
from pipeline.settings import Settings

_FOLDERS = ("segments", "tmp", "logs")
_Record = TypeVar("_Record", bound=Settings)


class Retry(Settings):
    """What a retry is to do; written once, when it is started."""

    number: int = Field(ge=1, description="The first retry of a folder is 1.")
    created: str = Field(description="ISO 8601 with offset.")
    versions: dict[str, str] = Field(description="Of Shardmill and what makes the answers.")
    only: tuple[FinishReason, ...] = Field(
        min_length=1, description="The finish reasons of the rows that are generated again."
    )
    max_new_tokens: int = Field(ge=1, description="For these rows.")
    fingerprint: str = Field(min_length=1, description="Of the segments of this retry.")


class RetryResult(Settings):
    """What a retry came to; written once, when it is finished."""

    finished: str = Field(description="ISO 8601 with offset.")
    totals: Totals = Field(description="Over the rows it has put in.")


@dataclass(frozen=True, slots=True)
class RetryRecord:
    """A retry, and its result once it is finished."""

    retry: Retry
    result: RetryResult | None

    def unfinished(self, folder: Path) -> str:
        """The sentence for a retry that is not finished."""
        return (
            f"retry {self.retry.number} is unfinished; every row is there, retried or as it was: "
            f"`shardmill retry {shlex.quote(str(folder))}` goes on with it"
        )


def retry_folder(folder: RunFolder, number: int) -> RunFolder:
    """Where the retry of this number works."""
    return RunFolder(folder.retries / str(number))


def read_retries(folder: RunFolder) -> list[RetryRecord]:
    """All retries of a run folder, by rising number; only the last may be unfinished.

    Raises:
        DamagedOutputError: one of the files is damaged.
    """
    if not folder.retries.is_dir():
        return []
    # A folder without its first file is of a retry that died before it began.
    found = [path.parent for path in folder.retries.glob("*/retry.json")]
    records = [
        RetryRecord(
            _read(path / "retry.json", Retry),
            _read(path / "result.json", RetryResult) if (path / "result.json").exists() else None,
        )
        for path in found
    ]
    return sorted(records, key=lambda record: record.retry.number)


def prepare_retry(folder: RunFolder, number: int) -> RunFolder:
    """Makes the folder of a retry that starts, or goes on after a power cut or in a copy.

    Raises:
        OutputError: it cannot be written.
    """
    own = retry_folder(folder, number)
    with output_errors(folder.root):
        make_folders(own.internal / name for name in _FOLDERS)
    return own


def start_retry(folder: RunFolder, retry: Retry) -> None:
    """Makes the retry's folder, and last the file by which it exists.

    Raises:
        OutputError: they cannot be written.
    """
    own = prepare_retry(folder, retry.number)
    write_json(own.root / "retry.json", retry.model_dump(mode="json"))


def finish_retry(folder: RunFolder, retry: Retry, result: RetryResult) -> None:
    """Writes the file by which a retry is finished.

    Raises:
        OutputError: it cannot be written.
    """
    path = retry_folder(folder, retry.number).root / "result.json"
    write_json(path, result.model_dump(mode="json"))


def _read(path: Path, kind: type[_Record]) -> _Record:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # ValidationError and UnicodeDecodeError are ValueErrors
        raise DamagedOutputError(
            f"'{path}' is damaged ({str(error).splitlines()[0]}); put it back from a copy"
        ) from error
