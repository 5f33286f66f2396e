"""The Ray actor: one engine on the GPUs that Ray gave it; shards in, counts out.

The driver imports this module, so torch may only be imported inside the actor: Ray sets
`CUDA_VISIBLE_DEVICES` for the actor's process before its first import.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from jobs.logs import log_handler
from pipeline.checkpoint import fetch
from pipeline.folder import RunFolder
from pipeline.outcome import Progress, ShardOutcome, WorkerInfo
from pipeline.reader import ShardReader
from pipeline.records import Sampling, Shard
from pipeline.settings import EngineSettings, ModelSettings, PromptSettings
from pipeline.writer import SegmentWriter

if TYPE_CHECKING:
    from pipeline.shard_runner import ShardRunner

logger = logging.getLogger(__name__)

SHARDS_IN_FLIGHT = 2
"""Shards a worker holds at a time: one that runs, and one that fills the places it leaves."""

CONCURRENCY = SHARDS_IN_FLIGHT + 2
"""Threads of the actor: the shards, and `progress` and `drain` beside them."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs to know about the job; small, and free of secrets.

    Attributes:
        run_folder: must be the same folder on every node.
        output_schema: of segments and parts.
        passed_columns: input columns that are passed through.
        started: when the job was, for chat templates that print the date.
        input_stamps: by path, of input files as they were planned.
    """

    prompt: PromptSettings
    model: ModelSettings
    engine: EngineSettings
    sampling: Sampling
    seed: int
    num_samples: int
    run_folder: Path
    fingerprint: str
    output_schema: pa.Schema
    passed_columns: tuple[str, ...]
    started: datetime
    input_stamps: Mapping[str, str]
    num_threads: int


class Worker:
    """The actor. Its methods are called by the driver only.

    Args:
        index: which of the job's workers this is, from 0.
    """

    def __init__(self, index: int, spec: WorkerSpec) -> None:
        self._index = index
        self._spec = spec
        self._runner: ShardRunner | None = None

    def place(self) -> str:
        """Answers as soon as Ray has found room for the actor: the node's name."""
        return socket.gethostname()

    def load(self) -> WorkerInfo:
        """Loads model and tokenizer and makes the engine ready."""
        folder = RunFolder(self._spec.run_folder)
        logging.getLogger().addHandler(log_handler(folder.logs / f"worker-{self._index}.log"))
        logging.getLogger().setLevel(logging.INFO)
        # Imported here and not above: torch must see the GPUs that Ray chose, and the driver
        # must not load it at all.
        from pipeline.engine import build_engine
        from pipeline.model import load_model
        from pipeline.prompts import PromptRenderer
        from pipeline.shard_runner import ShardRunner

        spec = self._spec
        checkpoint = fetch(spec.model, local_files_only=True)
        model = load_model(checkpoint, spec.model, num_threads=spec.num_threads)
        renderer = PromptRenderer(spec.prompt, model.tokenizer, now=spec.started)
        columns = tuple(dict.fromkeys((*spec.passed_columns, *renderer.columns)))
        self._runner = ShardRunner(
            engine=build_engine(model, spec.engine),
            reader=ShardReader(columns, spec.input_stamps),
            renderer=renderer,
            writer=SegmentWriter(
                spec.run_folder,
                fingerprint=spec.fingerprint,
                schema=spec.output_schema,
                num_samples=spec.num_samples,
                worker=f"worker-{self._index}",
            ),
            sampling=spec.sampling,
            seed=spec.seed,
            num_samples=spec.num_samples,
            passed_columns=spec.passed_columns,
        )
        return WorkerInfo(
            node=socket.gethostname(),
            devices=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            model=model.summary,
            notes=model.notes,
        )

    def run(self, shard: Shard) -> ShardOutcome:
        """Completes one shard; several calls run at a time."""
        return self._ready().run(shard)

    def progress(self) -> Progress:
        """The counts so far."""
        return self._ready().progress()

    def drain(self) -> None:
        """Ends every `run` after it has committed what is finished."""
        if self._runner is not None:
            self._runner.drain()

    def _ready(self) -> ShardRunner:
        assert self._runner is not None, "the driver calls load first"
        return self._runner
