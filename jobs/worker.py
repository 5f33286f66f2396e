"""The Ray actor: one engine on the GPUs that Ray gave it; shards in, counts out.

The driver imports this module, so torch may only be imported inside the actor: Ray sets
`CUDA_VISIBLE_DEVICES` for the actor's process before its first import.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.beacon import check
from jobs.logs import log_handler
from pipeline.adapter_choice import AdapterChoice
from pipeline.checkpoint import fetch, fetch_once
from pipeline.errors import ModelError
from pipeline.folder import RunFolder
from pipeline.hub import go_offline
from pipeline.memory_limit import KeptMemoryLimit
from pipeline.outcome import MemoryPeak, Progress, Released, ShardOutcome, WorkerInfo
from pipeline.reader import ShardReader
from pipeline.records import RowRange, Sampling, Shard
from pipeline.settings import EngineSettings, ModelSettings, PromptSettings
from pipeline.writer import SegmentWriter

if TYPE_CHECKING:
    from pipeline.shard_runner import ShardRunner

logger = logging.getLogger(__name__)

SHARDS_IN_FLIGHT = 2
"""Fewest shards a worker holds: one that runs, and one that fills the places it leaves."""

OTHER_CALLS = 3
"""Threads of the actor beside one for each shard: for `progress`, `release` and `drain`."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs to know about the job; small, and free of secrets.

    Attributes:
        run_folder: must be the same folder on every node.
        output_schema: of segments and parts.
        passed_columns: input columns that are passed through.
        model_digests: of the model's files and of its adapters', as the driver saw them.
        beacon: what `jobs.beacon` has left in the run folder.
        memory_file: where a memory limit that a worker has met is kept.
        started: when the job was, for chat templates that print the date.
        input_stamps: by path, of input files as they were planned.
        num_gpus: of each worker; without any it must not see one.
        num_per_node: workers that share a node at least.
        shards_in_flight: shards it holds at a time.
    """

    prompt: PromptSettings
    model: ModelSettings
    model_digests: tuple[str, ...]
    engine: EngineSettings
    sampling: Sampling
    seed: int
    num_samples: int
    run_folder: Path
    beacon: str
    memory_file: Path
    fingerprint: str
    output_schema: pa.Schema
    passed_columns: tuple[str, ...]
    started: datetime
    input_stamps: Mapping[str, str]
    num_gpus: int
    num_threads: int
    num_per_node: int = 1
    shards_in_flight: int = SHARDS_IN_FLIGHT


class Worker:
    """The actor. Its methods are called by the driver only.

    Args:
        index: which of the job's workers this is, from 0.
    """

    def __init__(self, index: int, spec: WorkerSpec) -> None:
        self._index = index
        self._spec = spec
        self._runner: ShardRunner | None = None
        self._peak: Callable[[], MemoryPeak] = MemoryPeak
        if not spec.num_gpus:
            # Ray leaves it the node's GPUs, which others have been given. Before torch looks.
            os.environ |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")

    def place(self) -> str:
        """Answers as soon as Ray has found room for the actor: the node's name.

        Raises:
            ShardmillError: the node does not see the run folder or the input.
        """
        check(RunFolder(self._spec.run_folder), self._spec.beacon, list(self._spec.input_stamps))
        return socket.gethostname()

    def fetch(self) -> None:
        """Downloads a hub model that this node lacks; from then on this process is offline."""
        log = RunFolder(self._spec.run_folder).logs / f"worker-{self._index}.log"
        logging.getLogger().addHandler(log_handler(log))
        logging.getLogger().setLevel(logging.INFO)
        fetch_once(self._spec.model)
        go_offline()

    def load(self) -> WorkerInfo:
        """Loads model and tokenizer and makes the engine ready."""
        # In a thread that ends with it. OpenMP's threads of one that stays would count as busy, and
        # those of the engine would no longer spin but sleep between two products: a third slower.
        with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
            return pool.submit(self._load).result()

    def _load(self) -> WorkerInfo:
        # Imported here and not above: torch must see the GPUs that Ray chose, and the driver
        # must not load it at all.
        from pipeline.engine import build_engine
        from pipeline.model import load_model
        from pipeline.placement import lacking_gpus, peak_memory
        from pipeline.prompts import PromptRenderer
        from pipeline.self_check import self_check
        from pipeline.shard_runner import ShardRunner

        spec = self._spec
        lack = lacking_gpus(spec.num_gpus)
        checkpoint = fetch(spec.model, local_files_only=True)
        if checkpoint.digests != spec.model_digests:
            raise ModelError(
                f"model '{spec.model.path}', or an adapter of it, has other files on "
                f"{socket.gethostname()} than when the run began; put the same files there, then "
                "run the same command again"
            )
        model = load_model(
            checkpoint,
            spec.model,
            num_threads=spec.num_threads,
            num_workers=spec.num_per_node,
        )
        renderer = PromptRenderer(
            spec.prompt,
            model.tokenizer,
            now=spec.started,
            max_tokens=model.prompt_room(spec.sampling.max_new_tokens),
        )
        self._peak = peak_memory
        choice = AdapterChoice.of(spec.model)
        check = self_check(model, spec.engine) if spec.model.self_check else None
        limit = KeptMemoryLimit(spec.memory_file, model.device_name)
        columns = tuple(dict.fromkeys((*spec.passed_columns, *renderer.columns, *choice.columns)))
        self._runner = ShardRunner(
            engine=build_engine(model, spec.engine, limit=limit, check=check),
            reader=ShardReader(columns, spec.input_stamps),
            renderer=renderer,
            choice=choice,
            writer=self._writer(),
            sampling=spec.sampling,
            seed=spec.seed,
            num_samples=spec.num_samples,
            passed_columns=spec.passed_columns,
        )
        return WorkerInfo(
            node=socket.gethostname(),
            devices=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            model=model.summary,
            notes=(*lack, *model.notes),
            self_check=None if check is None else check.figures(),
            load_seconds=model.load_seconds,
        )

    def _writer(self) -> SegmentWriter:
        return SegmentWriter(
            self._spec.run_folder,
            fingerprint=self._spec.fingerprint,
            schema=self._spec.output_schema,
            num_samples=self._spec.num_samples,
            worker=f"worker-{self._index}",
        )

    def run(self, shard: Shard, rows: RowRange | None = None) -> ShardOutcome:
        """Completes one shard, or these rows of it; several calls run at a time."""
        return self._ready().run(shard, rows)

    def progress(self) -> Progress:
        """The counts so far."""
        return replace(self._ready().progress(), peak=self._peak())

    def release(self, share: float) -> Released | None:
        """Gives up so much of what has not been started, for a worker that has nothing."""
        return self._ready().release(share)

    def drain(self) -> None:
        """Ends every `run` after it has committed what is finished."""
        if self._runner is not None:
            self._runner.drain()

    def _ready(self) -> ShardRunner:
        assert self._runner is not None, "the driver calls load first"
        return self._runner
