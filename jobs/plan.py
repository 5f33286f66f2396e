"""How a job is cut into shards and parts, and what a sample of its prompts looks like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from jobs.inputs import Inputs
from jobs.worker import SHARDS_IN_FLIGHT
from pipeline.errors import RowError
from pipeline.prompts import PromptRenderer
from pipeline.reader import ShardReader, plain_rows
from pipeline.records import Shard

MIN_SHARD_ROWS = 32
MAX_SHARD_ROWS = 512
MOST_SHARDS_IN_FLIGHT = 64
"""Of one worker, each with the shard's input rows in memory."""
_SHARDS_OF_SMALL_JOB = 64
_PART_ROWS = 65_536
_SAMPLE_ROWS = 200
_MOST_EXAMPLES = 5


def choose_shard_rows(num_rows: int) -> int:
    """Rows of a shard, for an input of so many rows.

    At most 512: some minutes of a large model, some seconds of a small one. At least 32, so that
    a shard fills a batch and its files are not mere overhead. In between a job has 64 shards, so
    that each of eight workers gets eight, and none idles for long at the end.
    """
    even = -(-num_rows // _SHARDS_OF_SMALL_JOB)
    return max(MIN_SHARD_ROWS, min(MAX_SHARD_ROWS, even))


def choose_shards_per_part(shard_rows: int) -> int:
    """Shards of an output file, so that it has about 65,536 rows: enough to be read fast."""
    return max(1, _PART_ROWS // shard_rows)


def choose_shards_in_flight(rows_of_shard: float, batch_size: int) -> int:
    """Shards that a worker holds at a time: its batch is full, and as much waits.

    Args:
        rows_of_shard: completions to be generated, on average.
    """
    needed = math.ceil(2 * batch_size / rows_of_shard)
    return min(max(needed, SHARDS_IN_FLIGHT), MOST_SHARDS_IN_FLIGHT)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What would run, and what a sample of the rows shows.

    Attributes:
        num_sampled: rows looked at, spread evenly over the input.
        prompt_tokens_median, prompt_tokens_p90, prompt_tokens_max: over the sampled rows that
            have a prompt; 0 if none has.
        num_overlong: sampled rows whose prompt has more tokens than there is room for.
        num_failed: sampled rows that have no prompt.
        failures: some distinct failures, each with the row it came from.
    """

    num_rows: int
    num_shards: int
    num_parts: int
    num_sampled: int
    prompt_tokens_median: int
    prompt_tokens_p90: int
    prompt_tokens_max: int
    num_overlong: int
    num_failed: int
    failures: tuple[str, ...]


def estimate(
    inputs: Inputs, renderer: PromptRenderer, max_prompt_tokens: int, shard_rows: int
) -> Estimate:
    """Render and tokenize a sample of the input; the same sample every time.

    Args:
        inputs: of the job.
        renderer: of the job.
        max_prompt_tokens: the model's context without `max_new_tokens`.
        shard_rows: as `choose_shard_rows` says.

    Raises:
        InputError: a file cannot be read.
    """
    sample = sample_rows(inputs, min(_SAMPLE_ROWS, inputs.num_rows))
    outcomes = renderer.encode(_read(sample, renderer.columns))
    lengths = sorted(len(ids) for ids in outcomes if not isinstance(ids, RowError))
    num_shards = sum(-(-file.num_rows // shard_rows) for file in inputs.files)
    return Estimate(
        num_rows=inputs.num_rows,
        num_shards=num_shards,
        num_parts=-(-num_shards // choose_shards_per_part(shard_rows)),
        num_sampled=len(sample),
        prompt_tokens_median=round(median(lengths or [0])),
        prompt_tokens_p90=_percentile(lengths, 90),
        prompt_tokens_max=max(lengths, default=0),
        num_overlong=sum(length > max_prompt_tokens for length in lengths),
        num_failed=len(sample) - len(lengths),
        failures=_distinct_failures(sample, outcomes),
    )


def sample_rows(inputs: Inputs, count: int) -> list[Shard]:
    """`count` rows at even distances, in order, each as a shard of one row."""
    wanted = iter([(2 * i + 1) * inputs.num_rows // (2 * count) for i in range(count)])
    shards: list[Shard] = []
    row, start = next(wanted, None), 0
    for file in inputs.files:
        while row is not None and row < start + file.num_rows:
            shards.append(Shard(len(shards), file.path, file.name, row - start, 1))
            row = next(wanted, None)
        start += file.num_rows
    return shards


def _read(sample: Sequence[Shard], columns: Sequence[str]) -> list[dict[str, object] | RowError]:
    reader = ShardReader(columns)
    rows = [row for shard in sample for row in plain_rows(reader.read(shard), columns)]
    reader.close()
    return rows


def _percentile(ordered: Sequence[int], percent: int) -> int:
    """The smallest value that so many percent do not exceed; 0 of nothing."""
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else 0


def _distinct_failures(
    sample: Sequence[Shard], outcomes: Sequence[list[int] | RowError]
) -> tuple[str, ...]:
    first_rows: dict[str, str] = {}
    for shard, outcome in zip(sample, outcomes, strict=True):
        if isinstance(outcome, RowError):
            first_rows.setdefault(str(outcome), shard.row_id(0))
    return tuple(f"{row_id}: {error}" for error, row_id in first_rows.items())[:_MOST_EXAMPLES]
