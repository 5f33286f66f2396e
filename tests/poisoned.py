"""The command line with workers that die of some prompts, or stand still at them.

    python -m tests.poisoned run job.yaml

The engine of a worker that is given a prompt with "DIE" in it ends the process without a word; with
"SLEEP" it never returns. The driver is the real one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import jobs.crew
from jobs.cli import main
from jobs.worker import Worker
from pipeline.outcome import WorkerInfo


class PoisonedWorker(Worker):
    """A worker whose engine is wrapped once it is there."""

    def load(self) -> WorkerInfo:
        info = super().load()
        runner: Any = self._runner
        _poison(runner._engine.engine, runner._renderer._tokenizer)
        return info


def _poison(engine: Any, tokenizer: Any) -> None:
    """Makes a step of the engine end in what the prompts of its requests ask for."""
    add, step = engine.add, engine.step
    asked: list[str] = []

    def poisoned_add(requests: Sequence[Any]) -> None:
        asked.extend(tokenizer.decode(request.prompt_ids) for request in requests)
        add(requests)

    def poisoned_step() -> Any:
        if any("DIE" in text for text in asked):
            os._exit(9)
        if any("SLEEP" in text for text in asked):
            time.sleep(3600)
        return step()

    engine.add, engine.step = poisoned_add, poisoned_step


if __name__ == "__main__":
    jobs.crew.Worker = PoisonedWorker
    main()
