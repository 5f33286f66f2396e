"""The steps of `benchmarks.control_plane` that no command does alone; each is a process of its own.

    python -m benchmarks.control_steps open job.yaml run

`open` is what a run does before its first shard, but for Ray; `drive` does the next shards of the
folder; `fill` puts hollow parts where none are yet.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import jobs.ledger
from benchmarks.instant_crew import InstantCrew, write_hollow_part, write_segment
from jobs.config import load_job
from jobs.driver import Driver
from jobs.ledger import Ledger
from jobs.opening import open_or_create
from jobs.parts import PartInfo, roll_up
from jobs.prepare import prepare_job
from jobs.progress import Silent
from jobs.recorder import Recorder
from jobs.stop import StopRequest
from pipeline.errors import StoppedError
from pipeline.segments import list_segments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("open", "drive", "fill"))
    parser.add_argument("job", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--share", type=float, default=1.0)
    options = parser.parse_args()
    started = time.perf_counter()
    ledger = _open(options.job, options.folder)
    if options.step == "fill":
        _fill(ledger, options.share)
        return
    with Recorder(ledger) as recorder:
        if options.step == "open":
            recorder.wait()
            seconds = time.perf_counter() - started
            manifest = ledger.manifest
            print(
                f"{seconds:.2f} s without imports, {recorder.num_shards_left:,} of "
                f"{manifest.num_shards:,} shards left, {manifest.num_parts:,} parts"
            )
        else:
            _drive(ledger, recorder, options.shards, options.workers)


def _open(path: Path, folder: Path) -> Ledger:
    job = load_job(path, [f"output.path={folder}"])
    prepared = prepare_job(job, path.parent / "staging")
    is_new = not (folder / ".shardmill" / "manifest.json").exists()
    known = () if is_new else Ledger.open(folder).manifest.files
    return open_or_create(folder, prepared.manifest(known))


def _fill(ledger: Ledger, share: float) -> None:
    """Has the first parts be there, up to this share of all, but for those with segments."""
    begun = {ledger.manifest.part_of(shard) for shard in list_segments(ledger.folder)}
    for part in range(round(share * ledger.manifest.num_parts)):
        if not ledger.has_part(part) and part not in begun:
            ledger.note(write_hollow_part(ledger, part))


class Enough(StopRequest):
    """Stops a run when a crew has done so many shards."""

    def __init__(self, crew: InstantCrew, num_shards: int) -> None:
        super().__init__()
        self._crew = crew
        self._num_shards = num_shards

    def reason(self) -> str | None:
        """Why to stop."""
        return "enough was measured" if self._crew.num_done >= self._num_shards else None


def _drive(ledger: Ledger, recorder: Recorder, num_shards: int, num_workers: int) -> None:
    num_shards = min(num_shards, recorder.num_shards_left // 2)
    crew = InstantCrew(ledger, num_workers)
    # The driver hands out two shards per worker beyond those that are done when it is to stop.
    shards = zip(range(num_shards + 2 * num_workers), recorder.shards_left(), strict=False)
    for _, shard in shards:
        write_segment(ledger, shard)
    driver = _driver(ledger, recorder, crew, num_shards)
    started, cpu = time.perf_counter(), time.thread_time()
    with _timed_roll_ups() as roll_ups:
        with suppress(StoppedError):
            driver.run()
        cpu = time.thread_time() - cpu - crew.cpu_seconds
        recorder.wait()
    seconds = time.perf_counter() - started
    num_rolled = sum(len(ledger.manifest.part_shards(part)) for part in roll_ups)
    roll_up_cpu = sum(roll_ups.values()) / max(num_rolled, 1)
    print(
        f"{crew.num_done:,} shards in {seconds:.1f} s, {crew.num_done / seconds:,.0f} a second; of "
        f"CPU for each: driver and recorder {1000 * cpu / crew.num_done:.2f} ms, roll-up "
        f"{1000 * roll_up_cpu:.2f} ms, workers' publishing "
        f"{1000 * crew.cpu_seconds / crew.num_done:.2f} ms"
    )


def _driver(ledger: Ledger, recorder: Recorder, crew: InstantCrew, num_shards: int) -> Driver:
    return Driver(
        crew=crew,
        recorder=recorder,
        num_completions=ledger.manifest.num_completions,
        max_failed=0,
        stop=Enough(crew, num_shards),
        reporter=Silent(),
        grace=60.0,
    )


@contextmanager
def _timed_roll_ups() -> Iterator[dict[int, float]]:
    """Seconds of CPU that each part's roll-up has taken in the block."""
    seconds: dict[int, float] = {}

    def timed(*arguments: object) -> PartInfo:
        started = time.thread_time()
        info = roll_up(*arguments)  # type: ignore[arg-type]
        seconds[info.part] = time.thread_time() - started
        return info

    with patch.object(jobs.ledger, "roll_up", timed):
        yield seconds


if __name__ == "__main__":
    main()
