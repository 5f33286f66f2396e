"""How many workers may be lost before a run ends, since the fault lies in no row."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import WorkerError

MAX_FAILED_STARTS = 4
"""Losses per worker, none of which held a row, with no worker getting ready in between."""

MAX_LOSSES_IN_A_ROW = 12
"""Losses per worker with no row done in between. To find a row that kills takes at most 3."""

MANY_LOSSES_IN_A_ROW = 4
"""Losses per worker after which it is doubtful whether they lie in rows."""


class Losses:
    """Counts workers that were lost one after the other.

    Args:
        num_workers: tells how many the run has now. A machine that goes takes all its workers
            with it, so the limits grow with them.
    """

    def __init__(self, num_workers: Callable[[], int]) -> None:
        self._num_workers = num_workers
        self._in_a_row = 0
        self._failed_starts = 0

    @property
    def are_many(self) -> bool:
        """Whether it is time to see if other rows can be done."""
        return self._in_a_row >= MANY_LOSSES_IN_A_ROW * self._num_workers()

    def add(self, cause: str, *, held_rows: bool) -> None:
        """Counts one more.

        Raises:
            WorkerError: that was one too many.
        """
        self._in_a_row += 1
        self._failed_starts += not held_rows
        if self._failed_starts >= MAX_FAILED_STARTS * self._num_workers():
            raise WorkerError(
                f"workers were lost {self._failed_starts} times before they had begun with a row "
                f"(the last one: {cause}); the logs in .shardmill/logs say more"
            )
        if self._in_a_row >= MAX_LOSSES_IN_A_ROW * self._num_workers():
            raise WorkerError(
                f"{self._in_a_row} workers were lost and no row was done in between (the last one: "
                f"{cause}), so it does not lie in a row; the logs in .shardmill/logs say more"
            )

    def started(self) -> None:
        """A worker is ready."""
        self._failed_starts = 0

    def forget(self) -> None:
        """A row was done, or found to be what workers were lost by."""
        self._in_a_row = self._failed_starts = 0
