"""The command line: the only place that prints and exits.

What a command needs is imported inside it, because Ray and torch take seconds to import and
`shardmill --help` shall not.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from jobs import __version__
from jobs.bench_command import bench
from jobs.durations import parse_duration
from jobs.job_options import JOB as _JOB
from jobs.job_options import SET as _SET
from jobs.job_options import as_overrides as _overrides
from jobs.job_options import job_options as _job_options
from jobs.submit_command import submit
from jobs.terminal import log_to_stderr, print_facts, to_json
from pipeline.errors import (
    DamagedOutputError,
    OutputError,
    ShardmillError,
    StoppedError,
    TooManyFailedRowsError,
)
from pipeline.records import FinishReason

if TYPE_CHECKING:
    from jobs.config import JobConfig
    from jobs.progress import Reporter

BUG = 70
KILLED = 130

_FOLDER = click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that has workers generate."""
    for option in (
        _JSON,
        click.option("--quiet", is_flag=True, help="Print warnings and errors only."),
        click.option(
            "--log-file", type=click.Path(path_type=Path), help="Also write the log there."
        ),
        click.option(
            "--ray-address", envvar="RAY_ADDRESS", help="Join this cluster.  [env RAY_ADDRESS]"
        ),
        click.option(
            "--grace",
            callback=_seconds,
            default="60s",
            metavar="TIME",
            help="Time to commit in when stopping. [60s]",
        ),
        click.option(
            "--max-walltime",
            callback=_seconds,
            metavar="TIME",
            help="Stop after this long, such as 2h.",
        ),
        click.option(
            "--stop-file", type=click.Path(path_type=Path), help="Stop when this file appears."
        ),
    ):
        command = option(command)
    return command


def _seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """`90`, `45s`, `30m`, `2h`, `1h30m` as seconds."""
    if value is None:
        return None
    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _retryable(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[FinishReason, ...]:
    """`error,length` as finish reasons."""
    names = [name.strip() for name in value.split(",")] if value is not None else []
    known = (FinishReason.ERROR, FinishReason.LENGTH)
    if unknown := set(names) - {reason.value for reason in known}:
        raise click.BadParameter(f"'{min(unknown)}' is neither error nor length")
    return tuple(reason for reason in known if reason.value in names)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="shardmill")
def cli() -> None:
    """Prompts in Parquet go in, completions in Parquet come out, every row exactly once.

    \b
    Exit codes: 0 complete, 2 usage, 65 input unusable or too many failed rows, 69 no cluster or
    GPU, 70 a bug, 73 output cannot be written, 75 stopped early (the same command continues),
    78 job file wrong or not the one the folder was started with.
    """  # noqa: D301 - click's mark for a paragraph that stays as it is


@cli.command()
@_JOB
@_job_options
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; run nothing.")
@click.option("--fresh", is_flag=True, help="Move the old run folder aside and start over.")
@click.option(
    "--ray-nodes", type=click.IntRange(1), help="Wait until so many nodes have joined the cluster."
)
@_run_options
def run(
    job: Path,
    overrides: tuple[str, ...],
    output: str | None,
    limit: int | None,
    workers: int | None,
    dry_run: bool,
    fresh: bool,
    ray_nodes: int | None,
    stop_file: Path | None,
    max_walltime: float | None,
    grace: float,
    ray_address: str | None,
    log_file: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run a job, or continue it."""
    from jobs.config import load_job
    from jobs.run import RunOptions, run_job
    from jobs.texts import run_text

    config = load_job(job, _overrides(overrides, output, limit, workers))
    if ray_nodes is not None and ray_address is None:
        raise click.UsageError("--ray-nodes needs --ray-address")
    if dry_run:
        _show_plan(config, as_json, must_run=ray_address is None)
        return
    log_to_stderr(logging.WARNING if quiet else logging.INFO, log_file)
    options = RunOptions(fresh, stop_file, max_walltime, grace, ray_address, ray_nodes)
    summary = run_job(config, options, _reporter(quiet))
    if not quiet or as_json:
        print_facts(summary, run_text, as_json)


@cli.command()
@_JOB
@_job_options
@_JSON
def plan(
    job: Path,
    overrides: tuple[str, ...],
    output: str | None,
    limit: int | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Show what a job would do; run and write nothing."""
    from jobs.config import load_job

    log_to_stderr(logging.WARNING)
    _show_plan(load_job(job, _overrides(overrides, output, limit, workers)), as_json)


@cli.command("try")
@_JOB
@_SET
@click.option("-n", "num_rows", type=click.IntRange(1), default=3, help="How many rows. [3]")
@_JSON
def try_(job: Path, overrides: tuple[str, ...], num_rows: int, as_json: bool) -> None:
    """Run the first rows in this process; no Ray, nothing written."""
    from jobs.config import load_job
    from jobs.trial import try_job

    log_to_stderr(logging.WARNING)
    config = load_job(job, overrides)
    show = _discard if as_json else _echo_now
    tried = try_job(config, num_rows, show)
    if as_json:
        click.echo(to_json(tried))


@cli.command()
@_FOLDER
@click.option("--exit-code", is_flag=True, help="Exit with 75 while the job is not complete.")
@click.option("--watch", is_flag=True, help="Show it again every 2 s until nobody works on it.")
@_JSON
def status(folder: Path, exit_code: bool, watch: bool, as_json: bool) -> None:
    """Show where a job stands, running or not.

    --watch ends with 75, as --exit-code does, when the job is not complete and nobody works on it.
    """
    from jobs.status import read_status, watch_status
    from jobs.texts import status_text

    for found in watch_status(folder) if watch else [read_status(folder)]:
        if watch and sys.stdout.isatty():
            click.clear()
        print_facts(found, status_text, as_json)
    if (exit_code or watch) and not found.is_complete:
        sys.exit((TooManyFailedRowsError if found.has_failed else StoppedError).exit_code)


@cli.command()
@_FOLDER
@_JSON
def verify(folder: Path, as_json: bool) -> None:
    """Prove from the files alone that every row is there exactly once."""
    from jobs.texts import verify_text
    from jobs.verify import verify as verify_folder

    report = verify_folder(folder)
    print_facts(report, verify_text, as_json, state=report.state)
    codes = {"damaged": DamagedOutputError.exit_code, "incomplete": StoppedError.exit_code}
    sys.exit(codes.get(report.state, 0))


@cli.command()
@_FOLDER
@click.option(
    "--only",
    callback=_retryable,
    metavar="REASONS",
    help="Rows with these finish reasons: error, length, or error,length. [error]",
)
@_SET
@click.option("--fresh", is_flag=True, help="End an unfinished retry as it stands; start another.")
@_run_options
def retry(
    folder: Path,
    only: tuple[FinishReason, ...],
    overrides: tuple[str, ...],
    fresh: bool,
    stop_file: Path | None,
    max_walltime: float | None,
    grace: float,
    ray_address: str | None,
    log_file: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run the failed rows of a complete folder again, and put them in place.

    Rows that were cut need more room: --only length --set generation.max_new_tokens=N.
    """
    from jobs.retry import retry_rows
    from jobs.run import RunOptions
    from jobs.texts import retry_text

    log_to_stderr(logging.WARNING if quiet else logging.INFO, log_file)
    options = RunOptions(fresh, stop_file, max_walltime, grace, ray_address)
    summary = retry_rows(folder, only, overrides, options, _reporter(quiet))
    if not quiet or as_json:
        print_facts(summary, retry_text, as_json)


@cli.command()
def schema() -> None:
    """Print the job file's JSON Schema, for editors."""
    from jobs.config import job_schema

    click.echo(json.dumps(job_schema(), indent=2))


cli.add_command(bench)
cli.add_command(submit)


def main() -> NoReturn:
    """The console script: runs a command and turns what went wrong into a sentence and a code."""
    try:
        # Click's own errors exit with 2 and a sentence; what is left is ours.
        cli.main(prog_name="shardmill", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("shardmill: interrupted", err=True)
        sys.exit(KILLED)
    except ShardmillError as error:
        click.echo(f"shardmill: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _close_stdout()
        sys.exit(0)
    except Exception as error:  # noqa: BLE001 - the last resort; it is shown whole
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _close_stdout()
            click.echo("shardmill: standard output cannot be written: the disk is full", err=True)
            sys.exit(OutputError.exit_code)
        traceback.print_exc()
        click.echo("shardmill: this is a bug in Shardmill; please report the lines above", err=True)
        sys.exit(BUG)
    sys.exit(0)


def _show_plan(config: JobConfig, as_json: bool, *, must_run: bool = False) -> None:
    from jobs.preview import check_can_run, plan_job  # torch, which a run has in workers only
    from jobs.texts import plan_text

    if must_run:
        check_can_run(config)
    print_facts(plan_job(config), plan_text, as_json)


def _reporter(quiet: bool) -> Reporter:
    from jobs.progress import Bar, Lines, Silent

    if quiet:
        return Silent()
    return Bar(sys.stderr) if sys.stderr.isatty() else Lines(sys.stderr)


def _echo_now(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _discard(text: str) -> None:
    pass


def _close_stdout() -> None:
    """Keeps the interpreter from complaining at its end about a reader that is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
