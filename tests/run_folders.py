"""A small job in a temporary folder, for tests of what is written there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.ledger import Ledger
from jobs.manifest import Manifest, PlannedFile, encode_schema
from jobs.opening import open_or_create
from jobs.parts import finish, roll_up
from pipeline.records import Completion, FinishReason, RequestId, Shard
from pipeline.segments import SegmentInfo, committed_infos, missing_positions
from pipeline.writer import Seen, SegmentWriter, output_schema

INPUT_SCHEMA = pa.schema([("n", pa.int64()), ("noise", pa.binary())])


def make_manifest(folder: Path, rows: Sequence[int], **changes: object) -> Manifest:
    """A manifest over input files of so many rows, which are made in `folder`."""
    files = tuple(_input_file(folder, index, num_rows) for index, num_rows in enumerate(rows))
    prefix = str(changes.get("output_prefix", ""))
    values: dict[str, object] = {
        "shardmill_version": "0",
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
        "job": {"name": "test"},
        "fingerprint": "f1",
        "fingerprint_fields": {"generation.temperature": 0.0},
        "files": files,
        "output_schema": encode_schema(output_schema(INPUT_SCHEMA, prefix)),
        "output_prefix": prefix,
        "num_samples": 1,
        "shard_rows": 3,
        "shards_per_part": 2,
    }
    return Manifest.model_validate(values | changes)


def _input_file(folder: Path, index: int, num_rows: int) -> PlannedFile:
    path = folder / f"in-{index}.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(_input_rows(0, num_rows), path)
    size = path.stat().st_size
    return PlannedFile(
        name=path.name, path=str(path), size=size, stamp="", digest=f"d{index}", num_rows=num_rows
    )


def _input_rows(first: int, num_rows: int) -> pa.Table:
    numbers = range(first, first + num_rows)
    columns = {"n": list(numbers), "noise": [make_noise(n) for n in numbers]}
    return pa.table(columns, INPUT_SCHEMA)


def make_noise(number: int) -> bytes:
    """What cannot be compressed, so that a file holds it as it is."""
    return hashlib.sha256(str(number).encode()).digest()


def make_completion(shard: Shard, row: int, sample: int) -> Completion:
    """What the pretended model says to a row; every seventh row fails."""
    identity = RequestId(shard.index, row, sample)
    if (shard.first_row + row) % 7 == 6:
        return Completion(identity, None, FinishReason.ERROR, error="test: seventh row")
    text = f"answer {shard.row_id(row)}/{sample}"
    reason = FinishReason.LENGTH if row % 2 else FinishReason.STOP
    return Completion(identity, text, reason, None, 10, 5)


class SmallJob:
    """A run folder and a pretended worker. Every instance reads the folder anew, as a restart."""

    def __init__(self, folder: Path, rows: Sequence[int] = (7, 0, 4), **changes: object) -> None:
        self.path = folder / "run"
        self.ledger: Ledger = open_or_create(
            self.path, make_manifest(folder / "input", rows, **changes)
        )
        self.folder, self.manifest = self.ledger.folder, self.ledger.manifest

    def commit(
        self, shard: int, positions: Iterable[int] | None = None, seen: Seen | None = None
    ) -> SegmentInfo:
        """Commits positions of a shard, by default all that it lacks, having seen all there is."""
        manifest = self.manifest
        writer = SegmentWriter(
            self.path,
            fingerprint=manifest.fingerprint,
            schema=manifest.arrow_schema,
            num_samples=manifest.num_samples,
            worker="worker-0",
        )
        infos = self.infos(shard)
        if positions is None:
            positions = missing_positions(infos, manifest.shard_completions(shard))
        unit = manifest.shard(shard)
        completions = [make_completion(unit, *divmod(p, manifest.num_samples)) for p in positions]
        table = _input_rows(unit.first_row, unit.num_rows)
        return writer.write(unit, table, completions, seen or Seen(len(infos)))

    def infos(self, shard: int) -> list[SegmentInfo]:
        """The commits of a shard, read anew."""
        return committed_infos(self.folder, shard, self.manifest.fingerprint)

    def commit_all(self) -> None:
        """Commits what is missing everywhere."""
        for shard in self.ledger.scan().pending():
            self.commit(shard)

    def finish(self) -> None:
        """Does what a run does from here to its end."""
        self.ledger.sweep()
        self.commit_all()
        for part in self.ledger.scan().take_ready_parts():
            roll_up(self.folder, self.manifest, part)
        finish(self.folder, self.manifest)

    def expected(self) -> list[tuple[str, int, int, str | None]]:
        """Row id, sample, input column and completion of the whole output, in order."""
        rows = []
        for index in range(self.manifest.num_shards):
            shard = self.manifest.shard(index)
            for position in range(self.manifest.shard_completions(index)):
                row, sample = divmod(position, self.manifest.num_samples)
                text = make_completion(shard, row, sample).text
                rows.append((shard.row_id(row), sample, shard.first_row + row, text))
        return rows

    def output(self) -> list[tuple[str, int, int, str | None]]:
        """The same columns of what the parts hold."""
        paths = sorted(self.path.glob("part-*.parquet"))
        table = pa.concat_tables([pq.read_table(path) for path in paths])
        names = ["row_id", "sample_index", "n", "completion"]
        return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))


def flip_byte(path: Path, position: int) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
