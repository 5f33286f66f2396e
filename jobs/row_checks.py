"""Whether output rows are the ones that belong in their place, and do not contradict themselves."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from jobs.manifest import Manifest
from pipeline.records import FinishReason, Shard
from pipeline.segments import Totals


def wrong_row(
    table: pa.Table, manifest: Manifest, shard: Shard, positions: Iterable[int] | None = None
) -> str | None:
    """The first row of `table` that is not the next of `shard`, or None.

    Args:
        table: output rows; only `row_id` and `sample_index` are looked at.
        manifest: of the job.
        shard: whose rows they should be.
        positions: what the table should hold; None is the whole shard.
    """
    if positions is None:
        positions = range(manifest.shard_completions(shard.index))
    # Column by column, as this is done for every row of a job, and twice.
    numbers = pa.array(positions, pa.int64())
    rows = pc.divide(numbers, manifest.num_samples)
    samples = pc.subtract(numbers, pc.multiply(rows, manifest.num_samples))
    expected = pa.table(
        {"row_id": _row_ids(shard, rows), "sample": samples.cast(pa.int32())},
        pa.schema({"row_id": pa.string(), "sample": pa.int32()}),
    )
    prefix = manifest.output_prefix
    found = table.select([f"{prefix}row_id", f"{prefix}sample_index"])
    found = found.rename_columns(expected.schema.names)
    return None if found.equals(expected) else _first_difference(found, expected)


def _row_ids(shard: Shard, rows: pa.Int64Array) -> pa.StringArray:
    """What `Shard.row_id` says for each of these rows."""
    numbers = pc.add(rows, shard.first_row).cast(pa.string())
    return pc.binary_join_element_wise(f"{shard.name}#", numbers, "")


def _first_difference(found: pa.Table, expected: pa.Table) -> str:
    pairs = zip(_ids(found), _ids(expected), strict=False)
    for row, (have, want) in enumerate(pairs):
        if have != want:
            return (
                f"row {row} is sample {have[1]} of {have[0]!r} instead of {want[1]} of {want[0]!r}"
            )
    return f"it holds {found.num_rows} rows instead of {expected.num_rows}"


def _ids(table: pa.Table) -> list[tuple[object, object]]:
    return list(zip(*table.to_pydict().values(), strict=True))


def wrong_status(table: pa.Table, prefix: str) -> str | None:
    """What contradicts itself first in the rows of `table`, or None.

    Every row has a known finish_reason; it has an error, and no completion, exactly if that is
    `error`.
    """
    reason = table.column(f"{prefix}finish_reason")
    known = pc.is_in(reason, pa.array([reason.value for reason in FinishReason]))
    if not pc.all(known).as_py():
        row = known.index(False).as_py()
        return f"row {row} has finish_reason {reason[row].as_py()!r}"
    is_error = pc.equal(reason, FinishReason.ERROR.value)
    for name, is_null in (("completion", is_error), ("error", pc.invert(is_error))):
        right = pc.equal(pc.is_null(table.column(prefix + name)), is_null)
        if not pc.all(right).as_py():
            row = right.index(False).as_py()
            return f"row {row} has finish_reason {reason[row].as_py()!r} and a wrong {name}"
    return None


def count(table: pa.Table, prefix: str) -> Totals:
    """What the footer of a file with these rows should say."""
    counts = pc.value_counts(table.column(f"{prefix}finish_reason")).to_pylist()
    return Totals(
        **{pair["values"]: pair["counts"] for pair in counts},
        num_prompt_tokens=_sum(table, f"{prefix}num_prompt_tokens"),
        num_completion_tokens=_sum(table, f"{prefix}num_completion_tokens"),
    )


def _sum(table: pa.Table, column: str) -> int:
    return int(pc.sum(table.column(column)).as_py() or 0)
