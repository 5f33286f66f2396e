"""What a run folder holds: looked through, rolled up, swept.

The files are the truth; nothing here is kept anywhere else. Only the holder of the run's lock
calls `Ledger.sweep`.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jobs.manifest import Manifest, read_manifest
from jobs.parts import PartInfo, read_part, roll_up
from jobs.state import JobState
from jobs.tally import note, read_notes, stamp_of
from pipeline.errors import DamagedOutputError, InputError
from pipeline.folder import RunFolder
from pipeline.publish import is_there, output_errors, read_errors, sync_folder
from pipeline.segments import (
    SegmentInfo,
    Totals,
    count_commits,
    list_segments,
    read_info,
    segment_name,
)

_FOOTER_THREADS = 8


@dataclass(frozen=True, slots=True)
class Ledger:
    """A run folder and what it was started with."""

    folder: RunFolder
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Ledger:
        """Read an existing run folder.

        Raises:
            InputError: it is none.
            OutputError: it is a newer Shardmill's, or cannot be read.
            DamagedOutputError: its manifest is damaged.
        """
        run = RunFolder(folder)
        with read_errors(run.manifest):
            if not run.manifest.is_file():
                raise InputError(
                    f"'{folder}' is no output folder of Shardmill: it has no "
                    f"'{run.manifest.relative_to(folder)}'; give the folder that a run wrote to"
                )
            return cls(run, read_manifest(run.manifest))

    @property
    def is_complete(self) -> bool:
        """Whether `_SUCCESS` and all parts are there; no file is opened."""
        parts = range(self.manifest.num_parts)
        return is_there(self.folder.success) and all(self.has_part(part) for part in parts)

    def has_part(self, part: int) -> bool:
        """Whether the part is published."""
        return is_there(self.folder.root / self.manifest.part_name(part))

    def is_rolled_up(self, shard: int) -> bool:
        """Whether the shard is of this job and in a published part: its segments mean nothing."""
        manifest = self.manifest
        return shard < manifest.num_shards and self.has_part(manifest.part_of(shard))

    def scan(self) -> JobState:
        """Which shards and parts are done; the segments of published parts are not opened.

        Neither are parts that the tally knows.

        Raises:
            DamagedOutputError: a part or segment is torn, another job's, or missing in a sequence.
            FileNotFoundError: a driver rolled up a part meanwhile; impossible under the lock.
        """
        state = JobState(self.manifest)
        # Segments before parts: what moves from one to the other meanwhile is seen at least once.
        segments = list_segments(self.folder)
        for part, totals in self._published(range(self.manifest.num_parts)).items():
            state.add_part(part, totals)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            names = [
                segment_name(shard, commit)
                for shard, commits in segments.items()
                if not state.has_part(self._part_of(shard))
                for commit in self._without_gaps(shard, commits)
            ]
            state.add(pool.map(self._read_segment, names))
        return state

    def parts(self) -> list[PartInfo]:
        """What the parts of a complete folder say about themselves.

        Raises:
            DamagedOutputError: one is torn, or another job's.
        """
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            return list(pool.map(self._read_part, range(self.manifest.num_parts)))

    def roll_up(self, part: int) -> PartInfo:
        """Publish a part whose shards are complete; see `jobs.parts.roll_up`."""
        info = roll_up(self.folder, self.manifest, part)
        self.note(info)
        return info

    def note(self, info: PartInfo) -> None:
        """Put in the tally what a part holds that has just been published.

        Raises:
            OutputError: the operating system refuses.
        """
        note(self.folder, self.manifest.part_name(info.part), info.part, info.totals)

    def sweep(self) -> None:
        """Remove what dead processes left in `tmp`, and the segments of published parts.

        Raises:
            DamagedOutputError: a part is not what its segments were put together to; they stay.
            OutputError: the operating system refuses.
        """
        with output_errors(self.folder.root):
            for leftover in (*self.folder.tmp.iterdir(), *self.folder.internal.glob("*.tmp")):
                leftover.unlink(missing_ok=True)  # one that is not dead removes its own
            # A part's name may not be durable yet if its writer died right after linking it.
            sync_folder(self.folder.root)
            self._remove_rolled_up()

    def _remove_rolled_up(self) -> None:
        segments = list_segments(self.folder)
        rolled_up = [shard for shard in segments if self.is_rolled_up(shard)]
        # A name alone says nothing: this looks into those parts that the tally does not know.
        whole = self._published({self.manifest.part_of(shard) for shard in rolled_up})
        for shard in rolled_up:
            if self.manifest.part_of(shard) in whole:
                for commit in segments[shard]:
                    (self.folder.segments / segment_name(shard, commit)).unlink()

    def _published(self, parts: Iterable[int]) -> dict[int, Totals]:
        """What those of the parts hold that are published.

        Raises:
            DamagedOutputError: one is torn, or another job's.
        """
        notes, root = read_notes(self.folder), self.folder.root
        totals: dict[int, Totals] = {}
        unknown: list[int] = []
        for part in parts:
            stamp = stamp_of(root / self.manifest.part_name(part))
            if stamp is not None and (part, stamp) in notes:
                totals[part] = notes[part, stamp]
            elif stamp is not None:
                unknown.append(part)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            totals |= {info.part: info.totals for info in pool.map(self._read_part, unknown)}
        return totals

    def _read_part(self, part: int) -> PartInfo:
        return read_part(self.folder, self.manifest, part)

    def _part_of(self, shard: int) -> int:
        if shard >= self.manifest.num_shards:
            raise DamagedOutputError(
                f"'{self.folder.segments / segment_name(shard, 0)}' is of a shard that this job "
                "does not have; move it away and run the same command again"
            )
        return self.manifest.part_of(shard)

    def _without_gaps(self, shard: int, commits: list[int]) -> range:
        # A listing made while files come and go may show a later commit and not an earlier one.
        count = len(commits)
        if commits[-1] >= count:
            count = count_commits(self.folder, shard)
        if commits[-1] < count:
            return range(count)
        path = self.folder.segments / segment_name(shard, count)
        if self.is_rolled_up(shard):
            raise FileNotFoundError(path)
        raise DamagedOutputError(
            f"'{path}' is gone though a later commit of shard {shard} is there; move that away "
            "and run the same command again"
        )

    def _read_segment(self, name: str) -> SegmentInfo:
        return read_info(self.folder.segments / name, self.manifest.fingerprint)
