"""The reports of `bench` as pages for a person who has to decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from jobs.bench import BenchReport, Kind
from jobs.compare import CompareReport, Example, Variant
from jobs.machine import Surroundings
from jobs.page import Page, Row, Table, mebibytes, rate
from pipeline.measured import Cell, ModelFacts, Speed, State

NOTHING = "-"
MOST_LETTERS = 300
"""Of a prompt's end or a completion's beginning, in an example."""
LEGEND = {
    State.MEMORY: "memory: it ran out.",
    State.KILLED: "killed: the process was ended from outside, most likely for want of memory.",
    State.FAILED: "failed: see below.",
    State.SLOW: "slow: given up, as one step did not end.",
    State.UNTRIED: f"{NOTHING}: not tried, since a smaller one has no figures, or took too long.",
}


def bench_page(report: BenchReport) -> Page:
    """Tables over batch and context."""
    measured = [kind.facts for kind in report.kinds if kind.facts]
    facts = [*_about(measured[0]), *_where(report.where, measured[0])]
    figures: tuple[tuple[str, Callable[[Speed], str]], ...] = (
        ("decode, tokens/s", lambda speed: rate(speed.decode_tokens_per_second)),
        ("prefill, tokens/s", lambda speed: rate(speed.prefill_tokens_per_second)),
        (_peak_title(measured[0]), lambda speed: mebibytes(speed.peak_bytes)),
    )
    tables = [_grid(report, title, shown) for title, shown in figures]
    return Page(
        title=f"bench of {report.model}",
        facts=tuple(facts),
        tables=(_loads(report.kinds), *tables),
        notes=tuple(_bench_notes(report)),
    )


def _about(facts: ModelFacts) -> Iterator[tuple[str, str]]:
    context = "no limit" if facts.context_length is None else f"{facts.context_length:,} tokens"
    yield "model", f"{facts.architecture}, {facts.num_parameters / 1e6:,.1f}M, context {context}"


def _where(where: Surroundings, facts: ModelFacts) -> Iterator[tuple[str, str]]:
    device = "no GPU" if facts.device == "cpu" else f"on {facts.device}"
    memory = f"{where.memory_bytes / 2**30:.1f} GiB"
    num = facts.num_threads
    threads = f"{num} thread{'s' * (num != 1)}"
    yield "machine", f"{where.cpu}, {threads}, {memory}, {device}; {where.system}"
    yield "busy", f"load average {where.load_average:.1f} on {where.num_cores} cores when it began"
    yield "versions", ", ".join(f"{name} {number}" for name, number in where.versions.items())
    yield "date", where.date


def _peak_title(facts: ModelFacts) -> str:
    return "peak memory, MiB" + (" (resident)" if facts.device == "cpu" else " (on the GPU)")


def _loads(kinds: Sequence[Kind]) -> Table:
    rows = [
        (kind.quantization, kind.attention, *_load(kind.facts))
        if kind.facts
        else (kind.quantization, kind.attention, *[NOTHING] * 4)
        for kind in kinds
    ]
    header = ("quantization", "attention", "type", "seconds", "weights, MiB", "peak, MiB")
    return Table("loading", header, tuple(rows), 3)


def _load(facts: ModelFacts) -> Row:
    sizes = mebibytes(facts.num_weight_bytes), mebibytes(facts.loaded_bytes)
    return facts.dtype, f"{facts.load_seconds:.1f}", *sizes


def _grid(report: BenchReport, title: str, shown: Callable[[Speed], str]) -> Table:
    """Rows by context and then kind, so that what is to be compared stands together."""
    header = ("context", "quantization", "attention", *(f"batch {n}" for n in report.batches))
    rows = [
        (
            str(context),
            kind.quantization,
            kind.attention,
            *(
                _shown(cell, shown, _has_room(report, kind, cell))
                for cell in kind.cells
                if cell.shape.context == context
            ),
        )
        for context in report.contexts
        for kind in report.kinds
    ]
    return Table(title, header, tuple(rows), 3)


def _shown(cell: Cell, shown: Callable[[Speed], str], has_room: bool) -> str:
    if cell.speed is not None:
        return shown(cell.speed) + ("" if has_room else "*")
    return NOTHING if cell.state is State.UNTRIED else cell.state.value


def _has_room(report: BenchReport, kind: Kind, cell: Cell) -> bool:
    """Whether a job with these settings would run so many rows at a time."""
    if cell.speed is None or kind.facts is None:
        return True
    return cell.speed.cache_bytes <= (report.cache_bytes or kind.facts.job_cache_bytes)


def _bench_notes(report: BenchReport) -> Iterator[str]:
    cells = [(kind, cell) for kind in report.kinds for cell in kind.cells]
    states = {cell.state for _, cell in cells}
    yield from (text for state, text in LEGEND.items() if state in states)
    if not all(_has_room(report, *pair) for pair in cells):
        yield (
            "*: a job gives keys and values less memory than this takes, unless "
            "engine.cache_bytes says so; it would run fewer rows at a time."
        )
    yield (
        "Decode is the median step of rows that all have as many tokens as the context says, in "
        f"tokens of all rows together. A cell has {report.max_seconds:g} s, and one step at least."
    )
    if report.left_out:
        left_out = ", ".join(map(str, report.left_out))
        yield f"Left out, as the model's context is shorter: {left_out}."
    yield from (f"{kind.name}: {kind.problem}" for kind in report.kinds if kind.problem)
    failed = [(kind, cell) for kind, cell in cells if cell.state is State.FAILED and cell.message]
    yield from dict.fromkeys(f"{kind.name} failed: {cell.message}" for kind, cell in failed)


def compare_page(report: CompareReport) -> Page:
    """A column for each quantization, and some rows that differ."""
    reference = report.variants[0]
    assert reference.facts is not None, "without a reference there is no report"
    facts = [
        ("rows", f"{report.num_rows:,} of {report.num_input_rows:,}, evenly spread"),
        ("generation", f"{report.generation}; batch {report.batch_size}"),
        *_about(reference.facts),
        *_where(report.where, reference.facts),
    ]
    header = ("", *(variant.label for variant in report.variants))
    rows = tuple(
        (name, *(_figure(variant, shown) for variant in report.variants))
        for name, shown in _lines(report)
    )
    examples = [_example(example) for example in report.examples]
    return Page(
        title=f"{report.job} with {report.model}: " + ", ".join(header[1:]),
        facts=tuple(facts),
        tables=(Table("figures", header, rows), *examples),
        notes=tuple(_compare_notes(report)),
    )


def _figure(variant: Variant, shown: Callable[[Variant], str]) -> str:
    return shown(variant) if variant.problem is None else variant.state.value


def _lines(report: CompareReport) -> Iterator[tuple[str, Callable[[Variant], str]]]:
    facts = report.variants[0].facts
    assert facts is not None, "without a reference there is no report"
    if report.expected is not None:
        yield f"right by '{report.expected}'", _right
        yield "lost, gained", _changed
    yield "same as the first", _same
    yield "first other token", _first_difference
    yield "of the tokens, before it", _share_before
    yield "failed rows", lambda variant: str(variant.num_failed)
    yield "tokens/s", lambda variant: rate(variant.tokens_per_second)
    yield "  prefill alone", lambda variant: rate(variant.prefill_tokens_per_second)
    yield "  decode alone", lambda variant: rate(variant.decode_tokens_per_second)
    yield "loading, s", lambda variant: _of(variant, lambda facts: f"{facts.load_seconds:.1f}")
    yield (
        "weights, MiB",
        lambda variant: _of(variant, lambda facts: mebibytes(facts.num_weight_bytes)),
    )
    yield _peak_title(facts), lambda variant: mebibytes(variant.peak_bytes)


def _of(variant: Variant, shown: Callable[[ModelFacts], str]) -> str:
    return NOTHING if variant.facts is None else shown(variant.facts)


def _right(variant: Variant) -> str:
    score = variant.score
    if score is None or not score.num_scored:
        return NOTHING
    return f"{score.num_right / score.num_scored:.1%}"


def _changed(variant: Variant) -> str:
    if variant.score is None or variant.agreement is None:
        return NOTHING
    return f"{variant.score.num_lost}, {variant.score.num_gained}"


def _same(variant: Variant) -> str:
    if variant.agreement is None or variant.agreement.share is None:
        return NOTHING
    return f"{variant.agreement.share:.1%}"


def _first_difference(variant: Variant) -> str:
    if variant.agreement is None or variant.agreement.first_difference is None:
        return NOTHING
    return f"{variant.agreement.first_difference:g}"


def _share_before(variant: Variant) -> str:
    if variant.agreement is None or variant.agreement.share_before is None:
        return NOTHING
    return f"{variant.agreement.share_before:.0%}"


def _example(example: Example) -> Table:
    rows = [("prompt", _end(example.prompt or NOTHING))]
    if example.expected is not None:
        rows.append(("expected", _beginning(example.expected)))
    rows += [(label, _beginning(text)) for label, text in example.completions.items()]
    return Table(example.row_id, (), tuple(rows), 2)


def _end(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= MOST_LETTERS else f"…{flat[-MOST_LETTERS:]}"


def _beginning(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= MOST_LETTERS else f"{flat[:MOST_LETTERS]}…"


def _compare_notes(report: CompareReport) -> Iterator[str]:
    share = f"{1 / report.num_rows:.1%}"
    yield f"One row is {share}: differences of a few rows may be chance; -n takes more rows."
    if report.expected is not None:
        yield (
            f"right: the completion is what column '{report.expected}' has, spaces around both "
            "left out; a failed row is wrong. lost, gained: rows that the first has right and "
            "this one wrong, and the other way round."
        )
    yield (
        "first other token: its place in the completion, the median of the rows that differ. "
        "tokens/s: completions of this sample, whose last rows leave the batch half empty; a "
        "long job is nearer to decode alone."
    )
    for variant in report.variants:
        if variant.problem is not None:
            yield f"{variant.label}: {variant.problem}"
