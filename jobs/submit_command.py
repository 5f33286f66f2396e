"""`shardmill submit`: its options."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.job_options import JOB, as_overrides, job_options


@click.command()
@JOB
@job_options
@click.option(
    "--to",
    "scheduler",
    type=click.Choice(["slurm", "ray", "kuberay", "cron"]),
    required=True,
    help="Who is to run it.",
)
@click.option("--print", "is_printed", is_flag=True, help="Print what would be sent; send nothing.")
def submit(
    job: Path,
    overrides: tuple[str, ...],
    output: str | None,
    limit: int | None,
    workers: int | None,
    scheduler: str,
    is_printed: bool,
) -> None:
    """Hand a job to a scheduler; its cluster block says what it needs.

    Sending the same job twice is harmless: docs/scheduling.md.
    """
    from jobs.schedulers.known import SCHEDULERS
    from jobs.schedulers.submission import prepare_submission

    submission = prepare_submission(job, as_overrides(overrides, output, limit, workers))
    if is_printed:
        click.echo(SCHEDULERS[scheduler].render(submission), nl=False)
    else:
        click.echo(SCHEDULERS[scheduler].send(submission))
