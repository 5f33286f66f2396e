"""Which shards and parts are done, kept up to date while a run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jobs.manifest import Manifest
from pipeline.segments import SegmentInfo, Totals, missing_positions


class JobState:
    """What is done of a job. Memory: a byte per shard, and the commits of unfinished shards.

    Taking note of a commit, or of a part, looks at no other one, however many there are.

    Attributes:
        totals: over everything committed, in parts and in segments.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.totals = Totals()
        self._manifest = manifest
        self._is_complete = bytearray(manifest.num_shards)
        self._left_in_part = [len(manifest.part_shards(part)) for part in range(manifest.num_parts)]
        self._has_part = bytearray(manifest.num_parts)
        self._ready: list[int] = []
        self._commits: dict[int, list[SegmentInfo]] = {}

    @property
    def num_parts_done(self) -> int:
        """Published parts."""
        return self._has_part.count(1)

    @property
    def num_shards_done(self) -> int:
        """Complete shards, in parts or not."""
        return self._is_complete.count(1)

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

    def take_ready_parts(self) -> list[int]:
        """Parts that can be rolled up, as all their shards are complete; each is told once."""
        ready, self._ready = self._ready, []
        return ready

    def add_part(self, part: int, totals: Totals) -> None:
        """Take note of a published part whose shards were not counted before."""
        self.totals += totals
        self.mark_part(part)
        shards = self._manifest.part_shards(part)
        self._is_complete[shards.start : shards.stop] = b"\x01" * len(shards)
        self._left_in_part[part] = 0

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
        part = self._manifest.part_of(shard)
        self._left_in_part[part] -= 1
        if not self._left_in_part[part]:
            self._ready.append(part)
