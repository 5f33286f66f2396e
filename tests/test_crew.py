"""Real actors on a Ray with two logical GPUs, which pins them as it would real ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from jobs import crew as crew_module
from jobs import patience
from jobs.beacon import light
from jobs.cluster import WorkerShape
from jobs.crew import REFUSED_DELAY, Crew
from jobs.events import Event, RowsReleased, ShardDone, WorkerLost, WorkerReady
from jobs.member import Member
from jobs.worker import Worker, WorkerSpec
from pipeline.checkpoint import fetch
from pipeline.errors import ModelError, ResourceError
from pipeline.metrics import EngineMetrics
from pipeline.outcome import Progress, WorkerInfo
from pipeline.records import Sampling
from pipeline.segments import missing_positions
from pipeline.settings import EngineSettings, ModelSettings, PromptSettings
from tests.run_folders import SmallJob

SHAPE = WorkerShape(count=2, num_gpus=1, num_cpus=0, num_threads=1, most=2)


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    """A cluster of this machine that believes it has two GPUs."""
    # One core: no GPU may idle for want of another one.
    ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def _digests(model: Path) -> tuple[str, ...]:
    if not (model / "config.json").exists():
        return ()
    return fetch(ModelSettings(path=str(model))).digests


def _spec(job: SmallJob, model: Path) -> WorkerSpec:
    return worker_spec(job, ModelSettings(path=str(model)), _digests(model))


def worker_spec(job: SmallJob, model: ModelSettings, digests: tuple[str, ...]) -> WorkerSpec:
    """What a worker needs to know of a small job."""
    return WorkerSpec(
        prompt=PromptSettings(template="Question {{ n }}?"),
        model=model,
        model_digests=digests,
        engine=EngineSettings(),
        sampling=Sampling(3),
        seed=0,
        num_samples=1,
        run_folder=job.folder.root,
        beacon=light(job.folder),
        memory_file=job.folder.memory,
        fingerprint=job.manifest.fingerprint,
        output_schema=job.manifest.arrow_schema,
        passed_columns=("n", "noise"),
        started=datetime.now(UTC),
        input_stamps={},
        num_gpus=SHAPE.num_gpus,
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
    """Each has a GPU of its own; a killed one gives its shard back, and its GPU goes on.

    One that raises what is no sentence for the user counts as lost too, and the cause is told.
    """
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

        nonsense = replace(job.manifest.shard(1), num_rows="three")  # type: ignore[arg-type]
        crew.hand(0, nonsense)
        [lost] = _events(crew, lambda events: len(events) == 1)
        assert isinstance(lost, WorkerLost)
        assert "it raised TypeError" in lost.cause
    finally:
        crew.close()


def test_a_worker_gets_all_the_gpus_it_asks_for(tmp_path: Path, llama_folder: Path) -> None:
    """They are its `CUDA_VISIBLE_DEVICES`; while it loads and works, its memory is watched."""
    job = SmallJob(tmp_path, rows=(3,), shard_rows=3)
    shape = WorkerShape(count=1, num_gpus=2, num_cpus=1, num_threads=1, most=1)
    crew = Crew(_spec(job, llama_folder), shape, stall_timeout=60)
    try:
        [ready] = _events(crew, lambda events: len(events) == 1)
        assert isinstance(ready, WorkerReady)
        assert ready.info.devices == "0,1"
        assert ready.info.load_seconds > 0
        assert "peak memory" in ready.info.model
        crew.refresh()
        [metrics] = crew.metrics()
        assert metrics.peak.host > 50 * 2**20, "a process with torch in it"
    finally:
        crew.close()


def test_a_worker_is_offered_as_many_shards_as_it_holds(tmp_path: Path) -> None:
    """Two as a rule; more where little is left of each. The emptiest worker comes first."""
    spec = _spec(SmallJob(tmp_path), tmp_path)
    for num_shards, places in ((2, [0, 1, 0, 1]), (3, [0, 1, 0, 1, 0, 1])):
        crew = Crew(replace(spec, shards_in_flight=num_shards), SHAPE, stall_timeout=60)
        for member in crew._members:
            member.is_ready = True
        assert list(crew.free_places()) == places


def test_the_slowest_is_asked_for_what_suits_the_speeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one with most rows; each once at a time, and none where nothing is left to begin."""
    shard = SmallJob(tmp_path).manifest.shard(0)
    crew = Crew(_spec(SmallJob(tmp_path), tmp_path), SHAPE, stall_timeout=60)
    asked: list[tuple[int, float]] = []

    def ask(member: Member, method: str, share: float) -> None:
        member.calls[object()] = (method, None)
        asked.append((member.index, share))

    monkeypatch.setattr(crew, "_ask", ask)
    crew._members = [Member(index, is_ready=True) for index in range(5)]
    for member, speed, num_unstarted in zip(
        crew._members, (4, 1, 3, 4, 2), (0, 50, 60, 0, 0), strict=True
    ):
        metrics = EngineMetrics(num_generated_tokens=10 * speed, decode_seconds=10.0)
        member.progress = Progress(metrics, num_unstarted=num_unstarted)
    for member in crew._members[1:3]:
        member.calls[object()] = ("run", shard)
    crew.share_out()
    assert asked == [(1, 4 / 5), (2, 4 / 7)]
    crew.share_out()
    assert len(asked) == 2


def test_a_release_that_nobody_answers_is_a_worker_that_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a worker that has nothing else to do; one that is answered is no standstill."""
    monkeypatch.setattr(crew_module.ray, "kill", lambda actor, no_restart: None)
    crew = Crew(_spec(SmallJob(tmp_path), tmp_path), SHAPE, stall_timeout=0.0)
    member = crew._members[0]
    member.progress = Progress(num_unstarted=7)
    assert crew._overdue(member) == []
    member.calls["release"] = ("release", None)
    assert crew.num_releasing == 1
    [event] = crew._overdue(member)
    assert isinstance(event, WorkerLost)
    assert crew.num_releasing == 0

    assert crew._take(member, "release", None, None) == []
    assert member.progress.num_unstarted == 0, "it is not asked again before it has told more"


def test_a_worker_without_a_model_says_why(tmp_path: Path) -> None:
    """The user's mistake arrives as what it is, and not as a lost worker."""
    crew = Crew(_spec(SmallJob(tmp_path), tmp_path / "nowhere"), SHAPE, stall_timeout=60)
    try:
        with pytest.raises(ModelError, match="nowhere"):
            _events(crew, lambda events: len(events) == 2)
    finally:
        crew.close()


def test_a_worker_without_room_waits_for_it(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two GPUs is taken: one worker works, the other is no loss and comes in later."""
    taken = placement_group([{"GPU": 1}])
    assert taken.wait(30)
    crew = Crew(_spec(SmallJob(tmp_path), llama_folder), SHAPE, stall_timeout=60)
    try:
        [first] = _events(crew, lambda events: len(events) == 1)
        assert isinstance(first, WorkerReady)
        monkeypatch.setattr(patience, "PLACE_TIMEOUT", 1.0)
        until = time.monotonic() + 2.5
        assert not _events(crew, lambda events: time.monotonic() > until)
        remove_placement_group(taken)
        [second] = _events(crew, lambda events: len(events) == 1)
        assert isinstance(second, WorkerReady)
        assert second.worker != first.worker
    finally:
        remove_placement_group(taken)
        crew.close()


def test_a_crew_grows_with_its_cluster(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has room by now gets workers, up to as many as the job may have."""
    monkeypatch.setattr(crew_module, "GROWTH_INTERVAL", 0.0)
    crew = Crew(_spec(SmallJob(tmp_path), llama_folder), replace(SHAPE, count=1), stall_timeout=60)
    try:
        events = _events(crew, lambda events: len(events) == 2)
        devices = {event.info.devices for event in events if isinstance(event, WorkerReady)}
        assert devices == {"0", "1"}
        assert crew.num_workers == 2
    finally:
        crew.close()


def test_a_crew_does_without_a_worker_that_cannot_start(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another one works, a node that joined in vain ends no run; it is tried again later."""

    class LateBlind(Worker):  # in here, as Ray's processes cannot import this module
        def load(self) -> WorkerInfo:
            while self._index and not (self._spec.run_folder / "go").exists():
                time.sleep(0.1)
            if self._index and not (self._spec.run_folder / "mended").exists():
                raise ModelError("node x has other files")
            return super().load()

    monkeypatch.setattr(crew_module, "Worker", LateBlind)
    job = SmallJob(tmp_path)
    crew = Crew(_spec(job, llama_folder), SHAPE, stall_timeout=60)
    try:
        _events(crew, lambda events: len(events) == 1)
        (job.folder.root / "go").touch()
        _events(crew, lambda _: crew._members[1].is_refused)
        crew.start()
        assert [member.actor is None for member in crew._members] == [False, True]
        assert crew.num_ready == 1
        (job.folder.root / "mended").touch()
        crew._members[1].start_at -= REFUSED_DELAY
        _events(crew, lambda _: crew.num_ready == 2)
    finally:
        crew.close()


def test_a_worker_without_rows_gets_those_that_another_has_not_begun(
    tmp_path: Path, llama_folder: Path
) -> None:
    """Two real workers on one shard: both commit to it, and together they have done it."""
    job = SmallJob(tmp_path, rows=(400,), shard_rows=400)
    spec = replace(_spec(job, llama_folder), engine=EngineSettings(batch_size=1))
    crew = Crew(spec, SHAPE, stall_timeout=60)
    try:
        _events(crew, lambda events: len(events) == 2)
        crew.hand(0, job.manifest.shard(0))
        deadline = time.monotonic() + 60
        released: list[RowsReleased] = []
        while not released:
            assert time.monotonic() < deadline
            crew.share_out()
            released = [each for each in crew.wait(0.1) if isinstance(each, RowsReleased)]
        assert released[0].worker == 0
        crew.hand(1, replace(job.manifest.shard(0), chosen=released[0].released.positions))
        done = _events(crew, lambda events: len(events) == 2)
        assert {event.worker for event in done if isinstance(event, ShardDone)} == {0, 1}
        assert all(event.outcome.is_complete for event in done if isinstance(event, ShardDone))
        assert missing_positions(job.infos(0), 400) == []
    finally:
        crew.close()


def test_a_crew_that_finds_no_room_at_all_gives_up(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence says what was asked for."""
    monkeypatch.setattr(patience, "PLACE_TIMEOUT", 0.5)
    shape = WorkerShape(count=2, num_gpus=3, num_cpus=1, num_threads=1, most=2)
    crew = Crew(_spec(SmallJob(tmp_path), llama_folder), shape, stall_timeout=60)
    try:
        with pytest.raises(ResourceError, match="3 GPUs"):
            _events(crew, lambda events: False)
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
