"""A job as a line of a crontab, which calls run_job.sh."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from jobs.schedulers.programs import attempt, call, checked
from jobs.schedulers.submission import ROOT, Submission
from pipeline.errors import JobFileError, ResourceError

SCRIPT = ROOT / "run_job.sh"

LONGEST_COMMAND = 998
"""Bytes of a line after its five fields; what is beyond Vixie's cron drops, and runs the rest."""


def render(submission: Submission) -> str:
    """A comment that names the job, and its line.

    Raises:
        JobFileError: the job file names no time, something has a line break in it, or the line is
            too long.
        ResourceError: run_job.sh is not there.
    """
    schedule = submission.cluster.schedule
    if schedule is None:
        raise JobFileError(
            f"{submission.job_file}: 'cluster.schedule' is missing: --to cron needs to know when, "
            "such as --set cluster.schedule='0 2 * * *'"
        )
    if not SCRIPT.exists():
        raise ResourceError(
            f"{SCRIPT} is not there: --to cron needs the repository, and not only the package"
        )
    return f"{_mark(submission)}\n{schedule} {_command(submission)}\n"


def send(submission: Submission) -> str:
    """Puts the line into this user's crontab, in place of an earlier one of the same job.

    Raises:
        JobFileError: see `render`.
        ResourceError: likewise, or crontab is missing or does not take it.
    """
    line = render(submission)
    present = attempt(["crontab", "-l"])
    if present.returncode and "no crontab" not in present.stderr:
        checked(present)
    kept = _without(present.stdout if present.returncode == 0 else "", _mark(submission))
    if kept and not kept.endswith("\n"):
        kept += "\n"
    call(["crontab", "-"], kept + line)
    return f"in the crontab; its log is {_log(submission)}"


def _command(submission: Submission) -> str:
    command = " ".join(_words(submission))
    length = len(command.encode("utf-8", "surrogateescape"))
    if length > LONGEST_COMMAND:
        raise JobFileError(
            f"{submission.job_file}: its command in the crontab has {length} bytes, and cron reads "
            f"{LONGEST_COMMAND} at most; put the settings into the job file"
        )
    return command


def _words(submission: Submission) -> Iterator[str]:
    for name, value in _variables(submission).items():
        yield f"{name}={_quoted(name, value)}"
    yield _quoted("the script's path", str(SCRIPT))
    for argument in submission.run_arguments:
        yield _quoted("an argument", argument)
    if submission.cluster.walltime is not None:
        yield f"--max-walltime={submission.cluster.walltime}"


def _variables(submission: Submission) -> dict[str, str]:
    """For run_job.sh, and what the job file asks for."""
    is_own = submission.cluster.python is None and Path(sys.prefix) == ROOT / ".venv"
    python = {} if is_own else {"SHARDMILL_PYTHON": submission.python}
    return {"SHARDMILL_LOG": _log(submission), **python, **submission.cluster.env}


def _log(submission: Submission) -> str:
    return f"{submission.job.output.path}.log"


def _mark(submission: Submission) -> str:
    return f"# {submission.name}"


def _without(crontab: str, mark: str) -> str:
    """The crontab without a marked line; every other byte stays."""
    kept, follows_mark = [], False
    for line in crontab.splitlines(keepends=True):
        is_mark = line.strip() == mark
        # Who has removed the job's line may have left its mark.
        is_ours = is_mark or (follows_mark and SCRIPT.name in line)
        if not is_ours:
            kept.append(line)
        follows_mark = is_mark
    return "".join(kept)


def _quoted(what: str, text: str) -> str:
    r"""A word as it must stand in a crontab: cron takes % for a line break, and `\%` for a %.

    Raises:
        JobFileError: a crontab's line cannot hold it.
    """
    if set(text) & set("\n\r\0"):
        raise JobFileError(f"a line of a crontab cannot hold {what}, which has a line break in it")
    # Only what is between the % is quoted, so that no backslash of the text stands before one.
    return r"\%".join(shlex.quote(part) if part else "" for part in text.split("%")) or "''"
