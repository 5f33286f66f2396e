"""The schedulers' own programs, called with a limit in time and no question asked."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from pipeline.errors import ResourceError

LIMIT = 120.0
"""Seconds that a program may take."""


def call(command: Sequence[str], text: str = "") -> str:
    """What a program says on standard output.

    Raises:
        ResourceError: it is missing, fails or does not answer.
    """
    return checked(attempt(command, text)).stdout


def attempt(command: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """A program that may fail, run to its end.

    Args:
        text: its standard input.

    Raises:
        ResourceError: it is missing or does not answer.
    """
    program = command[0]
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # a crontab goes back as it came
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ResourceError(f"'{program}' has not answered in {LIMIT:.0f} s") from None
    except OSError as error:
        raise ResourceError(
            f"cannot start '{program}' ({error.strerror}); submit from a machine that has it on "
            "its PATH, or take what --print prints there"
        ) from None


def checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The program, if it has not failed.

    Raises:
        ResourceError: with the last line that it has said.
    """
    if done.returncode:
        lines = (done.stdout + done.stderr).split("\n")
        said = [line.strip() for line in lines if line.strip()]
        reason = said[-1] if said else f"exit code {done.returncode}, and not a word"
        raise ResourceError(f"'{done.args[0]}' failed: {reason}")
    return done
