"""A retry as a second ledger: the job's shards, of which only the chosen rows are wanted.

Its segments lie in a folder of its own, so that workers, recorder and driver work as in any run.
What differs is the end of a part: the rows are put into the part that is there, and the new file
takes the place of the old one in one step. Until then the old one stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from jobs import parts
from jobs.chosen import Chosen, ChosenManifest, Ranges
from jobs.ledger import Ledger
from jobs.manifest import PlannedFile
from jobs.parts import PartInfo, RetriedRows
from jobs.retries import Retry, retry_folder
from jobs.row_checks import count, wrong_row
from jobs.state import JobState
from pipeline.errors import DamagedOutputError
from pipeline.publish import output_errors, sync_folder, temporary_file
from pipeline.publish import replace as replace_file
from pipeline.records import FinishReason
from pipeline.segments import (
    SegmentInfo,
    Totals,
    as_ranges,
    committed_infos,
    missing_positions,
    open_parquet,
    read_rows,
    reading,
    write_parquet,
)

_THREADS = 8
_COUNTED = ("finish_reason", "num_prompt_tokens", "num_completion_tokens")


@dataclass(frozen=True, slots=True)
class RetryLedger(Ledger):
    """The folder of a retry, with what it has yet to do when it is opened.

    Attributes:
        base: the run folder whose rows are generated again.
        retry: what is to be done.
        chosen: the rows it has yet to put in.
        made: by part that needs nothing (more), what the retry has made of its rows.
    """

    base: Ledger
    retry: Retry
    chosen: Chosen
    made: Mapping[int, Totals]

    @classmethod
    def choose(
        cls,
        base: Ledger,
        retry: Retry,
        infos: Sequence[PartInfo],
        files: tuple[PlannedFile, ...],
    ) -> RetryLedger:
        """Looks up in the parts which rows are wanted; writes nothing.

        Args:
            base: of a complete folder.
            infos: of all its parts.
            files: the input files, as they are named now.

        Raises:
            DamagedOutputError: a part is damaged.
        """
        made = {info.part: done.totals for info in infos if (done := retried(info, retry.number))}
        left = [info.part for info in infos if info.part not in made]
        with ThreadPoolExecutor(_THREADS) as pool:
            masks = pool.map(lambda part: (part, _mask(base, part, retry)), left)
            wanted = {part: mask for part, mask in masks if mask.true_count}
        chosen = Chosen(base.manifest, wanted)
        made |= {part: Totals() for part in left if part not in wanted}
        fields = {name: getattr(base.manifest, name) for name in type(base.manifest).model_fields}
        fields |= {"files": files, "fingerprint": retry.fingerprint, "chosen": chosen}
        folder = retry_folder(base.folder, retry.number)
        return cls(folder, ChosenManifest(**fields), base, retry, chosen, made)

    @property
    def num_completions(self) -> int:
        """Rows of the whole retry, those it has put in already included."""
        done = sum(totals.num_completions for totals in self.made.values())
        return self.chosen.num_completions + done

    @property
    def is_complete(self) -> bool:
        """Whether there was nothing left to do when this was opened."""
        return not self.chosen.num_completions

    def has_part(self, part: int) -> bool:
        """Whether a part needed nothing when this was opened."""
        return part in self.made

    def scan(self) -> JobState:
        """See `Ledger.scan`; the totals are over the rows of the retry."""
        state = Ledger.scan(self)
        for part in self.chosen.parts:
            for shard in self.manifest.part_shards(part):
                if not self.chosen.of_shard(shard):
                    state.skip(shard)
        return state

    def sweep(self) -> None:
        """See `Ledger.sweep`."""
        with output_errors(self.base.folder.root):
            # A swap may not be durable yet if its process died right after it.
            sync_folder(self.base.folder.root)
        Ledger.sweep(self)

    def roll_up(self, part: int) -> PartInfo:
        """Puts the new rows into a part, in the place of the old ones, and removes the segments.

        Raises:
            DamagedOutputError: the part or a segment is not what it should be; nothing changes.
            OutputError: the part cannot be written.
        """
        manifest, root = self.base.manifest, self.base.folder.root
        info = self._replace(parts.read_part(self.base.folder, manifest, part))
        self.base.note(info)
        with output_errors(root):
            parts.remove_segments(self.folder, manifest.part_shards(part))
        return info

    def _published(self, parts: Iterable[int]) -> dict[int, Totals]:
        return {part: self.made[part] for part in parts if part in self.made}

    def _replace(self, old: PartInfo) -> PartInfo:
        manifest, root = self.base.manifest, self.base.folder.root
        name = manifest.part_name(old.part)
        commits = {shard: self._commits(shard) for shard in manifest.part_shards(old.part)}
        new = self._new_info(old, commits)
        tables = parts.grouped(self._merged(root / name, old.part, commits))
        with temporary_file(self.folder.tmp, Path(name).stem, ".parquet") as temporary:
            with output_errors(root):
                write_parquet(temporary, manifest.arrow_schema, tables, new.to_json())
            parts.read_part_file(temporary, manifest, old.part)
            replace_file(temporary, root / name)
        return new

    def _commits(self, shard: int) -> list[SegmentInfo]:
        infos = committed_infos(self.folder, shard, self.manifest.fingerprint)
        total = self.manifest.shard_completions(shard)
        held = set(range(total)) - set(missing_positions(infos, total))
        wanted = self.manifest.shard(shard).wanted(range(total))
        if held != set(wanted):
            raise DamagedOutputError(
                f"'{self.folder.segments}' holds {len(held)} rows of shard {shard}, and not the "
                f"{len(wanted)} that are retried; move them away and run the same command again"
            )
        return infos

    def _new_info(self, old: PartInfo, commits: Mapping[int, list[SegmentInfo]]) -> PartInfo:
        before, answers = self._before(old.part), self._answers(commits)
        is_kept = _is_kept(before, answers, self.manifest.output_prefix)
        made = self._count(answers, pc.invert(is_kept)) + self._count(before, is_kept)
        rows = RetriedRows(
            retry=self.retry.number,
            created=self.retry.created,
            versions=self.retry.versions,
            max_new_tokens=self.retry.max_new_tokens,
            ranges=self.chosen.of_part(old.part),
            totals=made,
        )
        totals = old.totals - count(before, self.manifest.output_prefix) + made
        return replace(old, totals=totals, retries=(*old.retries, rows))

    def _before(self, part: int) -> pa.Table:
        """What is counted of the chosen rows of a part, as they are in it."""
        return _read_columns(self.base, part, self._counted).filter(self.chosen.mask(part))

    def _answers(self, commits: Mapping[int, list[SegmentInfo]]) -> pa.Table:
        """What is counted of the new rows of a part."""
        tables = (read_rows(self.folder, infos) for infos in commits.values() if infos)
        return pa.concat_tables([table.select(self._counted) for table in tables])

    @property
    def _counted(self) -> list[str]:
        return [self.manifest.output_prefix + name for name in _COUNTED]

    def _count(self, rows: pa.Table, mask: pa.ChunkedArray) -> Totals:
        return count(rows.filter(mask), self.manifest.output_prefix)

    def _merged(
        self, path: Path, part: int, commits: Mapping[int, list[SegmentInfo]]
    ) -> Iterator[pa.Table]:
        manifest = self.base.manifest
        with open_parquet(path) as file, reading(path):
            tables = parts.shards_of_part(file, manifest, part)
            for shard, table in zip(manifest.part_shards(part), tables, strict=True):
                merged = table
                if infos := commits[shard]:
                    rows = read_rows(self.folder, infos)
                    ranges = self.chosen.of_shard(shard)
                    merged = _put_in(table, rows, ranges, manifest.output_prefix)
                if problem := wrong_row(merged, manifest, manifest.shard(shard)):
                    raise DamagedOutputError(f"'{path}' or '{self.folder.segments}': {problem}")
                yield merged


def retried(info: PartInfo, number: int) -> RetriedRows | None:
    """What a part says about the retry of this number; None if it was not part of it."""
    return next((rows for rows in info.retries if rows.retry == number), None)


def _mask(base: Ledger, part: int, retry: Retry) -> pa.BooleanArray:
    name = f"{base.manifest.output_prefix}finish_reason"
    reasons = _read_columns(base, part, [name]).column(name)
    wanted = pa.array([reason.value for reason in retry.only])
    return pc.is_in(reasons, wanted).combine_chunks()


def _read_columns(base: Ledger, part: int, names: list[str]) -> pa.Table:
    path = base.folder.root / base.manifest.part_name(part)
    with open_parquet(path) as file, reading(path):
        return file.read(names, use_threads=False)


def _is_kept(old: pa.Table, new: pa.Table, prefix: str) -> pa.ChunkedArray:
    """For each row whether the old one stays: an error never takes the place of an answer."""
    old_fails, new_fails = (
        pc.equal(table.column(f"{prefix}finish_reason"), FinishReason.ERROR.value)
        for table in (old, new)
    )
    return pc.and_not(new_fails, old_fails)


def _put_in(old: pa.Table, new: pa.Table, ranges: Ranges, prefix: str) -> pa.Table:
    """`old` with its rows at `ranges` taken from `new`, which holds just these, in order."""
    chosen = [position for first, end in ranges for position in range(first, end)]
    before = pa.concat_tables([old.slice(first, end - first) for first, end in ranges])
    is_kept = _is_kept(before, new, prefix).to_pylist()
    offsets = {position: offset for offset, position in enumerate(chosen) if not is_kept[offset]}
    # Slices and not `take` or `if_else`, which do not know every type.
    pieces, position = [], 0
    for first, end in as_ranges(offsets):
        pieces += [old.slice(position, first - position), new.slice(offsets[first], end - first)]
        position = end
    return pa.concat_tables([*pieces, old.slice(position)])
