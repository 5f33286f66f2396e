"""`shardmill plan`: what a job would do, told without running it and without writing anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from jobs.cluster import Resources, num_cores, shape_workers
from jobs.config import JobConfig
from jobs.ledger import Ledger, check_output, check_same_job
from jobs.plan import Estimate, choose_shard_rows, estimate
from jobs.prepare import PreparedJob, prepared_for_now
from jobs.status import read_status
from pipeline.errors import JobDiffersError
from pipeline.folder import RunFolder
from pipeline.footprint import estimate_footprint
from pipeline.model import load_tokenizer
from pipeline.prompts import PromptRenderer


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """What one worker needs against what there is, in bytes.

    Attributes:
        cache: of a full batch of the longest sequences seen.
        available: of one GPU, or free on this machine; each worker needs its own.
    """

    weights: int
    cache: int
    available: int
    where: str

    @property
    def fits(self) -> bool:
        """Whether one worker has room."""
        return self.weights + self.cache <= self.available


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What a job would do.

    Attributes:
        state: of the output folder: whether this job would start it, continue it, or be refused.
        most_tokens: completion tokens if every completion were as long as it may be.
    """

    name: str
    num_files: int
    num_samples: int
    shard_rows: int
    rows: Estimate
    max_new_tokens: int
    most_tokens: int
    generation: str
    model: str
    memory: MemoryFit
    columns: tuple[str, ...]
    output: str
    state: str


def plan_job(job: JobConfig) -> JobPlan:
    """Checks a job as `run` would and samples its prompts.

    Raises:
        ShardmillError: as `run` would.
    """
    with prepared_for_now(job) as prepared:
        shard_rows = choose_shard_rows(prepared.inputs.num_rows)
        renderer = PromptRenderer(job.prompt, load_tokenizer(prepared.checkpoint, job.model))
        max_new_tokens = prepared.sampling.max_new_tokens
        context = prepared.checkpoint.context_length
        rows = estimate(
            prepared.inputs,
            renderer,
            max_prompt_tokens=(context or 2**31) - max_new_tokens,
            shard_rows=shard_rows,
        )
        return JobPlan(
            name=job.name,
            num_files=len(prepared.inputs.files),
            num_samples=job.generation.num_samples,
            shard_rows=shard_rows,
            rows=rows,
            max_new_tokens=max_new_tokens,
            most_tokens=prepared.num_completions * max_new_tokens,
            generation=prepared.describe_generation(),
            model=f"{job.model.path} ({job.model.quantization}, dtype {job.model.dtype})",
            memory=_memory(prepared, rows.prompt_tokens_max + max_new_tokens),
            columns=tuple(prepared.schema.names),
            output=job.output.path,
            state=_state(prepared),
        )


def check_can_run(job: JobConfig) -> None:
    """Checks what only a run on this machine would find out; touches nothing.

    Raises:
        OutputError: the output folder cannot be used.
        JobDiffersError: it was started with another job.
        ResourceError: the job asks for GPUs that are not there.
    """
    output = Path(job.output.path)
    check_output(output)
    shape_workers(job.workers, Resources(num_cores(), torch.cuda.device_count()), num_shards=1)
    if RunFolder(output).manifest.exists():
        ledger = Ledger.open(output)
        with prepared_for_now(job) as prepared:
            check_same_job(ledger, prepared.manifest(ledger.manifest.files))


def _memory(prepared: PreparedJob, longest: int) -> MemoryFit:
    need = estimate_footprint(prepared.checkpoint, prepared.job.model)
    cache = need.cache_per_token * longest * prepared.job.engine.batch_size
    if torch.cuda.is_available():
        free, where = torch.cuda.get_device_properties(0).total_memory, "on a GPU"
    else:
        free, where = psutil.virtual_memory().available, "free on this machine"
    return MemoryFit(need.weights, cache, free, where)


def _state(prepared: PreparedJob) -> str:
    """What `run` would say to the output folder as it is."""
    folder = RunFolder(Path(prepared.job.output.path))
    if not folder.manifest.exists():
        return "a new run"
    ledger = Ledger.open(folder.root)
    try:
        check_same_job(ledger, prepared.manifest(ledger.manifest.files))
    except JobDiffersError as error:
        return f"refused: {error}"
    done = read_status(folder.root).totals.num_completions
    return f"continues with {done} of {prepared.num_completions} completions done"
