"""What a run folder was started with, and the shards and parts that follow from it.

The shard list is arithmetic over the files: memory grows with files, not with rows or shards.
"""

from __future__ import annotations

import base64
import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
from pydantic import Field, JsonValue

from pipeline.errors import DamagedOutputError, OutputError
from pipeline.records import Shard
from pipeline.settings import Settings

FORMAT_VERSION = 1


class PlannedFile(Settings):
    """One input file, as it was when the folder was started."""

    name: str = Field(description="How row_id names it; unique.")
    path: str = Field(description="The Parquet file that workers read.")
    size: int = Field(ge=0, description="Bytes.")
    stamp: str = Field(description="Size and time of change of the file at `path`.")
    digest: str = Field(description="Of its content.")
    num_rows: int = Field(ge=0, description="Rows taken from it, from its first on.")


class Manifest(Settings):
    """What is to be done; written once, when the folder is started."""

    format_version: int = Field(default=FORMAT_VERSION, description="Of the folder's layout.")
    shardmill_version: str = Field(description="That started the folder.")
    versions: dict[str, str] = Field(description="Of the libraries that make the answers.")
    created: str = Field(description="ISO 8601 with offset.")
    job: dict[str, JsonValue] = Field(description="The job with everything filled in.")
    fingerprint: str = Field(min_length=1, description="Equal means equal answers.")
    fingerprint_fields: dict[str, JsonValue] = Field(
        description="What the fingerprint covers, by dotted name; for the diff."
    )
    files: tuple[PlannedFile, ...] = Field(description="In the order of the output.")
    output_schema: str = Field(description="Arrow schema of the output, base64.")
    output_prefix: str = Field(description="Before the names of the added columns.")
    num_samples: int = Field(ge=1, description="Completions per row.")
    shard_rows: int = Field(ge=1, description="Most input rows of a shard.")
    shards_per_part: int = Field(ge=1, description="Most shards of a part.")

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """What `output_schema` encodes."""
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.output_schema)))

    @cached_property
    def num_rows(self) -> int:
        """Input rows of the job."""
        return sum(file.num_rows for file in self.files)

    @property
    def num_completions(self) -> int:
        """Output rows of the job."""
        return self.num_rows * self.num_samples

    @cached_property
    def _shard_ends(self) -> list[int]:
        # After each file, how many shards there have been; a file without rows has none.
        return list(accumulate(-(-file.num_rows // self.shard_rows) for file in self.files))

    @property
    def num_shards(self) -> int:
        """Shards of the job."""
        return self._shard_ends[-1] if self.files else 0

    @cached_property
    def _row_ends(self) -> list[int]:
        return list(accumulate(file.num_rows for file in self.files))

    def shard(self, index: int) -> Shard:
        """The `index`-th shard, from 0."""
        position, first_row = self._place(index)
        file = self.files[position]
        num_rows = min(self.shard_rows, file.num_rows - first_row)
        return Shard(index, file.path, file.name, first_row, num_rows)

    def _place(self, shard: int) -> tuple[int, int]:
        """The number of a shard's file, and its first row there."""
        position = bisect_right(self._shard_ends, shard)
        before = self._shard_ends[position - 1] if position else 0
        return position, (shard - before) * self.shard_rows

    def shard_completions(self, index: int) -> int:
        """Output rows of the `index`-th shard."""
        return self.shard(index).num_rows * self.num_samples

    @property
    def num_parts(self) -> int:
        """Output files of the job."""
        return -(-self.num_shards // self.shards_per_part)

    def part_shards(self, part: int) -> range:
        """The shards of the `part`-th output file, from 0."""
        first = part * self.shards_per_part
        return range(first, min(first + self.shards_per_part, self.num_shards))

    def part_completions(self, part: int) -> int:
        """Output rows of the `part`-th output file; no shard is looked at."""
        shards = self.part_shards(part)
        return (self._rows_before(shards.stop) - self._rows_before(shards.start)) * self.num_samples

    def _rows_before(self, shard: int) -> int:
        """Input rows of all shards before this one, which may be one after the last."""
        if shard == self.num_shards:
            return self.num_rows
        position, first_row = self._place(shard)
        return (self._row_ends[position - 1] if position else 0) + first_row

    def part_of(self, shard: int) -> int:
        """The part that holds a shard."""
        return shard // self.shards_per_part

    def part_name(self, part: int) -> str:
        """The file name of a part; names sort like parts."""
        width = max(5, len(str(self.num_parts - 1)))
        return f"part-{part:0{width}d}.parquet"


def encode_schema(schema: pa.Schema) -> str:
    """The text that `Manifest.output_schema` holds."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def read_manifest(path: Path) -> Manifest:
    """Read what a folder was started with.

    Raises:
        OutputError: a newer Shardmill has started it.
        DamagedOutputError: it is not what was written.
    """
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text)["format_version"]
        if version == FORMAT_VERSION:
            return Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError) as error:  # ValidationError is a ValueError
        raise DamagedOutputError(
            f"manifest '{path}' is damaged ({str(error).splitlines()[0]}); put it back from a "
            "copy, or start anew with --fresh"
        ) from error
    raise OutputError(
        f"output folder '{path.parent.parent}' has layout {version!r} and this Shardmill knows "
        f"{FORMAT_VERSION}; continue with the version of Shardmill that started it"
    )
