"""Real actors on a Ray with two logical GPUs, which pins them as it would real ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
import ray

from jobs.cluster import WorkerShape
from jobs.crew import Crew, Event, ShardDone, WorkerLost, WorkerReady
from jobs.worker import WorkerSpec
from pipeline.errors import ModelError
from pipeline.records import Sampling
from pipeline.settings import EngineSettings, ModelSettings, PromptSettings
from tests.run_folders import SmallJob

SHAPE = WorkerShape(count=2, num_gpus=1, num_cpus=1, num_threads=1)


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    """A cluster of this machine that believes it has two GPUs."""
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def _spec(job: SmallJob, model: Path) -> WorkerSpec:
    return WorkerSpec(
        prompt=PromptSettings(template="Question {{ n }}?"),
        model=ModelSettings(path=str(model)),
        engine=EngineSettings(),
        sampling=Sampling(3),
        seed=0,
        num_samples=1,
        run_folder=job.folder.root,
        fingerprint=job.manifest.fingerprint,
        output_schema=job.manifest.arrow_schema,
        passed_columns=("n", "noise"),
        started=datetime.now(UTC),
        input_stamps={},
        num_threads=1,
    )


def _events(crew: Crew, enough: Callable[[list[Event]], bool]) -> list[Event]:
    """What happens until it is enough, for a minute at most."""
    events: list[Event] = []
    deadline = time.monotonic() + 60
    while not enough(events):
        assert time.monotonic() < deadline, events
        crew.start()
        events += crew.wait(0.2)
    return events


def test_workers_are_pinned_work_and_are_replaced(tmp_path: Path, llama_folder: Path) -> None:
    """Each has a GPU of its own; a killed one gives its shard back, and its GPU goes on."""
    job = SmallJob(tmp_path, rows=(6,), shard_rows=3)
    crew = Crew(_spec(job, llama_folder), SHAPE, stall_timeout=60)
    try:
        ready = _events(crew, lambda events: len(events) == 2)
        infos = {event.worker: event.info for event in ready if isinstance(event, WorkerReady)}
        assert sorted(info.devices for info in infos.values()) == ["0", "1"]

        crew.hand(0, job.manifest.shard(0))
        [done] = _events(crew, lambda events: len(events) == 1)
        assert isinstance(done, ShardDone)
        assert done.outcome.is_complete
        assert done.outcome.commits[0].totals.num_completions == 3

        crew.hand(1, job.manifest.shard(1))
        ray.kill(crew._members[1].actor)
        lost, back = _events(crew, lambda events: len(events) == 2)
        assert isinstance(lost, WorkerLost)
        assert [shard.index for shard in lost.shards] == [1]
        assert isinstance(back, WorkerReady)
        assert back.info.devices == infos[1].devices
    finally:
        crew.close()


def test_a_worker_without_a_model_says_why(tmp_path: Path) -> None:
    """The user's mistake arrives as what it is, and not as a lost worker."""
    crew = Crew(_spec(SmallJob(tmp_path), tmp_path / "nowhere"), SHAPE, stall_timeout=60)
    try:
        with pytest.raises(ModelError, match="nowhere"):
            _events(crew, lambda events: len(events) == 2)
    finally:
        crew.close()


def test_a_worker_that_stands_still_is_given_up(tmp_path: Path, llama_folder: Path) -> None:
    """A frozen process is no dead one; its shard comes back after the stall timeout."""
    job = SmallJob(tmp_path, rows=(3,), shard_rows=3)
    crew = Crew(_spec(job, llama_folder), SHAPE, stall_timeout=2.0)
    frozen: list[psutil.Process] = []
    try:
        _events(crew, lambda events: len(events) == 2)
        frozen += [
            process for process in _descendants() if process.name().startswith("ray::Worker")
        ]
        for process in frozen:
            process.suspend()
        crew.hand(0, job.manifest.shard(0))
        [event] = _events(crew, lambda events: len(events) == 1)
        assert isinstance(event, WorkerLost)
        assert "stood still" in event.cause
        assert [shard.index for shard in event.shards] == [0]
    finally:
        for process in frozen:
            process.resume()
        crew.close()


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)
