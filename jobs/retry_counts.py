"""What the parts of a run folder say about its retries, summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.parts import PartInfo, RetriedRows
from jobs.retries import RetryRecord
from pipeline.segments import Totals


class RetryCounts:
    """Counts over the parts that are added."""

    def __init__(self) -> None:
        self._num_more: Counter[int] = Counter()  # rows, by attempts after the first
        self._seen: dict[int, tuple[RetriedRows, Totals]] = {}

    def add(self, info: PartInfo) -> None:
        """Takes note of what a part says."""
        of_row = Counter(
            row for rows in info.retries for first, end in rows.ranges for row in range(first, end)
        )
        self._num_more.update(of_row.values())
        for rows in info.retries:
            _, totals = self._seen.get(rows.retry, (rows, Totals()))
            self._seen[rows.retry] = (rows, totals + rows.totals)

    def attempts(self, num_completions: int) -> dict[int, int]:
        """How many of so many rows took 1, 2 … attempts; those of no part took one."""
        once = num_completions - self._num_more.total()
        more = {1 + attempts: count for attempts, count in sorted(self._num_more.items())}
        return {1: once, **more} if once else more

    def notes(self, records: Sequence[RetryRecord], folder: Path) -> Iterator[str]:
        """A sentence for each retry, and for each that is unfinished or whose rows are gone."""
        for rows, totals in (self._seen[number] for number in sorted(self._seen)):
            yield (
                f"retry {rows.retry} of {rows.created} generated {totals.num_completions} rows "
                f"again, with max_new_tokens {rows.max_new_tokens}: stop {totals.stop}, length "
                f"{totals.length}, error {totals.error}"
            )
        for record in records:
            if record.result is None:
                yield record.unfinished(folder)
                continue
            put_in = record.result.totals.num_completions
            _, totals = self._seen.get(record.retry.number, (None, Totals()))
            if totals.num_completions != put_in:
                yield (
                    f"retry {record.retry.number} put in {put_in} rows, and the parts name "
                    f"{totals.num_completions}: parts were put back or made anew since"
                )
