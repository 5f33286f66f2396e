"""The manifest: which shards and parts follow from it, and what is no manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.ledger import Ledger
from pipeline.errors import (
    DamagedOutputError,
    InputError,
    OutputError,
)
from pipeline.records import Shard
from tests.run_folders import SmallJob, make_manifest


def test_shards_cover_the_files_in_order(tmp_path: Path) -> None:
    """Every row of every file is in exactly one shard; files without rows have none."""
    manifest = make_manifest(tmp_path, [0, 7, 0, 3, 1, 0], shard_rows=3)
    shards = [manifest.shard(index) for index in range(manifest.num_shards)]
    assert [(s.index, s.name, s.first_row, s.num_rows) for s in shards] == [
        (0, "in-1.parquet", 0, 3),
        (1, "in-1.parquet", 3, 3),
        (2, "in-1.parquet", 6, 1),
        (3, "in-3.parquet", 0, 3),
        (4, "in-4.parquet", 0, 1),
    ]
    assert [list(manifest.part_shards(part)) for part in range(manifest.num_parts)] == [
        [0, 1],
        [2, 3],
        [4],
    ]
    assert [manifest.part_of(shard) for shard in range(5)] == [0, 0, 1, 1, 2]


def test_plan_of_a_large_input(tmp_path: Path) -> None:
    """A hundred million rows in two thousand files are planned without listing their shards."""
    file = make_manifest(tmp_path, [1]).files[0]
    files = [file.model_copy(update={"num_rows": 50_000, "name": str(i)}) for i in range(2000)]
    manifest = make_manifest(tmp_path, [1], files=tuple(files), shard_rows=512, num_samples=2)
    assert (manifest.num_rows, manifest.num_completions) == (100_000_000, 200_000_000)
    assert manifest.num_shards == 98 * 2000
    assert manifest.shard(195_999) == Shard(195_999, file.path, "1999", 97 * 512, 336)


def test_part_names_sort_like_parts(tmp_path: Path) -> None:
    """Names are as wide as the last part's, and at least five digits."""
    manifest = make_manifest(tmp_path, [4])
    assert manifest.part_name(0) == "part-00000.parquet"
    file = manifest.files[0].model_copy(update={"num_rows": 200_000})
    manifest = make_manifest(tmp_path, [4], files=(file,), shard_rows=1, shards_per_part=1)
    assert manifest.part_name(7) == "part-000007.parquet"


def test_folder_of_a_newer_version(tmp_path: Path) -> None:
    """Another layout is not guessed at, whatever else its manifest holds."""
    job = SmallJob(tmp_path)
    job.folder.manifest.write_text(json.dumps({"format_version": 2, "unknown": 1}))
    with pytest.raises(OutputError, match="layout 2"):
        Ledger.open(job.path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "\ufffd{"])
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    """A torn or edited manifest is named."""
    job = SmallJob(tmp_path)
    job.folder.manifest.write_text(text)
    with pytest.raises(DamagedOutputError, match=r"manifest\.json' is damaged.*--fresh"):
        Ledger.open(job.path)


def test_no_run_folder(tmp_path: Path) -> None:
    """Looking at another folder says so and creates nothing."""
    with pytest.raises(InputError, match="no output folder of Shardmill"):
        Ledger.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_field_in_the_manifest(tmp_path: Path) -> None:
    """An unknown field of the same layout is damage, not something to pass over."""
    job = SmallJob(tmp_path)
    fields = json.loads(job.folder.manifest.read_text())
    job.folder.manifest.write_text(json.dumps(fields | {"extra": 1}))
    with pytest.raises(DamagedOutputError, match="damaged"):
        Ledger.open(job.path)
