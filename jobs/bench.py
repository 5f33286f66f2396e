"""`shardmill bench`: how fast a model is on this machine, by what one may choose for it.

Every quantization and attention has a process of its own, which measures cell by cell. One that
dies costs the cell it was at, and another goes on with the cells that are not larger.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.config import JobConfig
from jobs.isolated import Isolated, LostError
from jobs.machine import Surroundings, surroundings
from jobs.variants import LOAD_SECONDS, as_sentence, device_environment, state_of, variant
from pipeline.bench_specs import CellQuestion, SpeedSpec
from pipeline.checkpoint import Checkpoint, fetch
from pipeline.errors import ModelError, ResourceError
from pipeline.measured import MIN_CONTEXT, Cell, Limits, ModelFacts, Shape, State

logger = logging.getLogger(__name__)

CHILD = "jobs.bench_child"
CELL_SECONDS = 600.0
"""Beyond its own limit, for a cell whose single step does not end."""
CONTEXTS = (128, 512, 2048)


@dataclass(frozen=True, slots=True)
class Grid:
    """What is to be measured.

    Attributes:
        quantizations: words; None is the model block's own.
        attentions: names as transformers has them; None is what a job gets.
        contexts: empty is the usual ones, as far as the model has them.
        max_seconds: of a cell, after which it goes with the steps it has.
    """

    quantizations: tuple[str | None, ...]
    attentions: tuple[str | None, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Kind:
    """One quantization and attention, measured.

    Attributes:
        facts: None if it could not be loaded, and then `problem` says why.
        cells: of every shape, by context and then by batch.
    """

    quantization: str
    attention: str
    facts: ModelFacts | None
    cells: tuple[Cell, ...]
    problem: str | None

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.quantization}, {self.attention}"


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All that was measured.

    Attributes:
        left_out: contexts that were asked for and that the model does not have.
        cache_bytes: what the job file gives keys and values; None leaves it to the device.
    """

    model: str
    where: Surroundings
    max_seconds: float
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    left_out: tuple[int, ...]
    cache_bytes: int | None
    kinds: tuple[Kind, ...]


def bench_model(job: JobConfig, grid: Grid) -> BenchReport:
    """Measures the model of a job; nothing else of the job counts but `workers` and `engine`.

    Raises:
        ModelError: as `run` would, for any of the quantizations.
        ResourceError: not one of them could be loaded.
    """
    where = surroundings()
    checkpoint = fetch(job.model)
    contexts = _contexts(grid, checkpoint)
    shapes = [Shape(batch, context) for context in contexts for batch in sorted(grid.batches)]
    models = [variant(job.model, word) for word in grid.quantizations]
    environment = device_environment(job.workers)
    runs = [
        _KindRun(SpeedSpec(model, attention), shapes, grid.max_seconds, environment)
        for model in models
        for attention in grid.attentions
    ]
    kinds = tuple(run.run() for run in runs)
    if all(kind.facts is None for kind in kinds):
        raise runs[0].failure()
    return BenchReport(
        model=checkpoint.source,
        where=where,
        max_seconds=grid.max_seconds,
        batches=tuple(sorted(grid.batches)),
        contexts=contexts,
        left_out=tuple(context for context in grid.contexts if context not in contexts),
        cache_bytes=job.engine.cache_bytes,
        kinds=kinds,
    )


def _contexts(grid: Grid, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Those that the model has."""
    limit = checkpoint.context_length
    if limit is None:
        return tuple(sorted(grid.contexts or CONTEXTS))
    fitting = tuple(sorted(context for context in grid.contexts or CONTEXTS if context <= limit))
    if not fitting and not grid.contexts and limit >= MIN_CONTEXT:
        return (limit,)
    if not fitting:
        raise ModelError(
            f"model {checkpoint.source!r} has a context of {limit} tokens, and none of those to be "
            f"measured is as short: give --context something from {MIN_CONTEXT} to {limit}"
        )
    return fitting


class _KindRun:
    """Measures one quantization and attention, in one process after the other if need be."""

    def __init__(
        self,
        spec: SpeedSpec,
        shapes: Sequence[Shape],
        max_seconds: float,
        environment: dict[str, str],
    ) -> None:
        self._spec = spec
        self._shapes = shapes
        self._max_seconds = max_seconds
        self._environment = environment
        self._limits = Limits()
        self._cells: dict[Shape, Cell] = {}
        self._facts: ModelFacts | None = None
        self._error: LostError | ModelError | ResourceError | None = None

    def run(self) -> Kind:
        """All that can be measured of it."""
        try:
            while self._pending():
                self._go_on()
        except (LostError, ModelError, ResourceError) as error:
            self._error = error
            logger.info("%s: cannot be measured", self._name)
        rest = State.UNTRIED
        if self._error is not None and self._facts is None:
            rest = state_of(self._error)
        return Kind(
            quantization=self._quantization,
            attention=self._attention,
            facts=self._facts,
            cells=tuple(self._cells.get(shape, Cell(shape, rest)) for shape in self._shapes),
            problem=None if self._error is None else str(self._error),
        )

    def failure(self) -> Exception:
        """What ends the command if no kind could be loaded."""
        assert self._error is not None, "it has not been loaded"
        return as_sentence(f"loaded {self._spec.model.path!r}", self._error)

    def _pending(self) -> list[Shape]:
        return [
            shape
            for shape in self._shapes
            if shape not in self._cells and self._limits.allow(shape)
        ]

    def _go_on(self) -> None:
        """Measures until nothing is left or the process is lost; that costs the cell it was at.

        Raises:
            LostError: it was lost while the model was loaded.
            ShardmillError: the model cannot be loaded so.
        """
        with Isolated(CHILD, self._environment) as child:
            self._facts = child.ask(self._spec, LOAD_SECONDS)
            logger.info("%s: loaded in %.1f s", self._name, self._facts.load_seconds)
            while pending := self._pending():
                shape = pending[0]
                question = CellQuestion(shape, self._max_seconds)
                try:
                    self._take(child.ask(question, self._max_seconds + CELL_SECONDS))
                except LostError as error:
                    self._take(Cell(shape, state_of(error), message=f"the process {error}"))
                    return

    def _take(self, cell: Cell) -> None:
        self._cells[cell.shape] = cell
        self._limits.learn(cell, self._max_seconds)
        said = cell.state.value
        if cell.speed is not None:
            said = (
                f"decode {cell.speed.decode_tokens_per_second:,.0f}, "
                f"prefill {cell.speed.prefill_tokens_per_second:,.0f} tokens/s"
            )
        where = f"batch {cell.shape.batch}, context {cell.shape.context}"
        logger.info("%s: %s: %s", self._name, where, said)

    @property
    def _name(self) -> str:
        return f"{self._quantization}, {self._attention}"

    @property
    def _quantization(self) -> str:
        return self._facts.quantization if self._facts else self._spec.model.quantization.method

    @property
    def _attention(self) -> str:
        return self._facts.attention if self._facts else self._spec.attention or "attention as is"
