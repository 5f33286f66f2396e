"""What the commands share: facts shown as text or JSON, and the log on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def print_facts(facts: Any, text: Callable[[Any], str], as_json: bool, **more: object) -> None:
    """Prints a value for a person, or as JSON with `more` beside it."""
    click.echo(to_json(facts, **more) if as_json else text(facts))


def to_json(facts: Any, **more: object) -> str:
    """A value of plain classes as JSON."""
    from pydantic import TypeAdapter

    values = TypeAdapter(type(facts)).dump_python(facts, mode="json")
    return json.dumps(values | more if more else values, indent=2)


def log_to_stderr(level: int, log_file: Path | None = None) -> None:
    """Shows the log from `level` on, and writes all of it to a file if there is one."""
    from jobs.logs import terminal_handler

    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(terminal_handler(sys.stderr, level))
    if log_file is not None:
        root.addHandler(_file_handler(log_file))


def _file_handler(path: Path) -> logging.Handler:
    from jobs.logs import log_handler

    try:
        return log_handler(path)
    except OSError as error:
        raise click.BadParameter(f"cannot write '{path}': {error.strerror}") from None
