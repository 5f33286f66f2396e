"""A program that notes what it was called with, and the paths that it may be given."""

from __future__ import annotations

from pathlib import Path

from tests.fake_slurm import make_program
from tests.submissions import texts

# Notes its arguments, and a variable of its environment.
RECORDER = """#!/bin/sh
printf '%s\\0' "$@" >"{folder}/arguments"
printf '%s' "$VALUE" >"{folder}/value"
exit "${{CODE:-0}}"
"""


def as_path(text: str) -> str:
    """A job file's path with that in its name, and with what shells and cron would take apart."""
    return f"/a b/{text}'\"$(false)\\%\n.yaml"


paths = texts.map(as_path)


def make_recorder(path: Path) -> Path:
    """A program that plays Python, or run_job.sh, and exits with $CODE."""
    return make_program(path, RECORDER.format(folder=path.parent))


def recorded(recorder: Path) -> tuple[list[str], str]:
    """The arguments that it got last, and the value of $VALUE."""
    arguments = (recorder.parent / "arguments").read_bytes().decode("utf-8")
    value = (recorder.parent / "value").read_bytes().decode("utf-8")
    return arguments.split("\0")[:-1], value
