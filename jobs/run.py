"""`shardmill run`: one run from job file to closing summary, in the order it happens.

lock the folder -> prepare the job -> Ray -> manifest -> workers -> driver -> parts -> _SUCCESS
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml

from jobs.cluster import (
    Resources,
    WorkerShape,
    fetch_on_every_node,
    ray_cluster,
    shape_workers,
)
from jobs.config import JobConfig
from jobs.crew import Crew
from jobs.differences import differences
from jobs.driver import Driver, check_failed
from jobs.ledger import Ledger, open_or_create, prepare, set_aside
from jobs.lock import RunLock
from jobs.logs import log_handler
from jobs.parts import finish
from jobs.prepare import PreparedJob, prepare_job, prepared_for_now
from jobs.progress import Reporter
from jobs.recorder import Recorder
from jobs.stop import StopRequest
from jobs.worker import WorkerSpec
from pipeline.errors import ShardmillError
from pipeline.folder import RunFolder
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
    """

    fresh: bool = False
    stop_file: Path | None = None
    max_walltime: float | None = None
    grace: float = 60.0
    ray_address: str | None = None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run ended that completed its job.

    Attributes:
        num_rows: input rows of the job.
        totals: over the whole job, earlier runs included.
        num_new: completions that this run committed.
        tokens_per_second: of the completions this run committed, since its first worker was
            ready; 0 if there was nothing to do.
    """

    output: Path
    num_rows: int
    totals: Totals
    num_new: int
    num_parts: int
    seconds: float
    tokens_per_second: float


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
            return _Run(prepared, folder, options, stop, reporter).run()


def _set_aside(job: JobConfig) -> None:
    """Moves the old folder away, but only for a job that can run."""
    with prepared_for_now(job):
        pass
    if old := set_aside(Path(job.output.path)):
        logger.info("the old run folder is now %s", old)


@contextmanager
def _locked(output: Path) -> Iterator[RunFolder]:
    """The run folder, made and locked; if nothing comes of it, it is as if it had not been."""
    made = [path for path in (output, *output.parents) if not path.exists()]
    folder = prepare(output)
    with RunLock(output):
        try:
            yield folder
        except ShardmillError:
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
class _Run:
    prepared: PreparedJob
    folder: RunFolder
    options: RunOptions
    stop: StopRequest
    reporter: Reporter

    def run(self) -> RunSummary:
        started = time.monotonic()
        with _logging_to(self.folder):
            self._log_job()
            # A changed job is refused, and a complete one is done, before Ray starts.
            ledger = self._open() if self.folder.manifest.exists() else None
            if ledger is not None and ledger.is_complete:
                ledger.sweep()
                return self._finish(ledger, started, num_new=0, rate=0.0)
            with self._ray() as resources:
                # A job that asks for more than there is leaves no folder behind.
                shape_workers(self.prepared.job.workers, resources, num_shards=1)
                ledger = ledger or self._open()
                num_new, rate = self._complete(ledger, resources)
            return self._finish(ledger, started, num_new, rate)

    @contextmanager
    def _ray(self) -> Iterator[Resources]:
        with ExitStack() as stack:
            with self.stop.deferred():  # an exception in the midst of its start may get lost
                resources = stack.enter_context(ray_cluster(self.options.ray_address))
            self.stop.check()
            yield resources

    def _open(self) -> Ledger:
        is_new = not self.folder.manifest.exists()
        known = () if is_new else Ledger.open(self.folder.root).manifest.files
        manifest = self.prepared.manifest(known)
        if is_new:
            resolved = yaml.safe_dump(manifest.job, sort_keys=False, allow_unicode=True)
            with output_errors(self.folder.root):
                self.folder.job.write_text(resolved, encoding="utf-8")
        ledger = open_or_create(self.folder.root, manifest)
        if changed := differences(ledger.manifest.versions, manifest.versions):
            logger.warning("the folder was started with other libraries: %s", "; ".join(changed))
        return ledger

    def _complete(self, ledger: Ledger, resources: Resources) -> tuple[int, float]:
        """Does what is left; returns how many completions that were, and the tokens per second."""
        with output_errors(self.folder.root):
            self.folder.success.unlink(missing_ok=True)  # it would be a lie from here on
        max_failed = self.prepared.job.failure.allowed(ledger.manifest.num_completions)
        with Recorder(ledger) as recorder:
            before, seconds = recorder.totals, 0.0
            if recorder.num_shards_left:
                seconds = self._generate(ledger, recorder, resources, max_failed)
            recorder.wait()
            check_failed(recorder.totals, max_failed)
            num_new = recorder.totals.num_completions - before.num_completions
            num_tokens = recorder.totals.num_completion_tokens - before.num_completion_tokens
            return num_new, num_tokens / seconds if seconds else 0.0

    def _generate(
        self, ledger: Ledger, recorder: Recorder, resources: Resources, max_failed: int
    ) -> float:
        """Has workers do what is left; returns the seconds since the first was ready."""
        job = self.prepared.job
        shape = shape_workers(job.workers, resources, recorder.num_shards_left)
        spec = self._spec(ledger, shape)
        crew = Crew(spec, shape, job.failure.stall_timeout)
        driver = Driver(
            crew=crew,
            recorder=recorder,
            num_completions=ledger.manifest.num_completions,
            max_failed=max_failed,
            stop=self.stop,
            reporter=self.reporter,
            grace=self.options.grace,
        )
        try:
            fetch_on_every_node(spec.model)
            with self.stop.deferred():
                driver.run()
            return driver.seconds_generating
        finally:
            self.reporter.close()
            crew.close()

    def _spec(self, ledger: Ledger, shape: WorkerShape) -> WorkerSpec:
        prepared, job = self.prepared, self.prepared.job
        return WorkerSpec(
            prompt=job.prompt,
            # The commit and not the branch, so that all workers load the same files.
            model=job.model.model_copy(update={"revision": prepared.checkpoint.revision}),
            engine=job.engine,
            sampling=prepared.sampling,
            seed=job.generation.seed,
            num_samples=job.generation.num_samples,
            run_folder=self.folder.root,
            fingerprint=ledger.manifest.fingerprint,
            output_schema=ledger.manifest.arrow_schema,
            passed_columns=prepared.passed_columns,
            started=datetime.fromisoformat(ledger.manifest.created),
            input_stamps=prepared.inputs.stamps,
            num_threads=shape.num_threads,
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

    def _finish(self, ledger: Ledger, started: float, num_new: int, rate: float) -> RunSummary:
        """Counts the output, marks it complete and sums the run up."""
        totals = finish(ledger.folder, ledger.manifest)
        return RunSummary(
            output=self.folder.root,
            num_rows=ledger.manifest.num_rows,
            totals=totals,
            num_new=num_new,
            num_parts=ledger.manifest.num_parts,
            seconds=time.monotonic() - started,
            tokens_per_second=rate,
        )


@contextmanager
def _logging_to(folder: RunFolder) -> Iterator[None]:
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
