"""Host memory of a long run's processes, with an engine that answers at once.

    python -m benchmarks.memory --rows 200000

All but the engine is real: Ray, workers, reading, prompts, commits, parts. Prints for each kind of
process what it took at first and at last, and the slope over the second half of the rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import jobs.crew
from jobs.config import load_job
from jobs.progress import Snapshot
from jobs.run import RunOptions, run_job
from jobs.worker import Worker
from pipeline.outcome import WorkerInfo
from pipeline.records import Completion, FinishReason, Request

MODEL = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "model"
PROCESSES = ("driver", "ray::EchoWorker", "raylet", "gcs_server")


class Echo:
    """An engine that answers each request with a few words of its own."""

    num_running = 0

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._waiting: list[Request] = []
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Requests not answered."""
        return len(self._waiting)

    def add(self, requests: Sequence[Request]) -> None:
        """Queues requests."""
        self._waiting.extend(requests)

    def step(self) -> list[Completion]:
        """Answers one batch."""
        batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
        self.num_prompt_tokens += sum(len(request.prompt_ids) for request in batch)
        self.num_generated_tokens += 8 * len(batch)
        return [_answer(request) for request in batch]


def _answer(request: Request) -> Completion:
    text = f"The answer to {request.id} is yes."
    return Completion(request.id, text, FinishReason.STOP, None, len(request.prompt_ids), 8)


class EchoWorker(Worker):
    """A worker whose engine is `Echo`."""

    def load(self) -> WorkerInfo:
        """Loads the model, for its tokenizer, and leaves it unused."""
        build = "pipeline.engine.build_engine"
        with patch(build, lambda model, settings: Echo(settings.batch_size)):
            return super().load()


@dataclass
class Samples:
    """A reporter that looks at the processes' memory, once a second.

    Attributes:
        rows: done when it looked.
        memory: resident bytes by kind of process, all of a kind together.
    """

    rows: list[int] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PROCESSES})
    _looked_at: float = 0.0

    def update(self, snapshot: Snapshot) -> None:
        """Looks once a second, as soon as both workers are ready."""
        if snapshot.num_workers == 2 and time.monotonic() - self._looked_at >= 1:
            self._looked_at = time.monotonic()
            self.rows.append(snapshot.num_rows_done)
            for name, num_bytes in _memory().items():
                self.memory[name].append(num_bytes)

    def close(self) -> None:
        """Prints what it has seen."""
        half = len(self.rows) // 2
        print(f"{len(self.rows)} samples between {self.rows[0]:,} and {self.rows[-1]:,} rows")
        for name, values in self.memory.items():
            slope, _ = statistics.linear_regression(self.rows[half:], values[half:])
            print(
                f"{name:15} {values[0] / 2**20:7.1f} MiB -> {values[-1] / 2**20:7.1f} MiB, "
                f"{slope * 100_000 / 2**20:+.2f} MiB per 100,000 rows"
            )


def _memory() -> dict[str, float]:
    driver = psutil.Process()
    memory = dict.fromkeys(PROCESSES, 0.0) | {"driver": float(driver.memory_info().rss)}
    for process in driver.children(recursive=True):
        for name in PROCESSES[1:]:
            if process.name().startswith(name[:15]):
                memory[name] += process.memory_info().rss
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="shardmill-") as scratch,
        patch.object(jobs.crew, "Worker", EchoWorker),
    ):
        started = time.monotonic()
        job = load_job(_write_job(Path(scratch), options.rows))
        summary = run_job(job, RunOptions(), Samples())
        seconds = time.monotonic() - started
        print(f"{summary.totals.num_completions:,} rows in {seconds:.0f} s")


def _write_job(scratch: Path, num_rows: int) -> Path:
    table = pa.table({"question": [f"What is {n} + {n % 97}?" for n in range(num_rows)]})
    pq.write_table(table, scratch / "in.parquet", row_group_size=10_000)
    job = {
        "name": "memory",
        "input": {"path": "in.parquet"},
        "prompt": {"template": "{{ question }}", "chat_template": True},
        "model": {"path": str(MODEL)},
        "generation": {"max_new_tokens": 8},
        "output": {"path": "out"},
        "workers": {"count": 2},
    }
    (scratch / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return scratch / "job.yaml"


if __name__ == "__main__":
    main()
