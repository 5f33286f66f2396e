"""The loop of one worker, with a real writer and reader and an engine that the test drives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import shard_runner
from pipeline.engine_thread import Collector, EngineThread
from pipeline.outcome import Released
from pipeline.prompts import PromptRenderer
from pipeline.reader import ShardReader
from pipeline.records import (
    Request,
    RequestId,
    RowRange,
    Sampling,
    Shard,
)
from pipeline.segments import committed_infos, missing_positions
from pipeline.settings import PromptSettings
from pipeline.shard_runner import ShardRunner
from pipeline.writer import SegmentWriter
from tests.run_folders import SmallJob
from tests.stepped_engine import SteppedEngine
from tests.word_tokenizer import WordTokenizer


class Bench:
    """A runner over a small job, and a pool to run shards in."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        self.job = SmallJob(folder, rows=(6,), shard_rows=6, num_samples=num_samples)
        self.engine = SteppedEngine()
        self.runner = self.new_runner(self.engine)
        self._pool = ThreadPoolExecutor(4)

    def new_runner(self, engine: SteppedEngine) -> ShardRunner:
        manifest = self.job.manifest
        renderer = PromptRenderer(PromptSettings(template="row {{ n }}"), WordTokenizer())
        return ShardRunner(
            engine=engine,
            reader=ShardReader(["n", "noise"]),
            renderer=renderer,
            writer=SegmentWriter(
                self.job.folder.root,
                fingerprint=manifest.fingerprint,
                schema=manifest.arrow_schema,
                num_samples=manifest.num_samples,
                worker="test",
            ),
            sampling=Sampling(4),
            seed=0,
            num_samples=manifest.num_samples,
            passed_columns=["n", "noise"],
        )

    def start(self, runner: ShardRunner, shard: Shard, rows: RowRange | None = None) -> Future[Any]:
        return self._pool.submit(runner.run, shard, rows)

    @property
    def shard(self) -> Shard:
        return self.job.manifest.shard(0)

    def committed(self) -> list[int]:
        """Positions committed, in the order of the commits."""
        folder, fingerprint = self.job.folder, self.job.manifest.fingerprint
        infos = committed_infos(folder, 0, fingerprint)
        total = 6 * self.job.manifest.num_samples
        assert missing_positions(infos, total) is not None, "no row is in two commits"
        return [row for info in infos for first, end in info.ranges for row in range(first, end)]

    def close(self) -> None:
        self.engine.allow(1000)
        self.runner.drain()
        self._pool.shutdown()


@contextmanager
def _bench(folder: Path, num_samples: int = 1) -> Iterator[Bench]:
    bench = Bench(folder, num_samples)
    try:
        yield bench
    finally:
        bench.close()


def _eventually(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(1000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not come to this in ten seconds")


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits what is finished every 50 milliseconds instead of every minute."""
    monkeypatch.setattr(shard_runner, "COMMIT_INTERVAL", 0.05)


def test_a_shard_is_committed_at_once_when_it_is_whole(tmp_path: Path) -> None:
    """One commit of all rows, and the counts of it."""
    with _bench(tmp_path) as bench:
        attempt = bench.start(bench.runner, bench.shard)
        bench.engine.allow(6)
        outcome = attempt.result(timeout=20)
        assert outcome.is_complete
        assert [commit.num_completions for commit in outcome.commits] == [6]
        assert bench.committed() == [0, 1, 2, 3, 4, 5]


def test_only_chosen_positions_are_generated(tmp_path: Path) -> None:
    """A shard is complete when what is wanted of it is there; the model is not asked for more."""
    with _bench(tmp_path) as bench:
        shard = replace(bench.shard, chosen=((1, 2), (4, 6)))
        attempt = bench.start(bench.runner, shard)
        bench.engine.allow(3)
        assert attempt.result(timeout=20).is_complete
        assert bench.committed() == [1, 4, 5]
        again = bench.start(bench.runner, shard).result(timeout=20)
        assert (again.commits, again.is_complete) == ((), True)


@pytest.mark.usefixtures("often")
def test_finished_rows_of_an_unfinished_shard_are_committed(tmp_path: Path) -> None:
    """A kill loses what was finished lately, however long the shard takes; progress tells."""
    with _bench(tmp_path) as bench:
        attempt = bench.start(bench.runner, bench.shard)
        bench.engine.allow(2)
        _eventually(lambda: len(bench.committed()) == 2)
        _eventually(lambda: bench.runner.progress().interim[bench.shard].num_completions == 2)
        bench.engine.allow(4)
        assert attempt.result(timeout=20).is_complete
        assert sorted(bench.committed()) == list(range(6))
        assert bench.runner.progress().interim == {}


def test_draining_commits_what_is_finished(tmp_path: Path) -> None:
    """The rows that are done are kept, the others are said to be missing."""
    with _bench(tmp_path) as bench:
        attempt = bench.start(bench.runner, bench.shard)
        bench.engine.allow(3)
        _eventually(lambda: bench.engine.metrics.num_generated_tokens == 3)
        bench.runner.drain()
        outcome = attempt.result(timeout=20)
        assert not outcome.is_complete
        assert len(bench.committed()) == sum(info.num_completions for info in outcome.commits) >= 2


@pytest.mark.usefixtures("often")
def test_what_a_superseded_attempt_left_in_the_engine_goes_nowhere(tmp_path: Path) -> None:
    """Another attempt commits in between; the next one on this engine gets its own rows only."""
    with _bench(tmp_path) as bench:
        bench.engine.has_begun = True
        first = bench.start(bench.runner, bench.shard)
        _eventually(lambda: len(bench.engine.requests) == 6)
        bench.job.commit(0, [1, 5])  # somebody else's commit number 0
        bench.engine.allow(2)
        assert not first.result(timeout=20).is_complete
        assert len(bench.engine.requests) == 4, "rows 2 to 5 of the dropped attempt"
        second = bench.start(bench.runner, bench.shard)
        _eventually(lambda: len(bench.engine.requests) == 8)
        bench.engine.allow(8)
        assert second.result(timeout=20).is_complete
        assert sorted(bench.committed()) == list(range(6))


@pytest.mark.usefixtures("often")
def test_what_is_released_is_done_by_another(tmp_path: Path) -> None:
    """Both commit to one shard, in turns; neither does the other's rows, and both are complete."""
    with _bench(tmp_path) as bench, _bench(tmp_path) as other:
        first = bench.start(bench.runner, bench.shard)
        _eventually(lambda: len(bench.engine.requests) == 6)
        assert bench.runner.progress().num_unstarted == 6
        assert bench.runner.release(0.5) == Released(0, ((3, 6),))
        assert bench.runner.release(0.5) == Released(0, ((1, 3),))
        bench.engine.allow(1)
        assert first.result(timeout=20).is_complete
        assert bench.committed() == [0]
        assert bench.runner.release(0.5) is None

        pieces = [replace(bench.shard, chosen=chosen) for chosen in (((3, 6),), ((1, 3),))]
        attempts = [
            each.start(each.runner, piece)
            for each, piece in zip((bench, other), pieces, strict=True)
        ]
        for count, engine in ((2, bench.engine), (3, other.engine), (4, bench.engine)):
            engine.allow(1)
            _eventually(lambda count=count: len(bench.committed()) == count)  # type: ignore[misc]
        for each in (bench, other):
            each.engine.allow(6)
        outcomes = [attempt.result(timeout=20) for attempt in attempts]
        assert [outcome.is_complete for outcome in outcomes] == [True, True]
        assert sorted(bench.committed()) == list(range(6))
        commits = [info for outcome in outcomes for info in outcome.commits]
        assert sorted(info.commit for info in commits) == list(range(1, len(commits) + 1))


def _overtake(bench: Bench) -> None:
    """Runs an attempt that ends because another one has committed the first row."""
    attempt = bench.start(bench.runner, bench.shard)
    _eventually(lambda: len(bench.engine.requests) == 6)
    bench.job.commit(0, [0])
    bench.engine.allow(1)
    assert not attempt.result(timeout=20).is_complete


@pytest.mark.usefixtures("often")
def test_what_a_dropped_attempt_left_is_not_released(tmp_path: Path) -> None:
    """Nobody lacks it, so nobody is to do it."""
    with _bench(tmp_path) as bench:
        _overtake(bench)
        assert bench.runner.release(1.0) is None
        assert not bench.engine.requests
        again = bench.start(bench.runner, bench.shard)
        bench.engine.allow(5)
        assert again.result(timeout=20).is_complete


@pytest.mark.usefixtures("often")
def test_what_an_attempt_left_is_not_begun(tmp_path: Path) -> None:
    """Its rows are another's by now, and would only keep slots from those that are wanted."""
    with _bench(tmp_path) as bench:
        _overtake(bench)
        _eventually(lambda: not bench.engine.requests)


@pytest.mark.usefixtures("often")
def test_a_row_that_is_there_twice_is_released_once(tmp_path: Path) -> None:
    """Put back by the engine for want of memory, for a dropped attempt and for the next one."""
    with _bench(tmp_path) as bench:
        bench.engine.has_begun = True
        _overtake(bench)
        again = bench.start(bench.runner, bench.shard)
        _eventually(lambda: len(bench.engine.requests) == 10)
        bench.engine.has_begun = False
        released = bench.runner.release(1.0)
        assert released == Released(0, ((1, 6),))
        assert again.result(timeout=20).is_complete


def test_all_may_be_released(tmp_path: Path) -> None:
    """An attempt of which nothing is left has nothing to commit, and nothing is missing of it."""
    with _bench(tmp_path) as bench:
        attempt = bench.start(bench.runner, replace(bench.shard, chosen=((2, 3),)))
        _eventually(lambda: len(bench.engine.requests) == 1)
        assert bench.runner.release(0.5) == Released(0, ((2, 3),))
        outcome = attempt.result(timeout=20)
        assert (outcome.commits, outcome.is_complete) == ((), True)


def test_nothing_is_released_by_an_engine_that_has_ended(tmp_path: Path) -> None:
    """Whoever asks gets an answer at once, after a stop and after a failure."""
    with _bench(tmp_path) as bench:
        bench.start(bench.runner, bench.shard)
        _eventually(lambda: len(bench.engine.requests) == 6)
        bench.runner.drain()
        assert bench.runner.release(0.5) is None
        broken = SteppedEngine()
        runner = bench.new_runner(broken)
        broken.failure = RuntimeError("the device is gone")
        broken.allow(1)
        attempt = bench.start(runner, bench.shard)
        with pytest.raises(RuntimeError, match="the device is gone"):
            attempt.result(timeout=20)
        with pytest.raises(RuntimeError, match="the device is gone"):
            runner.release(0.5)


def test_a_broken_engine_is_told_to_everyone(tmp_path: Path) -> None:
    """Nobody waits for an engine that has ended, now or later."""
    with _bench(tmp_path) as bench:
        attempt = bench.start(bench.runner, bench.shard)
        bench.engine.failure = RuntimeError("the device is gone")
        bench.engine.allow(1)
        with pytest.raises(RuntimeError, match="the device is gone"):
            attempt.result(timeout=20)
        with pytest.raises(RuntimeError, match="the device is gone"):
            bench.start(bench.runner, bench.shard).result(timeout=20)


def test_some_rows_of_a_shard_run_by_themselves(tmp_path: Path) -> None:
    """Only what is missing of them reaches the engine; the others stay to be done."""
    with _bench(tmp_path) as bench:
        bench.job.commit(0, [2])
        bench.engine.allow(6)
        outcome = bench.start(bench.runner, bench.shard, RowRange(1, 4)).result(timeout=20)
        assert outcome.is_complete
        assert bench.committed() == [2, 1, 3]
        assert bench.start(bench.runner, bench.shard).result(timeout=20).is_complete
        assert sorted(bench.committed()) == list(range(6))


def test_all_samples_of_a_row_go_together(tmp_path: Path) -> None:
    """Rows run by themselves, and rows that are to blame, with each of their samples."""
    with _bench(tmp_path, num_samples=2) as bench:
        bench.engine.allow(12)
        assert bench.start(bench.runner, bench.shard, RowRange(1, 3)).result(timeout=20).is_complete
        assert bench.committed() == [2, 3, 4, 5]
        rows = RowRange(4, 5, error="killed: twice")
        outcome = bench.start(bench.runner, bench.shard, rows).result(timeout=20)
        assert outcome.commits[0].totals.error == 2
        assert bench.committed() == [2, 3, 4, 5, 8, 9]


def test_rows_that_are_to_blame_are_committed_as_errors(tmp_path: Path) -> None:
    """They get the error they are given, beside their input, and no engine sees them."""
    with _bench(tmp_path) as bench:
        rows = RowRange(1, 2, error="killed: twice")
        outcome = bench.start(bench.runner, bench.shard, rows).result(timeout=20)
        assert outcome.is_complete
        assert outcome.commits[0].totals.error == 1
        assert not bench.engine.requests
        [segment] = bench.job.folder.segments.iterdir()
        table = pq.read_table(segment)
        assert table["row_id"].to_pylist() == [bench.shard.row_id(1)]
        assert table["n"].to_pylist() == [1]
        assert table["finish_reason"].to_pylist() == ["error"]
        assert table["error"].to_pylist() == ["killed: twice"]


def test_a_completion_is_delivered_once(tmp_path: Path) -> None:
    """Of two answers to one request, only the first reaches the collector that asked."""
    engine = SteppedEngine()
    thread = EngineThread(engine)
    request = Request(RequestId(0, 0, 0), (1,), Sampling(1))
    first, second = Collector(1), Collector(1)
    thread.submit([request], first)
    thread.submit([request], second)
    engine.allow(2)
    assert second.wait(10)
    _eventually(lambda: engine.metrics.num_generated_tokens == 2)
    assert (len(first.take()), len(second.take())) == (0, 1)
    thread.stop()


def test_the_output_has_the_inputs_columns(tmp_path: Path) -> None:
    """What is committed is the input's rows with their answers beside them."""
    with _bench(tmp_path) as bench:
        bench.engine.allow(6)
        bench.start(bench.runner, bench.shard).result(timeout=20)
        [segment] = bench.job.folder.segments.iterdir()
        table = pq.read_table(segment)
        assert table["n"].to_pylist() == list(range(6))
        assert table["completion"].to_pylist() == [f"answer {row}" for row in range(6)]
