"""`shardmill bench`: its options, and which of them go together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from jobs.terminal import log_to_stderr, print_facts
from pipeline.measured import MIN_CONTEXT

if TYPE_CHECKING:
    from jobs.bench import Grid
    from jobs.config import JobConfig

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
OF_MEASURING = ("quantizations", "attentions", "batches", "contexts", "seconds")
OF_COMPARING = ("num_rows", "expected")

Callback = Callable[[click.Context, click.Parameter, str | None], Any]


MOST_ROWS = 65_536
MOST_TOKENS = 1_048_576
"""Of a batch and of a row: more is a slip, and would be made ready for minutes."""


def _numbers(least: int, most: int) -> Callback:
    """`1,8,32` as numbers, each once."""

    def parse(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
        numbers: list[int] = []
        for part in _parts(value):
            if not part.isdecimal() or int(part) < least:
                raise click.BadParameter(f"'{part}' is no whole number from {least} on")
            if int(part) > most:
                raise click.BadParameter(f"'{part}' is more than {most:,}, the most there can be")
            numbers.append(int(part))
        _refuse_twice([str(number) for number in numbers])
        return tuple(numbers)

    return parse


def _attentions(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """`sdpa,eager` as names that transformers knows, each once."""
    names = _parts(value)
    _refuse_unknown(names, ATTENTIONS)
    _refuse_twice(names)
    return tuple(names)


def _quantizations(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, ...]:
    """`none,int8` as words of `model.quantization`; for --compare also one several times."""
    from pipeline.quantization_settings import OPTIONS

    words = _parts(value)
    _refuse_unknown(words, tuple(OPTIONS))
    if param.name != "compared":
        _refuse_twice(words)
    return tuple(words)


def _parts(value: str | None) -> list[str]:
    return [] if value is None else [part.strip() for part in value.split(",")]


def _refuse_unknown(names: list[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise click.BadParameter(f"'{name}' is none of {', '.join(known)}")


def _refuse_twice(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"'{name}' stands there twice")


def _with_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuses a folder that is not there now, and not after an hour of measuring."""
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder '{value.absolute().parent}' to write it in")
    return value


@click.command()
@click.argument("model", metavar="MODEL|JOB.yaml")
@click.option(
    "--quantization",
    "quantizations",
    callback=_quantizations,
    metavar="LIST",
    help="Such as none,int8,nf4. [the job's, or none]",
)
@click.option(
    "--attention",
    "attentions",
    callback=_attentions,
    metavar="LIST",
    help="Such as sdpa,eager. [what a job gets]",
)
@click.option(
    "--batch",
    "batches",
    callback=_numbers(1, MOST_ROWS),
    default="1,8,32,128",
    metavar="LIST",
    help="Rows at a time. [1,8,32,128]",
)
@click.option(
    "--context",
    "contexts",
    callback=_numbers(MIN_CONTEXT, MOST_TOKENS),
    metavar="LIST",
    help="Tokens of each row. [128,512,2048]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    help="Most time for one batch and context; few steps of a small model take less. [5]",
)
@click.option(
    "--compare",
    "compared",
    callback=_quantizations,
    metavar="LIST",
    help="Run rows of JOB.yaml through each of these; the first is the reference.",
)
@click.option("-n", "num_rows", type=click.IntRange(1), default=64, help="Rows to compare on. [64]")
@click.option("--expected", metavar="COLUMN", help="Right answers to compare with. [expected]")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_with_folder,
    metavar="FILE.html",
    help="Also write a page, with plots.",
)
@click.option("--set", "overrides", multiple=True, metavar="A.B=V", help="Change one setting.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
@click.pass_context
def bench(
    ctx: click.Context,
    model: str,
    quantizations: tuple[str, ...],
    attentions: tuple[str, ...],
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    seconds: float,
    compared: tuple[str, ...],
    num_rows: int,
    expected: str | None,
    output: Path | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure a model on this machine, or compare its quantizations on a job.

    MODEL is a folder or a hub id: speed and memory by batch, context and what else is listed. With
    --compare, rows of a job go through each quantization: how many answers stay the same, or
    right, and at what speed.
    """
    _refuse_idle_options(ctx, bool(compared))
    if compared and not _is_job(model):
        raise click.UsageError(f"--compare runs rows of a job: give it a job file, not '{model}'")
    log_to_stderr(logging.WARNING if quiet else logging.INFO)
    job = _job(model, overrides)
    if compared:
        _compare(job, compared, num_rows, expected, output, as_json)
        return
    from jobs.bench import Grid

    grid = Grid(quantizations or (None,), attentions or (None,), batches, contexts, seconds)
    _measure(job, grid, output, as_json)


def _refuse_idle_options(ctx: click.Context, is_comparing: bool) -> None:
    """What was given must count for something."""
    for param in ctx.command.params:
        name = str(param.name)
        is_given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_given and is_comparing and name in OF_MEASURING:
            raise click.UsageError(
                f"{param.opts[0]} goes without --compare, which runs a job as it is"
            )
        if is_given and not is_comparing and name in OF_COMPARING:
            raise click.UsageError(f"{param.opts[0]} goes with --compare only")


def _is_job(model: str) -> bool:
    return model.endswith((".yaml", ".yml"))


def _job(model: str, overrides: tuple[str, ...]) -> JobConfig:
    """The job, or one of which only the model counts."""
    from jobs.config import build_job, load_job

    if _is_job(model):
        return load_job(Path(model), overrides)
    blocks = {
        "name": "bench",
        "input": {"path": "unused"},
        "prompt": {"template": "unused"},
        "model": {"path": model},
        "output": {"path": "unused"},
    }
    return build_job(blocks, overrides, Path("--set"))


def _measure(job: JobConfig, grid: Grid, output: Path | None, as_json: bool) -> None:
    from jobs.bench import bench_model
    from jobs.bench_pages import bench_page
    from jobs.html import page_html, write_html
    from jobs.page import page_text
    from pipeline.extras import require

    if output is not None:
        require("bench", "--output")
    report = bench_model(job, grid)
    print_facts(report, lambda report: page_text(bench_page(report)), as_json)
    if output is not None:
        from jobs.plot import plot_svg

        write_html(output, page_html(bench_page(report), plot_svg(report)))


def _compare(
    job: JobConfig,
    words: tuple[str, ...],
    num_rows: int,
    expected: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from jobs.bench_pages import compare_page
    from jobs.compare import compare_job
    from jobs.html import page_html, write_html
    from jobs.page import page_text

    report = compare_job(job, words, num_rows, expected)
    print_facts(report, lambda report: page_text(compare_page(report)), as_json)
    if output is not None:
        write_html(output, page_html(compare_page(report)))
