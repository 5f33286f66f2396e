"""A slow disk slows the engine down, and does not fill the memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.crew import Crew
from jobs.driver import Driver
from jobs.events import Event
from jobs.member import Member
from jobs.progress import Silent
from jobs.recorder import Recorder
from jobs.stop import StopRequest
from jobs.worker import SHARDS_IN_FLIGHT
from pipeline.metrics import EngineMetrics
from pipeline.outcome import ShardOutcome
from pipeline.prompts import PromptRenderer
from pipeline.reader import ShardReader
from pipeline.records import Completion, FinishReason, Request, RowRange, Sampling, Shard
from pipeline.segments import SegmentInfo
from pipeline.settings import PromptSettings
from pipeline.shard_runner import ShardRunner
from pipeline.writer import Seen, SegmentWriter
from tests.run_folders import SmallJob
from tests.word_tokenizer import WordTokenizer

SHARD_ROWS = 3


class InstantEngine:
    """Answers every request in the next step."""

    def __init__(self) -> None:
        self.num_running = 0
        self.metrics = EngineMetrics()
        self._requests: list[Request] = []

    @property
    def num_waiting(self) -> int:
        return len(self._requests)

    def add(self, requests: Sequence[Request]) -> None:
        self._requests += requests

    def step(self) -> list[Completion]:
        taken, self._requests = self._requests, []
        self.metrics = self.metrics.after_decode(len(taken), len(taken), seconds=0.0)
        return [Completion(each.id, "answer", FinishReason.STOP, None, 1, 1) for each in taken]


class SlowWriter(SegmentWriter):
    """Takes its time, and notes how many completions wait meanwhile."""

    engine: InstantEngine
    num_written = 0
    most_waiting = 0

    def write(
        self, shard: Shard, table: pa.Table, completions: Iterable[Completion], seen: Seen
    ) -> SegmentInfo:
        time.sleep(0.05)
        self.most_waiting = max(
            self.most_waiting, self.engine.metrics.num_generated_tokens - self.num_written
        )
        info = super().write(shard, table, completions, seen)
        self.num_written += info.num_completions
        return info


class ThreadCrew(Crew):
    """One worker, in threads of this process; what it may be handed is decided as ever."""

    def __init__(self, runner: ShardRunner) -> None:
        self._members = [Member(0, is_ready=True)]
        self._shards_in_flight = SHARDS_IN_FLIGHT
        self._runner = runner
        self._pool = ThreadPoolExecutor()

    def start(self) -> None:
        pass

    def _ask(
        self,
        member: Member,
        method: str,
        shard: Shard | None = None,
        rows: RowRange | None = None,
    ) -> None:
        assert shard is not None
        member.calls[self._pool.submit(self._runner.run, shard, rows)] = (method, shard)

    def wait(self, timeout: float) -> list[Event]:
        [member] = self._members
        calls: set[Future[ShardOutcome]] = set(member.calls)
        answered = wait(calls, timeout, FIRST_COMPLETED).done
        return [
            event
            for future in answered
            for event in self._take(member, *member.calls.pop(future), future.result())
        ]


def test_a_slow_disk_holds_the_engine_up(tmp_path: Path) -> None:
    """However fast the engine is, no more completions wait than the shards in flight have."""
    job = SmallJob(tmp_path, rows=(30,), shard_rows=SHARD_ROWS)
    engine, manifest = InstantEngine(), job.manifest
    writer = SlowWriter(
        job.folder.root,
        fingerprint=manifest.fingerprint,
        schema=manifest.arrow_schema,
        num_samples=1,
        worker="test",
    )
    writer.engine = engine
    tokenizer: Any = WordTokenizer()
    runner = ShardRunner(
        engine=engine,
        reader=ShardReader(["n", "noise"]),
        renderer=PromptRenderer(PromptSettings(template="row {{ n }}"), tokenizer),
        writer=writer,
        sampling=Sampling(4),
        seed=0,
        num_samples=1,
        passed_columns=["n", "noise"],
    )
    with Recorder(job.ledger) as recorder:
        Driver(
            crew=ThreadCrew(runner),
            recorder=recorder,
            num_completions=30,
            max_failed=0,
            stop=StopRequest(),
            reporter=Silent(),
            grace=5.0,
        ).run()
        assert recorder.totals.num_completions == 30
    runner.drain()
    assert SHARD_ROWS < writer.most_waiting <= SHARDS_IN_FLIGHT * SHARD_ROWS
