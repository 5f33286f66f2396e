"""Which shards and parts are done, kept up to date while a run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jobs.manifest import Manifest
from jobs.parts import PartInfo
from pipeline.segments import SegmentInfo, Totals, missing_positions


class JobState:
    """What is done of a job. Memory: a byte per shard, and the commits of unfinished shards.

    Attributes:
        totals: over everything committed, in parts and in segments.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.totals = Totals()
        self._manifest = manifest
        self._is_complete = bytearray(manifest.num_shards)
        self._left_in_part = [len(manifest.part_shards(part)) for part in range(manifest.num_parts)]
        self._has_part = bytearray(manifest.num_parts)
        self._commits: dict[int, list[SegmentInfo]] = {}

    @property
    def num_parts_done(self) -> int:
        """Published parts."""
        return sum(self._has_part)

    @property
    def num_shards_done(self) -> int:
        """Complete shards, in parts or not."""
        return sum(self._is_complete)

    def has_part(self, part: int) -> bool:
        """Whether the part is published."""
        return bool(self._has_part[part])

    def is_complete(self, shard: int) -> bool:
        """Whether all positions of the shard are committed."""
        return bool(self._is_complete[shard])

    def pending(self) -> Iterator[int]:
        """The shards that lack rows, rising."""
        shard = self._is_complete.find(0)
        while shard >= 0:
            yield shard
            shard = self._is_complete.find(0, shard + 1)

    def ready_parts(self) -> list[int]:
        """Parts that can be rolled up: not published, and all their shards complete."""
        return [
            part
            for part, left in enumerate(self._left_in_part)
            if left == 0 and not self._has_part[part]
        ]

    def add_part(self, info: PartInfo) -> None:
        """Take note of a published part whose shards were not counted before."""
        self.totals += info.totals
        self.mark_part(info.part)
        for shard in self._manifest.part_shards(info.part):
            self._complete(shard)

    def mark_part(self, part: int) -> None:
        """Take note that a part whose shards are complete has been rolled up."""
        self._has_part[part] = True

    def add(self, infos: Iterable[SegmentInfo]) -> None:
        """Take note of commits; one that is known already counts once.

        Raises:
            DamagedOutputError: two commits hold the same position.
        """
        for info in infos:
            if self._is_complete[info.shard] or info in self._commits.get(info.shard, ()):
                continue
            known = self._commits.setdefault(info.shard, [])
            known.append(info)
            self.totals += info.totals
            missing = missing_positions(known, self._manifest.shard_completions(info.shard))
            if not self._manifest.shard(info.shard).wanted(missing):
                self._complete(info.shard)

    def skip(self, shard: int) -> None:
        """Take note that nothing is wanted of a shard."""
        if not self._is_complete[shard]:
            self._complete(shard)

    def _complete(self, shard: int) -> None:
        self._commits.pop(shard, None)
        self._is_complete[shard] = True
        self._left_in_part[self._manifest.part_of(shard)] -= 1
