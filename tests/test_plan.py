"""How a job is cut up, and what a sample of it shows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.inputs import Inputs, InputSettings, open_inputs
from jobs.plan import (
    choose_shard_rows,
    choose_shards_in_flight,
    choose_shards_per_part,
    estimate,
    sample_rows,
)
from pipeline.prompts import PromptRenderer
from pipeline.settings import PromptSettings
from tests.word_tokenizer import WordTokenizer


def _inputs(folder: Path, *files: list[str | None], limit: int | None = None) -> Inputs:
    (folder / "in").mkdir()
    for number, texts in enumerate(files):
        table = pa.table({"q": pa.array(texts, pa.string())})
        pq.write_table(table, folder / "in" / f"{number}.parquet", row_group_size=10)
    return open_inputs(InputSettings(path="in", limit=limit), folder, folder / "staging")


def _renderer() -> PromptRenderer:
    return PromptRenderer(PromptSettings(template="{{ q }}"), WordTokenizer())


@pytest.mark.parametrize(
    ("num_rows", "shard_rows"),
    [(1, 32), (2_048, 32), (2_049, 33), (8_000, 125), (32_768, 512), (10**9, 512)],
)
def test_shard_rows(num_rows: int, shard_rows: int) -> None:
    """Small jobs are spread over the workers, large ones lose little when one is killed."""
    assert choose_shard_rows(num_rows) == shard_rows


def test_parts_have_about_65536_rows() -> None:
    """Whatever the shards' size, a part has many rows, and at least one shard."""
    assert choose_shards_per_part(512) == 128
    assert choose_shards_per_part(16) == 4096
    assert choose_shards_per_part(500) == 131
    assert choose_shards_per_part(100_000) == 1


def test_sample_is_even_over_all_files(tmp_path: Path) -> None:
    """Rows are taken at equal distances, counted through the files, none after the limit."""
    texts: list[str | None] = ["x"] * 50
    inputs = _inputs(tmp_path, texts, [], texts, texts, limit=120)
    assert inputs.num_rows == 120
    rows = [shard.row_id(0) for shard in sample_rows(inputs, 6)]
    assert rows == [
        "0.parquet#10",
        "0.parquet#30",
        "2.parquet#0",
        "2.parquet#20",
        "2.parquet#40",
        "3.parquet#10",
    ]


def test_sample_of_every_row(tmp_path: Path) -> None:
    """A small input is looked at whole, each row once."""
    inputs = _inputs(tmp_path, ["a"] * 7, ["b"] * 5)
    rows = [(shard.name, shard.first_row) for shard in sample_rows(inputs, 12)]
    assert rows == [("0.parquet", n) for n in range(7)] + [("1.parquet", n) for n in range(5)]


def test_estimate_counts_lengths_and_failures(tmp_path: Path) -> None:
    """Lengths are of the rows that have a prompt; failures are told once, with their row."""
    texts: list[str | None] = ["w " * length for length in range(1, 101)]
    inputs = _inputs(tmp_path, texts, [None, "", None])
    result = estimate(inputs, _renderer(), max_prompt_tokens=98, shard_rows=64)
    assert (result.num_rows, result.num_shards, result.num_parts) == (103, 3, 1)
    assert result.num_sampled == 103
    assert result.prompt_tokens_median == 50
    assert result.prompt_tokens_p90 == 90
    assert result.prompt_tokens_max == 100
    assert (result.num_overlong, result.num_failed) == (2, 3)
    assert result.failures == (
        "1.parquet#0: null_column: column 'q' is null",
        "1.parquet#1: empty_prompt: the prompt has no tokens",
    )
    assert estimate(inputs, _renderer(), 98, 64) == result


def test_estimate_samples_a_large_input(tmp_path: Path) -> None:
    """Of many rows, 200 are looked at."""
    result = estimate(_inputs(tmp_path, ["one two"] * 1000), _renderer(), 10, 512)
    assert (result.num_sampled, result.prompt_tokens_median, result.num_shards) == (200, 2, 2)


def test_estimate_without_a_single_prompt(tmp_path: Path) -> None:
    """An input whose every row fails is described, not a crash."""
    result = estimate(_inputs(tmp_path, [None, None]), _renderer(), 10, 16)
    assert (result.num_failed, result.prompt_tokens_max, result.prompt_tokens_p90) == (2, 0, 0)


@pytest.mark.parametrize(
    ("rows_of_shard", "batch_size", "expected"),
    [(512, 64, 2), (32, 64, 4), (32, 16, 2), (1, 64, 64), (50, 64, 3)],
)
def test_a_worker_holds_two_batches(rows_of_shard: int, batch_size: int, expected: int) -> None:
    """One that runs and one that fills the places it leaves, whatever the shards' size."""
    assert choose_shards_in_flight(rows_of_shard, batch_size) == expected
