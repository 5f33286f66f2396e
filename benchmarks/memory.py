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
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.pretended import Pretence, pretending, write_job
from benchmarks.workloads import Lengths
from jobs.config import load_job
from jobs.progress import Snapshot
from jobs.run import RunOptions, run_job

PROCESSES = ("driver", "ray::PretendingWorker", "raylet", "gcs_server")


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
    with tempfile.TemporaryDirectory(prefix="shardmill-") as scratch, pretending():
        started = time.monotonic()
        pretence = Pretence((0.0, 0.0), Lengths(median=8, sigma=0.0, most=8))
        job = load_job(write_job(Path(scratch), pretence, options.rows, num_slots=128))
        summary = run_job(job, RunOptions(), Samples())
        seconds = time.monotonic() - started
        print(f"{summary.totals.num_completions:,} rows in {seconds:.0f} s")


if __name__ == "__main__":
    main()
