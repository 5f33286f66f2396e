"""More workers than this machine could feed: how a job grows with them, and how it ends.

    python -m benchmarks.many_workers grow --workers 1 2 4 8 16
    python -m benchmarks.many_workers end

Engines sleep (benchmarks/pretended.py), all else is real. `grow` prints rows per second between
the first and the last tenth of the rows, and the share of one core that the driver and Ray's own
processes took. `end` runs eight workers, the slowest a quarter as fast as the fastest, with
long-tailed lengths, and prints what part of the time the last 5 % of the rows took: with rows
released to idle workers, and without.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import psutil

from benchmarks.pretended import Pretence, finish_times, pretending, write_job
from benchmarks.workloads import Lengths
from jobs.config import load_job
from jobs.crew import Crew
from jobs.progress import Silent, Snapshot
from jobs.run import RunOptions, run_job

LONG_TAIL = Lengths(median=48, sigma=0.9, most=384)
SHORT = Lengths(median=32, sigma=0.2, most=64)
SPEEDS = (1.0, 1.3, 1.6, 2.0, 2.4, 2.8, 3.4, 4.0)


@dataclass
class CpuShare(Silent):
    """A reporter that adds up what the driver and Ray's own processes take of a core."""

    _first: tuple[float, float, float] | None = None
    _last: tuple[float, float, float] | None = None

    def update(self, snapshot: Snapshot) -> None:
        """Looks, once the workers are ready."""
        if snapshot.num_rows_done and snapshot.num_rows_done < snapshot.num_rows:
            self._last = _cpu_seconds()
            self._first = self._first or self._last

    def shares(self) -> tuple[float, float]:
        """Of the driver, and of raylet and gcs_server."""
        assert self._first is not None
        assert self._last is not None
        seconds = max(1e-9, self._last[0] - self._first[0])
        return (
            (self._last[1] - self._first[1]) / seconds,
            (self._last[2] - self._first[2]) / seconds,
        )


def _cpu_seconds() -> tuple[float, float, float]:
    driver = psutil.Process()
    of_ray = [
        process
        for process in driver.children(recursive=True)
        if process.name() in ("raylet", "gcs_server")
    ]
    return time.monotonic(), _seconds(driver), sum(map(_seconds, of_ray))


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def grow(counts: list[int], rows_per_worker: int) -> None:
    """Rows per second with so many workers, each of which takes 20 ms for a step of 16 rows."""
    first = 0.0
    for count in counts:
        pretence = Pretence((0.02,) * count, SHORT)
        reporter = CpuShare()
        times = _run(pretence, rows_per_worker * count, 16, reporter)
        tenth = len(times) // 10
        rate = (len(times) - 2 * tenth) / (times[-tenth - 1] - times[tenth])
        first = first or rate / count
        driver, of_ray = reporter.shares()
        print(
            f"{count:3} workers: {rate:7.1f} rows/s, {rate / count / first:6.1%} of as many single "
            f"ones; driver {driver:.1%} of a core, Ray {of_ray:.1%}",
            flush=True,
        )


def end(num_rows: int) -> None:
    """What part of the time the last twentieth of the rows takes."""
    pretence = Pretence(tuple(0.004 * speed for speed in SPEEDS), LONG_TAIL)
    for name, is_shared in (("released to idle workers", True), ("not released", False)):
        with patch.object(Crew, "share_out", Crew.share_out if is_shared else lambda crew: None):
            times = _run(pretence, num_rows, 16, Silent())
        whole = times[-1] - times[0]
        last = times[-1] - times[len(times) * 95 // 100]
        print(
            f"rows {name}: {whole:.1f} s, the last 5 % of them {last:.1f} s ({last / whole:.1%})",
            flush=True,
        )


def _run(pretence: Pretence, num_rows: int, num_slots: int, reporter: Silent) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="shardmill-") as scratch, pretending():
        path = write_job(Path(scratch), pretence, num_rows, num_slots)
        run_job(load_job(path), RunOptions(), reporter)
        times = finish_times(Path(scratch))
    assert len(times) == num_rows, "each row is generated once"
    return times


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    growing = commands.add_parser("grow")
    growing.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    growing.add_argument("--rows", type=int, default=1500, help="for each worker")
    ending = commands.add_parser("end")
    ending.add_argument("--rows", type=int, default=30_000)
    options = parser.parse_args()
    if options.command == "grow":
        grow(options.workers, options.rows)
    else:
        end(options.rows)


if __name__ == "__main__":
    main()
