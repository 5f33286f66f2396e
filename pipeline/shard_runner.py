"""Shards in, committed segments out: the loop of one worker.

`ShardRunner.run` may be called for several shards at a time, each from its own thread. All of
them feed one engine, which has a thread to itself, so that the next shard's rows take the
places of the last rows of the one before. It does not know who calls it, nor where.

    read -> render -> [engine thread: add, step] -> collect -> commit
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from pipeline.adapter_choice import AdapterChoice
from pipeline.engine import Engine
from pipeline.engine_thread import Collector, EngineThread
from pipeline.errors import RowError, SupersededError
from pipeline.outcome import Progress, Released, ShardOutcome
from pipeline.prompts import PromptRenderer
from pipeline.reader import ShardReader, plain_rows
from pipeline.records import (
    Completion,
    FinishReason,
    Request,
    RequestId,
    RowRange,
    Sampling,
    Shard,
)
from pipeline.sampling import random_key
from pipeline.segments import SegmentInfo, Totals, as_ranges, committed_infos, missing_positions
from pipeline.writer import Seen, SegmentWriter

logger = logging.getLogger(__name__)

NO_CHOICE = AdapterChoice()
COMMIT_INTERVAL = 60.0
"""Seconds after which the finished rows of an unfinished shard are committed, so that a killed
worker loses about a minute however slow the model is."""


class Prompt(NamedTuple):
    """What is asked for a row, and of whom."""

    ids: tuple[int, ...]
    adapter: str


class ShardRunner:
    """Runs shards on one engine.

    Args:
        passed_columns: input columns that go to the output as they came.
        num_samples: completions per row.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        reader: ShardReader,
        renderer: PromptRenderer,
        choice: AdapterChoice = NO_CHOICE,
        writer: SegmentWriter,
        sampling: Sampling,
        seed: int,
        num_samples: int,
        passed_columns: Sequence[str],
    ) -> None:
        self._engine = EngineThread(engine)
        self._reader = reader
        self._reader_lock = threading.Lock()
        self._renderer = renderer
        self._choice = choice
        self._writer = writer
        self._sampling = sampling
        self._seed = seed
        self._num_samples = num_samples
        self._passed_columns = list(passed_columns)
        self._num_commits = 0
        self._interim: dict[Shard, Totals] = {}  # committed by attempts that go on
        self._interim_lock = threading.Lock()

    def run(self, shard: Shard, rows: RowRange | None = None) -> ShardOutcome:
        """Generates and commits what the shard, or these rows of it, still lack.

        Blocks until they are complete or released, or `drain` is called, or another attempt turns
        out to have committed some of them.
        """
        try:
            earlier = committed_infos(self._writer.folder, shard.index, self._writer.fingerprint)
        except FileNotFoundError:  # being put into a part, as every row has been committed
            return ShardOutcome(shard.index, (), is_complete=True)
        missing = shard.wanted(missing_positions(earlier, shard.num_rows * self._num_samples))
        if rows is not None:
            missing = [position for position in missing if position // self._num_samples in rows]
        if not missing:
            return ShardOutcome(shard.index, (), is_complete=True)
        with self._reader_lock:
            table = self._reader.read(shard)
        collector = Collector(len(missing))
        error = None if rows is None else rows.error
        requests, failed = self._render(shard, table, missing, error)
        collector.put(failed)
        self._engine.submit(requests, collector)
        commits: list[SegmentInfo] = []
        seen = Seen(len(earlier))
        passed = table.select(self._passed_columns)
        try:
            for finished in self._finished(collector):
                commits.append(self._writer.write(shard, passed, finished, seen))
                self._num_commits += 1
                with self._interim_lock:
                    self._interim[shard] = sum((info.totals for info in commits), Totals())
        except SupersededError:
            logger.info("shard %d: another attempt has committed; this one is dropped", shard.index)
            return ShardOutcome(shard.index, tuple(commits), is_complete=False)
        finally:
            self._engine.forget(requests, collector)
            with self._interim_lock:
                self._interim.pop(shard, None)
        num_committed = sum(info.num_completions for info in commits)
        return ShardOutcome(shard.index, tuple(commits), num_committed == collector.num_expected)

    def release(self, share: float) -> Released | None:
        """Gives up part of what has not been started of a shard; None if all has been.

        Blocks for a step of the engine.

        Args:
            share: of it, from 0 to 1.
        """
        released = self._engine.release(share)
        if not released:
            return None
        positions = [each.row * self._num_samples + each.sample for each in released]
        return Released(released[0].shard, tuple(as_ranges(positions)))

    def drain(self) -> None:
        """Starts nothing more; every `run` commits what is finished and returns."""
        self._engine.stop()

    def progress(self) -> Progress:
        """The counts so far; callable from any thread, also during a step."""
        with self._interim_lock:
            interim = dict(self._interim)
        return Progress(
            self._engine.engine.metrics,
            self._num_commits,
            interim,
            num_unstarted=self._engine.engine.num_waiting,
        )

    def _values(self, table: pa.Table, rows: Sequence[int]) -> list[dict[str, object] | RowError]:
        """What the prompts of these rows are made of."""
        names = list(dict.fromkeys((*self._renderer.columns, *self._choice.columns)))
        chosen = table.select(names)
        # Slices and not `take`, which knows no string views.
        pieces = [chosen.slice(first, end - first) for first, end in as_ranges(rows)]
        return [row for piece in pieces for row in plain_rows(piece, names)]

    def _finished(self, collector: Collector) -> Iterator[list[Completion]]:
        """What there is to commit: every `COMMIT_INTERVAL`, and at the end."""
        has_ended = False
        while not has_ended:
            has_ended = collector.wait(COMMIT_INTERVAL)
            finished = collector.take()
            if finished:
                yield finished

    def _prompts(
        self, table: pa.Table, rows: Sequence[int], error: str | None
    ) -> Sequence[Prompt | str]:
        """Each row's prompt, or why there is none; `error` spares the trouble."""
        if error is not None:
            return [error] * len(rows)
        values = self._values(table, rows)
        encoded = self._renderer.encode(values)
        return [self._prompt(*pair) for pair in zip(values, encoded, strict=True)]

    def _prompt(self, row: dict[str, object] | RowError, ids: list[int] | RowError) -> Prompt | str:
        try:
            if isinstance(row, RowError):
                raise row
            if isinstance(ids, RowError):
                raise ids
            return Prompt(tuple(ids), self._choice.made_by(row))
        except RowError as error:
            return str(error)

    def _render(
        self, shard: Shard, table: pa.Table, missing: Sequence[int], error: str | None
    ) -> tuple[list[Request], list[Completion]]:
        """Requests for the missing positions, and completions for those that cannot be asked."""
        rows = sorted({position // self._num_samples for position in missing})
        prompts = dict(zip(rows, self._prompts(table, rows, error), strict=True))
        requests: list[Request] = []
        failed: list[Completion] = []
        for position in missing:
            row, sample = divmod(position, self._num_samples)
            identity, prompt = RequestId(shard.index, row, sample), prompts[row]
            if isinstance(prompt, str):
                failed.append(Completion(identity, None, FinishReason.ERROR, error=prompt))
                continue
            key = random_key(self._seed, shard.row_id(row), sample)
            requests.append(Request(identity, prompt.ids, self._sampling, key, prompt.adapter))
        return requests, failed
