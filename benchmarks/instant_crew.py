"""Workers that answer at once: a crew without Ray, and the segments and parts that they leave.

Segments are what a worker writes, but for the text of the completions, which is always the same;
the driver, the recorder and `verify` cannot tell them from others. They are written beforehand, as
real workers write theirs in other processes, and published when the crew is waited for.
"""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.crew import Crew
from jobs.events import Event, ShardDone
from jobs.ledger import Ledger
from jobs.manifest import Manifest
from jobs.member import Member
from jobs.parts import PartInfo
from pipeline.outcome import ShardOutcome
from pipeline.publish import publish
from pipeline.records import Shard
from pipeline.segments import SegmentInfo, Totals, segment_name, write_parquet

QUESTION = "What is 1 + 1?"
_ADDED = 8  # columns, after the input's one


class InstantCrew(Crew):
    """Has one shard done whenever it is waited for, which is the most work for the driver.

    Attributes:
        num_done: shards answered for.
        cpu_seconds: spent on publishing what the pretended workers have written.
    """

    def __init__(self, ledger: Ledger, num_workers: int) -> None:
        self._ledger = ledger
        self._members = [Member(index, is_ready=True) for index in range(num_workers)]
        self._shards_in_flight = 2
        self._waiting: list[tuple[Member, object, Shard]] = []
        self._next = 0
        self.num_done = 0
        self.cpu_seconds = 0.0

    def start(self) -> None:
        """All are there."""

    def drain(self) -> None:
        """What they hold is as good as done."""

    def refresh(self) -> None:
        """Nothing is to be asked."""

    def wait(self, timeout: float) -> list[Event]:
        """Publishes the segment of the shard that was handed out first."""
        if self._next == len(self._waiting):
            return []
        member, call, shard = self._waiting[self._next]
        self._next += 1
        started = time.thread_time()
        info = segment_info(self._ledger.manifest, shard)
        name = segment_name(shard.index, 0)
        publish(self._ledger.folder.tmp / name, self._ledger.folder.segments / name)
        self.cpu_seconds += time.thread_time() - started
        del member.calls[call]
        self.num_done += 1
        return [ShardDone(member.index, shard, ShardOutcome(shard.index, (info,), True))]

    def _ask(self, member: Member, method: str, *arguments: Any) -> None:
        assert method == "run", "nothing else is asked for"
        call, (shard, _) = object(), arguments
        member.calls[call] = (method, shard)
        self._waiting.append((member, call, shard))


def segment_info(manifest: Manifest, shard: Shard) -> SegmentInfo:
    """What the segment of a whole shard says about itself."""
    return SegmentInfo(
        shard=shard.index,
        commit=0,
        fingerprint=manifest.fingerprint,
        first_row=shard.first_row,
        num_rows=shard.num_rows,
        ranges=((0, shard.num_rows),),
        worker="worker-0",
        totals=_totals(shard.num_rows),
    )


def write_segment(ledger: Ledger, shard: Shard) -> None:
    """Writes the segment of a shard, to be published later."""
    info = segment_info(ledger.manifest, shard)
    numbers = pa.array(range(shard.first_row, shard.first_row + shard.num_rows))
    ids = pc.binary_join_element_wise(f"{shard.name}#", numbers.cast(pa.string()), "")
    path = ledger.folder.tmp / segment_name(shard.index, 0)
    table = _rows(ledger.manifest.arrow_schema, ids)
    write_parquet(path, ledger.manifest.arrow_schema, [table], info.to_json())


def write_hollow_part(ledger: Ledger, part: int) -> PartInfo:
    """Writes a part whose footer is right and whose rows are nulls; takes milliseconds.

    All but `verify` and `retry` look at no more than footers.
    """
    manifest = ledger.manifest
    shards = manifest.part_shards(part)
    num_rows = manifest.part_completions(part)
    info = PartInfo(part, manifest.fingerprint, shards.start, len(shards), _totals(num_rows))
    path = ledger.folder.root / manifest.part_name(part)
    columns = [pa.nulls(num_rows, field.type) for field in manifest.arrow_schema]
    table = pa.Table.from_arrays(columns, schema=manifest.arrow_schema)
    write_parquet(path, manifest.arrow_schema, [table], info.to_json())
    return info


def _totals(num_rows: int) -> Totals:
    return Totals(stop=num_rows, num_prompt_tokens=9 * num_rows, num_completion_tokens=2 * num_rows)


def _rows(schema: pa.Schema, ids: pa.Array) -> pa.Table:
    values = (QUESTION, None, 0, "2", "stop", None, 9, 2, None)
    assert len(schema) == len(values), "one column of input, and what is added"
    columns = [
        pa.repeat(pa.scalar(v, f.type), len(ids)) for v, f in zip(values, schema, strict=True)
    ]
    columns[-_ADDED] = ids
    return pa.Table.from_arrays(columns, schema=schema)
