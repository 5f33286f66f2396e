"""The command line with workers that do one shard each and then wait to be let go.

    SHARDMILL_GATE=some/file python -m tests.held run job.yaml

Until that file is there, the run is half-way through its job however fast the machine is, and a
test can kill or stop whom it likes. The driver is the real one, and so are signals and commits.
"""

from __future__ import annotations

import os
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import jobs.crew
from jobs.cli import main
from jobs.worker import Worker
from pipeline.outcome import ShardOutcome
from pipeline.records import RowRange, Shard

GATE = "SHARDMILL_GATE"
"""The environment variable with the file's name."""


LIMIT = 300.0
"""Seconds that a test which has failed leaves its run behind."""


class HeldWorker(Worker):
    """A worker that begins with no second shard before the gate is open, or the run stops."""

    gate: Path  # goes to workers with the class: those of a joined cluster have another environment

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_drained = threading.Event()
        self._num_begun = count()

    def run(self, shard: Shard, rows: RowRange | None = None) -> ShardOutcome:
        if next(self._num_begun):
            end = time.monotonic() + LIMIT
            while not (self.gate.exists() or self._is_drained.wait(0.02)):
                assert time.monotonic() < end, "nobody has opened the gate"
        return super().run(shard, rows)

    def drain(self) -> None:
        self._is_drained.set()
        super().drain()


if __name__ == "__main__":
    HeldWorker.gate = Path(os.environ[GATE])
    jobs.crew.Worker = HeldWorker
    main()
