"""Whole jobs whose engines sleep instead of computing: real Ray, driver, workers, files.

So that many workers fit on a small machine, and what is measured is all but the model.
"""

from __future__ import annotations

import json
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import jobs.crew
from benchmarks.workloads import Lengths
from jobs.worker import Worker
from pipeline.metrics import EngineMetrics
from pipeline.outcome import WorkerInfo
from pipeline.records import Completion, FinishReason, Request, RequestId

MODEL = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "model"
TEXT = "This is an answer of some words, of which not one was computed. "


@dataclass(frozen=True, slots=True)
class Pretence:
    """What the engines pretend.

    Attributes:
        seconds_per_step: of each worker.
        lengths: tokens of a completion.
    """

    seconds_per_step: tuple[float, ...]
    lengths: Lengths


class SleepingEngine:
    """An `Engine` with slots, each of whose steps takes the same time."""

    def __init__(self, num_slots: int, seconds_per_step: float, lengths: Lengths, log: Path):
        self.metrics = EngineMetrics()
        self._seconds_per_step = seconds_per_step
        self._lengths = lengths
        self._log = log
        self._waiting: deque[Request] = deque()
        self._left: list[int] = [0] * num_slots
        self._live: list[Request | None] = [None] * num_slots

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return sum(request is not None for request in self._live)

    def add(self, requests: Sequence[Request]) -> None:
        """Queues requests."""
        self._waiting.extend(requests)

    def unstarted(self) -> list[RequestId]:
        """Requests without a slot."""
        return [request.id for request in self._waiting]

    def withdraw(self, ids: AbstractSet[RequestId]) -> list[RequestId]:
        """Forgets requests without a slot, and tells which."""
        withdrawn = [identity for identity in self.unstarted() if identity in ids]
        self._waiting = deque(request for request in self._waiting if request.id not in ids)
        return withdrawn

    def step(self) -> list[Completion]:
        """Fills the slots and gives each row a token, for which it sleeps."""
        for slot, request in enumerate(self._live):
            if request is None and self._waiting:
                taken = self._live[slot] = self._waiting.popleft()
                self._left[slot] = self._lengths.draw(random.Random(taken.random_key))
        time.sleep(self._seconds_per_step)
        num_live = self.num_running
        self.metrics = self.metrics.after_decode(
            len(self._live), num_live, seconds=self._seconds_per_step
        )
        return self._finished()

    def _finished(self) -> list[Completion]:
        finished: list[Completion] = []
        for slot, request in enumerate(self._live):
            self._left[slot] -= 1
            if request is not None and self._left[slot] <= 0:
                num_tokens = self._lengths.draw(random.Random(request.random_key))
                finished.append(_answer(request, num_tokens))
                self._live[slot] = None
        if finished:
            with self._log.open("a") as log:
                log.write(f"{time.time()} {len(finished)}\n")
        return finished


def _answer(request: Request, num_tokens: int) -> Completion:
    text = (TEXT * (num_tokens // 12 + 1))[: 5 * num_tokens]
    num_prompt_tokens = len(request.prompt_ids)
    return Completion(request.id, text, FinishReason.STOP, None, num_prompt_tokens, num_tokens)


class PretendingWorker(Worker):
    """A worker whose engine is a `SleepingEngine`; all of a job begin at the same time."""

    def load(self) -> WorkerInfo:
        """Loads the model, for its tokenizer, and leaves it unused."""
        scratch = self._spec.run_folder.parent
        pretence = json.loads((scratch / "pretence.json").read_text())
        seconds = pretence["seconds_per_step"]
        engine = SleepingEngine(
            self._spec.engine.batch_size,
            seconds[self._index],
            Lengths(**pretence["lengths"]),
            scratch / f"finished-{self._index}.txt",
        )
        with patch("pipeline.engine.build_engine", lambda *_, **__: engine):
            info = super().load()
        (scratch / f"loaded-{self._index}").touch()
        while len(list(scratch.glob("loaded-*"))) < len(seconds):
            time.sleep(0.05)
        return info


@contextmanager
def pretending() -> Iterator[None]:
    """Jobs that this process runs meanwhile have `PretendingWorker`s."""
    with patch.object(jobs.crew, "Worker", PretendingWorker):
        yield


def write_job(scratch: Path, pretence: Pretence, num_rows: int, num_slots: int) -> Path:
    """A job file over rows of a short question each."""
    table = pa.table({"question": [f"What is {n} + {n % 97}?" for n in range(num_rows)]})
    pq.write_table(table, scratch / "in.parquet", row_group_size=10_000)
    (scratch / "pretence.json").write_text(json.dumps(asdict(pretence)))
    job = {
        "name": "pretence",
        "input": {"path": "in.parquet"},
        "prompt": {"template": "{{ question }}", "chat_template": True},
        "model": {"path": str(MODEL), "self_check": False},
        "generation": {"max_new_tokens": 8},
        "engine": {"batch_size": num_slots},
        "output": {"path": "out"},
        "workers": {"count": len(pretence.seconds_per_step)},
    }
    (scratch / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return scratch / "job.yaml"


def finish_times(scratch: Path) -> list[float]:
    """Seconds since the epoch at which each row was finished, rising."""
    lines = [line.split() for path in scratch.glob("finished-*.txt") for line in path.open()]
    return sorted(float(when) for when, count in lines for _ in range(int(count)))
