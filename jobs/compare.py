"""`shardmill bench --compare`: a sample of a job's own rows through several quantizations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from jobs.bench import CHILD
from jobs.config import JobConfig
from jobs.isolated import Isolated, LostError
from jobs.machine import Surroundings, surroundings
from jobs.plan import sample_rows
from jobs.prepare import PreparedJob, prepared_for_now
from jobs.variants import (
    LOAD_SECONDS,
    as_sentence,
    device_environment,
    labels,
    state_of,
    variant,
)
from pipeline.agreement import Agreement, Score, agreement, score
from pipeline.bench_specs import SampleSpec
from pipeline.errors import JobFileError, ModelError, ResourceError, RowError
from pipeline.measured import Answer, ModelFacts, Sampled, State
from pipeline.reader import ShardReader, plain_rows
from pipeline.records import Shard

logger = logging.getLogger(__name__)

EXPECTED = "expected"
"""The column that holds the right answer, unless another is named."""
NUM_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Variant:
    """One quantization's figures.

    Attributes:
        label: its word, numbered if it comes again.
        facts: None if it could not be loaded.
        problem: why it has no figures; None if it has.
        num_failed: rows that have an error instead of an answer.
        agreement: with the reference; None for the reference itself.
        score: None if the input has no column of right answers.
        tokens_per_second: completion tokens of the sample, prefill and the end of the batch
            included.
        prefill_tokens_per_second, decode_tokens_per_second: of each phase by itself; None where
            the engine does not tell.
        peak_bytes: while it ran; see `pipeline.measured.Sampled`.
    """

    label: str
    state: State
    facts: ModelFacts | None = None
    problem: str | None = None
    num_failed: int = 0
    agreement: Agreement | None = None
    score: Score | None = None
    num_completion_tokens: int = 0
    tokens_per_second: float = 0.0
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """A row that not all answer alike; `completions` has a text, or an error, by label."""

    row_id: str
    prompt: str | None
    expected: str | None
    completions: dict[str, str]


@dataclass(frozen=True, slots=True)
class CompareReport:
    """What the quantizations of a model do to a job.

    Attributes:
        num_input_rows: of which `num_rows`, evenly spread, were asked.
        expected: the column of right answers, if there is one.
        variants: the reference first.
    """

    job: str
    model: str
    where: Surroundings
    generation: str
    batch_size: int
    num_rows: int
    num_input_rows: int
    expected: str | None
    variants: tuple[Variant, ...]
    examples: tuple[Example, ...]


def compare_job(
    job: JobConfig, words: Sequence[str], num_rows: int, column: str | None
) -> CompareReport:
    """Runs the same rows through the job's model in each quantization.

    Args:
        words: as in `model.quantization`; the first is the reference.
        num_rows: at most; they are spread evenly over the input.
        column: of right answers; None is `expected`, if the input has it.

    Raises:
        ShardmillError: as `run` would, for any of the quantizations; or nothing came of the first.
    """
    where = surroundings()
    with prepared_for_now(job) as prepared:
        column = _checked_column(prepared, column)
        models = [variant(job.model, word) for word in words]
        rows = sample_rows(prepared.inputs, min(num_rows, prepared.inputs.num_rows))
        expected = {} if column is None else _read_expected(rows, column)
        spec = SampleSpec(
            model=job.model,
            prompt=job.prompt,
            engine=job.engine,
            sampling=prepared.sampling,
            seed=job.generation.seed,
            rows=tuple(rows),
            started=datetime.now(UTC),
        )
        runs: list[_Run] = []
        for label, model in zip(labels(words), models, strict=True):
            runs.append(_Run(label, replace(spec, model=model)))
            runs[-1].run(device_environment(job.workers), job.failure.stall_timeout)
            if runs[0].sampled is None:
                raise runs[0].failure()
        return CompareReport(
            job=job.name,
            model=prepared.checkpoint.source,
            where=where,
            generation=prepared.describe_generation(),
            batch_size=job.engine.batch_size,
            num_rows=len(rows),
            num_input_rows=prepared.inputs.num_rows,
            expected=column,
            variants=tuple(_variant(run, runs[0], expected) for run in runs),
            examples=tuple(_examples(runs, expected)),
        )


class _Run:
    """A quantization's turn, in a process of its own."""

    def __init__(self, label: str, spec: SampleSpec) -> None:
        self.label = label
        self.facts: ModelFacts | None = None
        self.sampled: Sampled | None = None
        self.error: LostError | ModelError | ResourceError | None = None
        self._spec = spec

    def run(self, environment: dict[str, str], stall_timeout: float) -> None:
        """Loads and answers; what goes wrong is kept."""
        try:
            with Isolated(CHILD, environment) as child:
                self.facts = child.ask(self._spec, LOAD_SECONDS)
                logger.info("%s: loaded in %.1f s", self.label, self.facts.load_seconds)
                self.sampled = child.ask(None, stall_timeout, self._tell)
        except (LostError, ModelError, ResourceError) as error:
            self.error = error
            logger.info("%s: cannot be measured", self.label)
            return
        logger.info("%s: %d rows in %.1f s", self.label, self._num_rows, self.sampled.seconds)

    def failure(self) -> Exception:
        """What ends the command if this is the reference."""
        assert self.error is not None, "it has not been answered"
        return as_sentence(f"the model as {self.label}", self.error)

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Row by row; none if it has no figures."""
        return () if self.sampled is None else self.sampled.answers

    @property
    def _num_rows(self) -> int:
        return len(self._spec.rows)

    def _tell(self, num_done: int) -> None:
        logger.info("%s: %d of %d rows", self.label, num_done, self._num_rows)


def _checked_column(prepared: PreparedJob, column: str | None) -> str | None:
    names = prepared.inputs.schema.names
    if column is None:
        return EXPECTED if EXPECTED in names else None
    if column not in names:
        raise JobFileError(
            f"--expected names '{column}', which the input does not have; it has "
            + ", ".join(names)
        )
    return column


def _read_expected(rows: Sequence[Shard], column: str) -> dict[str, str]:
    """By row id, what is not null and can be read."""
    reader = ShardReader([column])
    expected: dict[str, str] = {}
    for shard in rows:
        row = plain_rows(reader.read(shard), [column])[0]
        if not isinstance(row, RowError) and row[column] is not None:
            expected[shard.row_id(0)] = str(row[column])
    reader.close()
    return expected


def _variant(run: _Run, reference: _Run, expected: Mapping[str, str]) -> Variant:
    sampled = run.sampled
    if sampled is None:
        assert run.error is not None, "it has an answer or an error"
        return Variant(run.label, state_of(run.error), run.facts, str(run.error))
    is_reference = run is reference
    return Variant(
        label=run.label,
        state=State.MEASURED,
        facts=run.facts,
        num_failed=sum(answer.text is None for answer in run.answers),
        agreement=None if is_reference else agreement(reference.answers, run.answers),
        score=score(reference.answers, run.answers, expected) if expected else None,
        num_completion_tokens=sampled.num_completion_tokens,
        tokens_per_second=sampled.num_completion_tokens / sampled.seconds,
        prefill_tokens_per_second=sampled.prefill_tokens_per_second,
        decode_tokens_per_second=sampled.decode_tokens_per_second,
        peak_bytes=sampled.peak_bytes,
    )


def _examples(runs: Sequence[_Run], expected: Mapping[str, str]) -> list[Example]:
    """Of the rows that not all answer alike, those on which most differ from the reference."""
    answered = [run for run in runs if run.sampled is not None]
    rows = list(zip(*(run.answers for run in answered), strict=True))
    differing = [row for row in rows if _num_other(row)]
    differing.sort(key=lambda row: -_num_other(row))
    return [
        Example(
            row_id=row[0].row_id,
            prompt=row[0].prompt,
            expected=expected.get(row[0].row_id),
            completions={
                run.label: answer.text if answer.text is not None else f"error: {answer.error}"
                for run, answer in zip(answered, row, strict=True)
            },
        )
        for row in differing[:NUM_EXAMPLES]
    ]


def _num_other(row: Sequence[Answer]) -> int:
    return sum(answer.text != row[0].text for answer in row)
