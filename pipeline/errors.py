"""Every exception that Shardmill raises on purpose.

    ShardmillError              a sentence for the user; the program ends with `exit_code`
    ├── JobFileError            78  the job file is wrong
    ├── JobDiffersError         78  the folder was started with another job, or other input
    ├── InputError              65  an input file or data set cannot be used
    ├── ModelError              65  the model folder, tokenizer or quantization cannot be used
    ├── TooManyFailedRowsError  65  more rows failed than `failure.max_failed_rows` allows
    ├── DamagedOutputError      65  the output on disk is not what was written
    ├── ResourceError           69  no cluster, GPU or worker to be had
    │   └── RayFailedError      69  Ray has not started, or has ended; its own logs are kept
    ├── WorkerError             70  workers die or raise for a reason that is not the user's
    ├── OutputError             73  the output cannot be written or read, or is something else's
    └── StoppedError            75  stopped early; the same command continues
        └── LockedError         75  another run works in this folder
    RowError                    one row cannot be done; it becomes data, never an exit
    SupersededError             another attempt at the shard has committed; this one is discarded

Nothing else is caught by name in the command line: any other exception is a bug (70).
"""

from __future__ import annotations

from typing import ClassVar


class ShardmillError(Exception):
    """A mistake or a condition that the user can act on; its text is one clear sentence."""

    exit_code: ClassVar[int] = 70


class JobFileError(ShardmillError):
    """The job file, or a `--set`, is not a valid job."""

    exit_code = 78


class JobDiffersError(ShardmillError):
    """The run folder was started with a job that would give other answers."""

    exit_code = 78


class InputError(ShardmillError):
    """The input is missing, unreadable or not what the job file says."""

    exit_code = 65


class ModelError(ShardmillError):
    """The model cannot be loaded as the job asks."""

    exit_code = 65


class TooManyFailedRowsError(ShardmillError):
    """More rows ended in an error than the job allows; all that was committed is kept."""

    exit_code = 65


class DamagedOutputError(ShardmillError):
    """A file of the run folder is torn, altered or foreign."""

    exit_code = 65


class ResourceError(ShardmillError):
    """The cluster, GPU or memory that the job asks for is not there."""

    exit_code = 69


class RayFailedError(ResourceError):
    """Ray itself does not start, or processes of it that nothing works without are gone."""


class WorkerError(ShardmillError):
    """Workers keep failing for a reason that lies in no row."""

    exit_code = 70


class OutputError(ShardmillError):
    """The run folder cannot be written, or what is in it cannot be read."""

    exit_code = 73


class StoppedError(ShardmillError):
    """The run was asked to stop; the same command continues it."""

    exit_code = 75


class LockedError(StoppedError):
    """Another run holds the folder."""


class RowError(Exception):
    """One row cannot be done.

    Args:
        kind: a short word for grouping, such as `template` or `overlong`.
        message: what is wrong with this row.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class SupersededError(Exception):
    """A name that is to be made is there already: another attempt got there first."""


SENTENCE_ERRORS = (OSError, ValueError, ImportError, RuntimeError)
"""Libraries raise exactly these with a text for people; of others it says little by itself."""
MAX_ERROR_CHARACTERS = 600


def describe(error: BaseException) -> str:
    """An exception of a library in one line, with its type where the text says little."""
    text = " ".join(str(error).split())
    if len(text) > MAX_ERROR_CHARACTERS:
        text = f"{text[:MAX_ERROR_CHARACTERS]}…"
    if type(error) in SENTENCE_ERRORS and " " in text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
