"""Completions and their input rows -> a committed segment. Knows neither parts nor jobs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedOutputError, JobFileError, SupersededError
from pipeline.folder import RunFolder
from pipeline.publish import output_errors, publish, sync_folder, temporary_file
from pipeline.records import Completion, FinishReason, Shard
from pipeline.segments import (
    SegmentInfo,
    Totals,
    as_ranges,
    committed_infos,
    facts_of,
    open_parquet,
    segment_name,
    write_parquet,
)

OUTPUT_FIELDS = (
    pa.field("row_id", pa.string()),
    pa.field("sample_index", pa.int32()),
    pa.field("completion", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("stop_reason", pa.string()),
    pa.field("num_prompt_tokens", pa.int32()),
    pa.field("num_completion_tokens", pa.int32()),
    pa.field("error", pa.string()),
)
"""The columns that are added to the input's, before the prefix."""


def output_schema(
    input_schema: pa.Schema, prefix: str = "", columns: Sequence[str] | None = None
) -> pa.Schema:
    """The schema of every segment and part, fixed before the first row runs.

    Input columns keep name, type and field metadata; all become nullable, because files of one
    input may differ in that.

    Args:
        input_schema: of the input, as Parquet gives it back.
        prefix: put before the name of each added column.
        columns: the input columns kept; None is all of them.

    Raises:
        JobFileError: an added column would have the name of an input column.
    """
    kept = [
        field.with_nullable(True)
        for field in input_schema
        if columns is None or field.name in columns
    ]
    added = [field.with_name(prefix + field.name) for field in OUTPUT_FIELDS]
    clashes = {field.name for field in kept} & {field.name for field in added}
    if clashes:
        raise JobFileError(
            f"output.prefix: input and output would both have a column '{min(clashes)}'; set "
            f"output.prefix to something that makes the names differ, it is '{prefix}' now"
        )
    schema = pa.schema([*kept, *added])
    return _as_stored(schema.with_metadata(_metadata(input_schema, kept, added)))


def _metadata(
    input_schema: pa.Schema, kept: list[pa.Field], added: list[pa.Field]
) -> dict[str, str] | None:
    # What else a schema says is about the input's files and no longer true: readers trust it
    # (Spark hides columns that its entry does not list; pandas takes 'completion' for a number
    # where its entry says that column names are integers).
    text = (input_schema.metadata or {}).get(b"huggingface", b"{}")
    features = (json.loads(text).get("info") or {}).get("features") or {}
    if not all(field.name in features for field in kept) or not features:
        return None
    described = {field.name: features[field.name] for field in kept}
    described |= {field.name: {"dtype": str(field.type), "_type": "Value"} for field in added}
    return {"huggingface": json.dumps({"info": {"features": described}})}


def _as_stored(schema: pa.Schema) -> pa.Schema:
    # Parquet lacks some Arrow types (seconds, dictionaries of numbers) and gives others back.
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return pq.read_schema(pa.BufferReader(sink.getvalue()))


@dataclass
class Seen:
    """What an attempt knows of its shard's commits.

    Attributes:
        num_commits: those it has read or made: all there were before its next one.
        others: positions that other attempts have committed since it began.
        num_durable: of the commits, how many no power cut can take any more.
    """

    num_commits: int
    others: set[int] = field(default_factory=set)
    num_durable: int = 0


class SegmentWriter:
    """Commits completions of a shard to a run folder, all or none.

    Args:
        run_folder: must have its `.shardmill/tmp` and `.shardmill/segments`.
        fingerprint: of the job; goes into every footer.
        schema: what `output_schema` gave.
        num_samples: completions per row.
        worker: who writes, for people.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        fingerprint: str,
        schema: pa.Schema,
        num_samples: int,
        worker: str,
    ) -> None:
        self.folder = RunFolder(run_folder)
        self.fingerprint = fingerprint
        self._schema = schema
        self._num_samples = num_samples
        self._worker = worker

    def write(
        self, shard: Shard, table: pa.Table, completions: Iterable[Completion], seen: Seen
    ) -> SegmentInfo:
        """Commit `completions` under the shard's next number.

        Where another attempt has taken that number, its commit is read and the one after it is
        tried: several attempts may do rows of one shard, as long as they are not the same rows.

        Args:
            shard: the one they belong to.
            table: all the shard's input rows (shard.num_rows, kept columns); more columns are
                ignored.
            completions: at least one, of this shard, in any order, none of them in the commits
                that there were when the attempt began.
            seen: of this attempt.

        Raises:
            SupersededError: another attempt has committed one of them; nothing is left behind.
            OutputError: the segment cannot be written.
        """
        ordered = sorted(completions, key=lambda completion: completion.id)
        info = self._info(shard, ordered, seen.num_commits)
        rows = self._rows(shard, table, ordered)
        while not seen.others.intersection(_positions(info)):
            self._secure(seen)
            try:
                self._publish(info, rows)
            except SupersededError:
                self._look_again(info, seen)
                info = replace(info, commit=seen.num_commits)
            else:
                seen.num_commits += 1
                seen.num_durable = seen.num_commits
                return info
        raise SupersededError(f"shard {shard.index}: another attempt has committed these rows")

    def _secure(self, seen: Seen) -> None:
        """Makes the names durable that the next commit builds on.

        Who made one of them may have died before, and a power cut must not take it and leave ours.
        """
        if seen.num_durable < seen.num_commits:
            with output_errors(self.folder.root):
                sync_folder(self.folder.segments)
            seen.num_durable = seen.num_commits

    def _publish(self, info: SegmentInfo, rows: pa.Table) -> None:
        with temporary_file(self.folder.tmp, f"{info.shard:09d}", ".parquet") as temporary:
            with output_errors(self.folder.root):
                write_parquet(temporary, self._schema, [rows], info.to_json())
            _check_footer(temporary, info)
            publish(temporary, self.folder.segments / segment_name(info.shard, info.commit))

    def _look_again(self, info: SegmentInfo, seen: Seen) -> None:
        """Reads what others have committed beside this attempt."""
        try:
            infos = committed_infos(self.folder, info.shard, self.fingerprint)
        except FileNotFoundError:
            infos = []
        if len(infos) <= info.commit:
            raise SupersededError(f"shard {info.shard} is in a part: every row has been committed")
        for other in infos[seen.num_commits :]:
            seen.others.update(_positions(other))
        seen.num_commits = len(infos)

    def _info(self, shard: Shard, ordered: Sequence[Completion], commit: int) -> SegmentInfo:
        positions = [c.id.row * self._num_samples + c.id.sample for c in ordered]
        assert ordered, "an empty commit says nothing"
        assert len(set(positions)) == len(positions), "each completion once"
        assert all(c.id.shard == shard.index for c in ordered), "completions of one shard"
        return SegmentInfo(
            shard=shard.index,
            commit=commit,
            fingerprint=self.fingerprint,
            first_row=shard.first_row,
            num_rows=shard.num_rows,
            ranges=tuple(as_ranges(positions)),
            worker=self._worker,
            totals=_totals(ordered),
        )

    def _rows(self, shard: Shard, table: pa.Table, ordered: Sequence[Completion]) -> pa.Table:
        assert table.num_rows == shard.num_rows, "the table is the whole shard"
        kept = table.select(self._schema.names[: -len(OUTPUT_FIELDS)])
        # Slices and not `take`, which knows no string views and overflows on 2 GiB of text.
        runs = as_ranges([completion.id.row for completion in ordered])
        passed = pa.concat_tables([kept.slice(first, end - first) for first, end in runs])
        arrays = [*passed.columns, *_output_arrays(shard, ordered)]
        return pa.Table.from_arrays(arrays, schema=self._schema)


def _positions(info: SegmentInfo) -> Iterable[int]:
    return (position for first, end in info.ranges for position in range(first, end))


def _output_arrays(shard: Shard, ordered: Sequence[Completion]) -> list[pa.Array]:
    columns: tuple[list[object], ...] = (
        [shard.row_id(c.id.row) for c in ordered],
        [c.id.sample for c in ordered],
        [_valid(c.text) for c in ordered],
        [c.finish_reason.value for c in ordered],
        [_valid(c.stop_reason) for c in ordered],
        [c.num_prompt_tokens for c in ordered],
        [c.num_completion_tokens for c in ordered],
        [_valid(c.error) for c in ordered],
    )
    return [
        pa.array(values, field.type) for values, field in zip(columns, OUTPUT_FIELDS, strict=True)
    ]


def _valid(text: str | None) -> str | None:
    """`text` with surrogate pairs joined and lone surrogates replaced: UTF-8 has neither."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _totals(completions: Sequence[Completion]) -> Totals:
    reasons = Counter(completion.finish_reason for completion in completions)
    return Totals(
        stop=reasons[FinishReason.STOP],
        length=reasons[FinishReason.LENGTH],
        error=reasons[FinishReason.ERROR],
        num_prompt_tokens=sum(c.num_prompt_tokens for c in completions),
        num_completion_tokens=sum(c.num_completion_tokens for c in completions),
    )


def _check_footer(path: Path, info: SegmentInfo) -> None:
    with open_parquet(path) as file:
        if file.metadata.num_rows != info.num_completions or facts_of(file) != (
            info.to_json().encode()
        ):
            raise DamagedOutputError(
                f"'{path}' does not read back as it was written; check the disk, then run the "
                "same command again"
            )
