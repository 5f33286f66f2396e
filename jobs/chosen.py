"""Which output rows of a job a retry generates again."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, InstanceOf

from jobs.manifest import Manifest
from pipeline.records import Shard
from pipeline.segments import as_ranges

Ranges = tuple[tuple[int, int], ...]


class Chosen:
    """The chosen rows of some parts. Memory: a bit per output row, and a number per shard.

    Args:
        manifest: of the job.
        masks: by part, for each of its rows whether it is chosen; a part without a mask has none.
    """

    def __init__(self, manifest: Manifest, masks: Mapping[int, pa.BooleanArray]) -> None:
        self._manifest = manifest
        self._masks = dict(masks)
        self._starts = {part: _starts(manifest, part) for part in masks}
        self.num_completions: int = sum(mask.true_count for mask in masks.values())

    @property
    def parts(self) -> Iterable[int]:
        """The parts with a mask."""
        return self._masks.keys()

    def mask(self, part: int) -> pa.BooleanArray:
        """For each row of a part, whether it is chosen."""
        return self._masks[part]

    def of_part(self, part: int) -> Ranges:
        """The chosen rows of a part, counted from its first."""
        return _ranges(self._masks[part])

    def of_shard(self, shard: int) -> Ranges:
        """The chosen positions of a shard."""
        part = self._manifest.part_of(shard)
        if part not in self._masks:
            return ()
        index = shard - self._manifest.part_shards(part).start
        start, end = self._starts[part][index : index + 2]
        return _ranges(self._masks[part].slice(start, end - start))


def _starts(manifest: Manifest, part: int) -> array[int]:
    """The first row of each shard of a part, and the number of its rows."""
    sizes = (manifest.shard_completions(shard) for shard in manifest.part_shards(part))
    return array("q", accumulate(sizes, initial=0))


def _ranges(mask: pa.BooleanArray) -> Ranges:
    return tuple(as_ranges(pc.indices_nonzero(mask).to_pylist()))


class ChosenManifest(Manifest):
    """A job's manifest whose shards want the chosen positions alone; never written."""

    chosen: InstanceOf[Chosen] = Field(exclude=True, description="What is wanted.")

    def shard(self, index: int) -> Shard:
        """The `index`-th shard, with what is chosen of it."""
        return replace(Manifest.shard(self, index), chosen=self.chosen.of_shard(index))
