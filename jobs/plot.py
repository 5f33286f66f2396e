"""The figures of `bench` as curves over the batch size. matplotlib is imported only here."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from jobs.bench import BenchReport
from pipeline.measured import Speed, State

FIGURES: tuple[tuple[str, Callable[[Speed], float]], ...] = (
    ("decode, tokens/s", lambda speed: speed.decode_tokens_per_second),
    ("prefill, tokens/s", lambda speed: speed.prefill_tokens_per_second),
    ("peak memory, MiB", lambda speed: speed.peak_bytes / 2**20),
)
ENDED = (State.MEMORY, State.KILLED)


def plot_svg(report: BenchReport) -> str:
    """A panel for each figure and context, a line for each kind; a cross where memory ended."""
    text = io.StringIO()
    _figure(report).savefig(text, format="svg")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _figure(report: BenchReport) -> Figure:
    size = (1.5 + 3.5 * len(report.contexts), 3.0 * len(FIGURES))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        len(FIGURES), len(report.contexts), squeeze=False, sharex=True, sharey="row"
    )
    for row, (name, value) in zip(panels, FIGURES, strict=True):
        row[0].set_ylabel(name)
        for axes, context in zip(row, report.contexts, strict=True):
            _draw(axes, report, context, value)
    for axes, context in zip(panels[0], report.contexts, strict=True):
        axes.set_title(f"context {context}")
    for axes in panels[-1]:
        axes.set_xlabel("batch")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    # A picture is soon apart from its page.
    figure.supxlabel(_caption(report), fontsize=7)
    return figure


def _caption(report: BenchReport) -> str:
    facts = next(kind.facts for kind in report.kinds if kind.facts)
    device = report.where.cpu if facts.device == "cpu" else facts.device
    torch = report.where.versions["torch"]
    return f"{report.model}, {facts.dtype}; {device}; torch {torch}; {report.where.date}"


def _draw(axes: Axes, report: BenchReport, context: int, value: Callable[[Speed], float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(report.batches, list(map(str, report.batches)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, alpha=0.3)
    for number, kind in enumerate(report.kinds):
        cells = [cell for cell in kind.cells if cell.shape.context == context]
        points = [(cell.shape.batch, value(cell.speed)) for cell in cells if cell.speed]
        axes.plot(*_columns(points), marker="o", color=f"C{number}", label=kind.name)
        for cell in cells:
            if cell.state in ENDED:
                bottom = axes.get_xaxis_transform()  # batch, share of the panel's height
                axes.plot([cell.shape.batch], [0.04], "x", color=f"C{number}", transform=bottom)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
