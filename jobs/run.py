"""`shardmill run`: one run from job file to closing summary, in the order it happens.

lock the folder -> prepare the job -> Ray -> manifest -> workers -> driver -> parts -> _SUCCESS
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jobs.beacon import light
from jobs.cluster import (
    Resources,
    WorkerShape,
    ray_cluster,
    shape_workers,
)
from jobs.config import JobConfig
from jobs.crew import Crew
from jobs.differences import differences
from jobs.driver import Driver, check_failed
from jobs.exporter import ClusterMetrics
from jobs.failed_rows import example, note_limit
from jobs.ledger import Ledger
from jobs.lock import RunLock
from jobs.logs import log_handler
from jobs.metrics import MetricsFile, total
from jobs.nodes import await_head, await_nodes
from jobs.opening import open_or_create, prepare, set_aside
from jobs.parts import finish
from jobs.plan import choose_shards_in_flight
from jobs.prepare import PreparedJob, prepare_job, prepared_for_now
from jobs.progress import Reporter, Several
from jobs.recorder import Recorder
from jobs.retries import read_retries
from jobs.stop import StopRequest
from jobs.worker import SHARDS_IN_FLIGHT, WorkerSpec
from jobs.yaml_text import dump_yaml
from pipeline.errors import TooManyFailedRowsError
from pipeline.folder import RunFolder
from pipeline.metrics import EngineMetrics
from pipeline.publish import output_errors
from pipeline.segments import Totals

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line adds to a job; none of it changes an answer.

    Attributes:
        fresh: move the folder of an earlier run aside first.
        max_walltime: seconds.
        grace: seconds to commit in when the run is to stop.
        ray_address: of a cluster to join; None starts one on this machine.
        ray_nodes: of that cluster, to be waited for.
    """

    fresh: bool = False
    stop_file: Path | None = None
    max_walltime: float | None = None
    grace: float = 60.0
    ray_address: str | None = None
    ray_nodes: int | None = None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run ended that completed its job.

    Attributes:
        num_rows: input rows of the job.
        totals: over the whole job, earlier runs included.
        work: what this run has done itself.
    """

    output: Path
    num_rows: int
    totals: Totals
    work: Work
    num_parts: int
    seconds: float


def run_job(job: JobConfig, options: RunOptions, reporter: Reporter) -> RunSummary:
    """Runs a job until it is complete, continuing where an earlier run ended.

    Raises:
        ShardmillError: see `pipeline.errors`; what was committed stays.
    """
    stop = StopRequest(options.stop_file, options.max_walltime)
    with stop.listening():
        stop.check()
        if options.fresh:
            _set_aside(job)
        with _locked(Path(job.output.path)) as folder:
            prepared = prepare_job(job, folder.input)
            stop.check()
            return Run(prepared, folder, options, stop, reporter).run()


def _set_aside(job: JobConfig) -> None:
    """Moves the old folder away, but only for a job that can run."""
    with prepared_for_now(job):
        pass
    if old := set_aside(Path(job.output.path)):
        logger.info("the old run folder is now %s", old)


@contextmanager
def _locked(output: Path) -> Iterator[RunFolder]:
    """The run folder, made and locked; if nothing comes of it, it is as if it had not been."""
    with output_errors(output):
        made = [path for path in (output, *output.parents) if not path.exists()]
    folder = prepare(output)
    with RunLock(output):
        try:
            yield folder
        except Exception:
            if not folder.manifest.exists():
                _remove(folder, made)
            raise


def _remove(folder: RunFolder, made: Sequence[Path]) -> None:
    """Removes an inner folder in which nothing has been started, and the empty ones around it.

    Called under the lock, whose file goes with it: who waits for that lock looks for it again.
    Other runs may have come into the outer folders meanwhile, so only empty ones go.
    """
    shutil.rmtree(folder.internal, ignore_errors=True)
    with suppress(OSError):
        for path in made:
            path.rmdir()


@dataclass(frozen=True, slots=True)
class Work:
    """What one run has done itself.

    Attributes:
        num_new: completions that it committed.
        tokens_per_second: of these, since the first worker was ready.
        metrics: of all its workers together.
    """

    num_new: int = 0
    tokens_per_second: float = 0.0
    metrics: EngineMetrics = field(default_factory=EngineMetrics)


@dataclass(frozen=True, slots=True)
class Budget:
    """What there is to generate, and how.

    Attributes:
        num_completions: to be there in the end, those of earlier runs included.
        max_failed: of these, how many may be errors.
        shards_in_flight: of one worker.
        num_generated_before: completions of the job beside these.
    """

    num_completions: int
    max_failed: int
    shards_in_flight: int
    num_generated_before: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """A prepared job in its locked folder."""

    prepared: PreparedJob
    folder: RunFolder
    options: RunOptions
    stop: StopRequest
    reporter: Reporter

    def run(self) -> RunSummary:
        """Does what is left of the job and marks it complete."""
        started = time.monotonic()
        with logging_to(self.folder):
            self._log_job()
            # A changed job is refused, and a complete one is done, before Ray starts.
            ledger = self._open() if self.folder.manifest.exists() else None
            if ledger is not None and ledger.is_complete:
                ledger.sweep()
                self._mention_retry()
                return self._finish(ledger, started, Work())
            with self.ray() as resources:
                # A job that asks for more than there is leaves no folder behind.
                shape_workers(self.prepared.job.workers, resources, num_shards=1)
                ledger = ledger or self._open()
                with output_errors(self.folder.root):
                    for said in (self.folder.success, self.folder.failed):
                        said.unlink(missing_ok=True)  # it would be a lie from here on
                num_completions = ledger.manifest.num_completions
                max_failed = self.prepared.job.failure.allowed(num_completions)
                num_in_flight = choose_shards_in_flight(
                    ledger.manifest.num_completions / ledger.manifest.num_shards,
                    self.prepared.job.engine.batch_size,
                )
                budget = Budget(num_completions, max_failed, num_in_flight)
                with _telling_of_failed_rows(ledger, max_failed):
                    work = self.complete(ledger, resources, budget)
            return self._finish(ledger, started, work)

    def _mention_retry(self) -> None:
        for record in read_retries(self.folder):
            if record.result is None:
                logger.warning("%s", record.unfinished(self.folder.root))

    @contextmanager
    def ray(self) -> Iterator[Resources]:
        """Ray, for as long as the block lasts."""
        address, num_nodes = self.options.ray_address, self.options.ray_nodes
        if address is not None and num_nodes is not None:
            await_nodes(address, num_nodes, self.stop.check)
        elif address is not None:
            await_head(address, self.stop.check)
        with ExitStack() as stack:
            with self.stop.deferred():  # an exception in the midst of its start may get lost
                resources = stack.enter_context(ray_cluster(address))
                self.stop.reclaim()
            self.stop.check()
            yield resources

    def _open(self) -> Ledger:
        is_new = not self.folder.manifest.exists()
        known = () if is_new else Ledger.open(self.folder.root).manifest.files
        manifest = self.prepared.manifest(known)
        if is_new:
            with output_errors(self.folder.root):
                self.folder.job.write_text(dump_yaml(manifest.job), encoding="utf-8")
        ledger = open_or_create(self.folder.root, manifest)
        if changed := differences(ledger.manifest.versions, manifest.versions):
            logger.warning("the folder was started with other libraries: %s", "; ".join(changed))
        return ledger

    def complete(self, ledger: Ledger, resources: Resources, budget: Budget) -> Work:
        """Does what is left."""
        with Recorder(ledger) as recorder:
            before, work = recorder.totals, Work()
            if recorder.num_shards_left:
                driver = self._generate(ledger, recorder, resources, budget)
                new, seconds = recorder.totals - before, max(driver.seconds_generating, 1e-3)
                work = Work(
                    num_new=new.num_completions,
                    tokens_per_second=new.num_completion_tokens / seconds,
                    metrics=total(driver.crew.metrics()),
                )
            recorder.wait()
            check_failed(recorder.totals, budget.max_failed)
            return work

    def _generate(
        self, ledger: Ledger, recorder: Recorder, resources: Resources, budget: Budget
    ) -> Driver:
        """Has workers do what is left; returns the driver that had them."""
        job = self.prepared.job
        # Where a worker holds more shards, because they are small, fewer workers do.
        num_full = -(-recorder.num_shards_left * SHARDS_IN_FLIGHT // budget.shards_in_flight)
        shape = shape_workers(job.workers, resources, num_full)
        is_auto = job.workers.gpus_per_worker == "auto"
        if self.options.ray_address is not None and is_auto and not resources.num_gpus:
            logger.info(
                "the cluster has no GPU now, so this run works on CPUs to its end; --ray-nodes "
                "waits for nodes that are still to come"
            )
        spec = self._spec(ledger, shape, budget)
        crew = Crew(spec, shape, job.failure.stall_timeout)
        reporters: list[Reporter] = [self.reporter, MetricsFile(ledger.folder)]
        if self.options.ray_address is not None:  # nobody scrapes a Ray of our own
            reporters.append(ClusterMetrics(job.name))
        reporter = Several(*reporters)
        driver = Driver(
            crew=crew,
            recorder=recorder,
            num_completions=budget.num_completions,
            max_failed=budget.max_failed,
            stop=self.stop,
            reporter=reporter,
            grace=self.options.grace,
            num_generated_before=budget.num_generated_before,
        )
        try:
            with self.stop.deferred():
                driver.run()
            return driver
        finally:
            reporter.close()
            crew.close()

    def _spec(self, ledger: Ledger, shape: WorkerShape, budget: Budget) -> WorkerSpec:
        prepared, job = self.prepared, self.prepared.job
        return WorkerSpec(
            prompt=job.prompt,
            model=prepared.checkpoint.pinned(job.model),
            model_digests=prepared.checkpoint.digests,
            engine=job.engine,
            sampling=prepared.sampling,
            seed=job.generation.seed,
            num_samples=job.generation.num_samples,
            run_folder=ledger.folder.root,
            beacon=light(ledger.folder),
            memory_file=self.folder.memory,
            fingerprint=ledger.manifest.fingerprint,
            output_schema=ledger.manifest.arrow_schema,
            passed_columns=prepared.passed_columns,
            started=datetime.fromisoformat(ledger.manifest.created),
            input_stamps=prepared.inputs.stamps,
            num_gpus=shape.num_gpus,
            num_threads=shape.num_threads,
            num_per_node=shape.num_per_node,
            shards_in_flight=budget.shards_in_flight,
        )

    def _log_job(self) -> None:
        prepared = self.prepared
        logger.info(
            "%s: %d rows of %d files -> %s",
            prepared.job.name,
            prepared.inputs.num_rows,
            len(prepared.inputs.files),
            self.folder.root,
        )
        logger.info("generation: %s", prepared.describe_generation())

    def _finish(self, ledger: Ledger, started: float, work: Work) -> RunSummary:
        """Counts the output, marks it complete and sums the run up."""
        totals = finish(ledger.folder, ledger.manifest)
        return RunSummary(
            output=self.folder.root,
            num_rows=ledger.manifest.num_rows,
            totals=totals,
            work=work,
            num_parts=ledger.manifest.num_parts,
            seconds=time.monotonic() - started,
        )


@contextmanager
def _telling_of_failed_rows(ledger: Ledger, max_failed: int) -> Iterator[None]:
    """Where too many rows have failed, says of what one did, and leaves word in the folder."""
    try:
        yield
    except TooManyFailedRowsError as error:
        note_limit(ledger.folder, max_failed)
        found = example(ledger.folder, ledger.manifest)
        raise TooManyFailedRowsError(f"{error}{found}") from None


@contextmanager
def logging_to(folder: RunFolder) -> Iterator[None]:
    """Writes the log to the run folder too, where it stays."""
    with output_errors(folder.root):
        handler = log_handler(folder.logs / "run.log")
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
