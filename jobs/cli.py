"""The command line: the only place that prints and exits.

What a command needs is imported inside it, because Ray and torch take seconds to import and
`shardmill --help` shall not.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from jobs import __version__
from pipeline.errors import DamagedOutputError, OutputError, ShardmillError, StoppedError

if TYPE_CHECKING:
    from jobs.config import JobConfig
    from jobs.progress import Reporter

BUG = 70
KILLED = 130

_JOB = click.argument("job", type=click.Path(dir_okay=False, path_type=Path), metavar="JOB.yaml")
_FOLDER = click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
_SET = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=V", help="Change one setting."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")


def _job_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that change the job, the same for every command that takes one."""
    for option in (
        click.option("--workers", type=click.IntRange(1), help="Same as --set workers.count=N."),
        click.option("--limit", type=click.IntRange(1), help="Only the first N input rows."),
        click.option("--output", type=click.Path(), help="Run folder, instead of the job file's."),
        _SET,
    ):
        command = option(command)
    return command


def _seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """`90`, `45s`, `30m`, `2h`, `1h30m` as seconds."""
    if value is None:
        return None
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", value.strip())
    if not match or not match[0]:
        raise click.BadParameter(f"'{value}' is no duration such as 45s, 30m, 2h or 1h30m")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="shardmill")
def cli() -> None:
    r"""Prompts in Parquet go in, completions in Parquet come out, every row exactly once.

    \b
    Exit codes: 0 complete, 2 usage, 65 input unusable or too many failed rows, 69 no cluster or
    GPU, 70 a bug, 73 output cannot be written, 75 stopped early (the same command continues),
    78 job file wrong or not the one the folder was started with.
    """


@cli.command()
@_JOB
@_job_options
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; run nothing.")
@click.option("--fresh", is_flag=True, help="Move the old run folder aside and start over.")
@click.option("--stop-file", type=click.Path(path_type=Path), help="Stop when this file appears.")
@click.option(
    "--max-walltime", callback=_seconds, metavar="TIME", help="Stop after this long, such as 2h."
)
@click.option(
    "--grace",
    callback=_seconds,
    default="60s",
    metavar="TIME",
    help="Time to commit in when stopping. [60s]",
)
@click.option("--ray-address", envvar="RAY_ADDRESS", help="Join this cluster.  [env RAY_ADDRESS]")
@click.option("--log-file", type=click.Path(path_type=Path), help="Also write the log there.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors only.")
@_JSON
def run(
    job: Path,
    overrides: tuple[str, ...],
    output: str | None,
    limit: int | None,
    workers: int | None,
    dry_run: bool,
    fresh: bool,
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
    if dry_run:
        _show_plan(config, as_json, must_run=ray_address is None)
        return
    _log_to_stderr(logging.WARNING if quiet else logging.INFO, log_file)
    options = RunOptions(fresh, stop_file, max_walltime, grace, ray_address)
    summary = run_job(config, options, _reporter(quiet))
    if not quiet or as_json:
        _print(summary, run_text, as_json)


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

    _log_to_stderr(logging.WARNING)
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

    _log_to_stderr(logging.WARNING)
    config = load_job(job, overrides)
    show = _discard if as_json else _echo_now
    tried = try_job(config, num_rows, show)
    if as_json:
        click.echo(_as_json(tried))


@cli.command()
@_FOLDER
@click.option("--exit-code", is_flag=True, help="Exit with 75 while the job is not complete.")
@_JSON
def status(folder: Path, exit_code: bool, as_json: bool) -> None:
    """Show where a job stands, running or not."""
    from jobs.status import read_status
    from jobs.texts import status_text

    found = read_status(folder)
    _print(found, status_text, as_json)
    if exit_code and not found.is_complete:
        sys.exit(StoppedError.exit_code)


@cli.command()
@_FOLDER
@_JSON
def verify(folder: Path, as_json: bool) -> None:
    """Prove from the files alone that every row is there exactly once."""
    from jobs.texts import verify_text
    from jobs.verify import verify as verify_folder

    report = verify_folder(folder)
    _print(report, verify_text, as_json, state=report.state)
    codes = {"damaged": DamagedOutputError.exit_code, "incomplete": StoppedError.exit_code}
    sys.exit(codes.get(report.state, 0))


@cli.command()
def schema() -> None:
    """Print the job file's JSON Schema, for editors."""
    from jobs.config import job_schema

    click.echo(json.dumps(job_schema(), indent=2))


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
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _close_stdout()
        click.echo("shardmill: standard output cannot be written: the disk is full", err=True)
        sys.exit(OutputError.exit_code)
    except Exception:  # noqa: BLE001 - the last resort; it is shown whole
        traceback.print_exc()
        click.echo("shardmill: this is a bug in Shardmill; please report the lines above", err=True)
        sys.exit(BUG)
    sys.exit(0)


def _overrides(
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


def _show_plan(config: JobConfig, as_json: bool, *, must_run: bool = False) -> None:
    from jobs.preview import check_can_run, plan_job  # torch, which a run has in workers only
    from jobs.texts import plan_text

    if must_run:
        check_can_run(config)
    _print(plan_job(config), plan_text, as_json)


def _print(facts: Any, text: Callable[[Any], str], as_json: bool, **more: object) -> None:
    click.echo(_as_json(facts, **more) if as_json else text(facts))


def _as_json(facts: Any, **more: object) -> str:
    from pydantic import TypeAdapter

    values = TypeAdapter(type(facts)).dump_python(facts, mode="json")
    return json.dumps(values | more if more else values, indent=2)


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


def _log_to_stderr(level: int, log_file: Path | None = None) -> None:
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


def _close_stdout() -> None:
    """Keeps the interpreter from complaining at its end about a reader that is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
