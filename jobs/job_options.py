"""The job file and the options that change it, the same for every command that takes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

JOB = click.argument("job", type=click.Path(dir_okay=False, path_type=Path), metavar="JOB.yaml")
SET = click.option("--set", "overrides", multiple=True, metavar="A.B=V", help="Change one setting.")


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """`--set`, and short names for what is set most."""
    for option in (
        click.option("--workers", type=click.IntRange(1), help="Same as --set workers.count=N."),
        click.option("--limit", type=click.IntRange(1), help="Only the first N input rows."),
        click.option("--output", type=click.Path(), help="Run folder, instead of the job file's."),
        SET,
    ):
        command = option(command)
    return command


def as_overrides(
    overrides: tuple[str, ...], output: str | None, limit: int | None, workers: int | None
) -> list[str]:
    """The short options as settings; they win over `--set`, being more particular."""
    short = {"output.path": output, "input.limit": limit, "workers.count": workers}
    # JSON is YAML, and quotes whatever a path may hold.
    given = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in short.items()
        if value is not None
    ]
    return [*overrides, *given]
