"""`shardmill plan`: what a job would do, told without running it and without writing anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.cluster import Resources, shape_workers
from jobs.config import JobConfig, WorkersSettings
from jobs.ledger import Ledger
from jobs.opening import check_output, check_same_job
from jobs.plan import Estimate, choose_shard_rows, estimate
from jobs.prepare import PreparedJob, prepared_for_now
from jobs.status import read_status
from pipeline.cgroups import num_cores
from pipeline.checkpoint import quantization_name
from pipeline.errors import JobDiffersError
from pipeline.folder import RunFolder
from pipeline.footprint import estimate_footprint
from pipeline.host_memory import host_memory
from pipeline.model import load_tokenizer
from pipeline.placement import check_offload
from pipeline.prompts import PromptRenderer
from pipeline.publish import is_there


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """What one worker needs against what there is, in bytes.

    Attributes:
        cache: of a full batch of the longest sequences seen.
        available: of one worker's GPUs, or free on this machine; each worker needs its own.
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
        room = prepared.checkpoint.context_length or 2**31
        rows = estimate(
            prepared.inputs,
            renderer,
            max_prompt_tokens=room - max_new_tokens,
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
            model=_model(prepared),
            memory=_memory(prepared, min(rows.prompt_tokens_max + max_new_tokens, room)),
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
    here = Resources((num_cores(),), (torch.cuda.device_count(),))
    check_offload(job.model, shape_workers(job.workers, here, num_shards=1).num_gpus)
    if is_there(RunFolder(output).manifest):
        ledger = Ledger.open(output)
        with prepared_for_now(job) as prepared:
            check_same_job(ledger, prepared.manifest(ledger.manifest.files))


def _model(prepared: PreparedJob) -> str:
    model = prepared.job.model
    return f"{model.path} ({quantization_name(prepared.checkpoint, model)}, dtype {model.dtype})"


def _memory(prepared: PreparedJob, longest: int) -> MemoryFit:
    num_gpus = _num_gpus(prepared.job.workers)
    need = estimate_footprint(prepared.checkpoint, prepared.job.model, has_gpu=num_gpus > 0)
    cache = need.cache_per_token * longest * prepared.job.engine.batch_size
    if not num_gpus:
        free, where = host_memory().available, "free on this machine"
        return MemoryFit(need.weights, cache, free, where)
    gpus = [torch.cuda.get_device_properties(index) for index in range(num_gpus)]
    where = "on a GPU" if num_gpus == 1 else f"on {num_gpus} GPUs"
    return MemoryFit(need.weights, cache, sum(gpu.total_memory for gpu in gpus), where)


def _num_gpus(workers: WorkersSettings) -> int:
    """Of one worker, as far as this machine has them."""
    wanted = 1 if workers.gpus_per_worker == "auto" else workers.gpus_per_worker
    return min(wanted, torch.cuda.device_count())


def _state(prepared: PreparedJob) -> str:
    """What `run` would say to the output folder as it is."""
    folder = RunFolder(Path(prepared.job.output.path))
    if not is_there(folder.manifest):
        return "a new run"
    ledger = Ledger.open(folder.root)
    try:
        check_same_job(ledger, prepared.manifest(ledger.manifest.files))
    except JobDiffersError as error:
        return f"refused: {error}"
    done = read_status(folder.root).totals.num_completions
    return f"continues with {done} of {prepared.num_completions} completions done"
