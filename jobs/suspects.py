"""Which rows kill workers: rows that lost theirs run alone, and are cut until one row is left.

    beside other shards -> alone -> cut ... -> a single row -> held back -> tried again -> an error

Every cut takes one row off and halves the others: if the fault lies in no row, the single one is
lost as well, and soon the limits of `jobs.losses` end the run. A row that was lost alone is held
back until some other row has been done; if it loses a second worker then, it is to blame.

Knows neither Ray nor files, and nothing of what a row is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.errors import WorkerError
from pipeline.records import RowRange, Shard

MAX_LOSSES_OF_ROW = 2
"""Workers that may be lost with one row alone before it becomes an error row."""

MAX_LOSSES_OF_ERROR = 3
"""Workers that may be lost while they do no more than write a row's error."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """Rows that run alone, because a worker was lost with them.

    Attributes:
        rows: with an error, they are to blame and shall be committed as error rows.
        worker: the one that was lost with them last; another one should try them.
        num_losses: workers lost while they ran exactly these rows, alone.
    """

    shard: Shard
    rows: RowRange
    worker: int
    num_losses: int = 0

    @property
    def row_id(self) -> str:
        """The first of its rows."""
        return self.shard.row_id(self.rows.first)


class Suspects:
    """All suspects of a run; it is true as long as there is one."""

    def __init__(self) -> None:
        self._waiting: deque[Suspect] = deque()
        self._running: dict[int, Suspect] = {}  # by worker
        self._held: list[Suspect] = []

    def __bool__(self) -> bool:
        return bool(self._waiting or self._running or self._held)

    @property
    def held(self) -> tuple[Suspect, ...]:
        """Single rows that wait for another row to be done before they are tried again."""
        return tuple(self._held)

    @property
    def are_all_held(self) -> bool:
        """Whether nothing is left but rows that are held back."""
        return bool(self._held) and not self._waiting and not self._running

    @property
    def are_of_one_shard(self) -> bool:
        """Whether all rows that are suspected lie near each other."""
        every = (*self._waiting, *self._running.values(), *self._held)
        return len({suspect.shard.index for suspect in every}) == 1

    def next(self) -> Suspect | None:
        """Who runs next; never two of one shard at a time, as they may overlap."""
        running = {each.shard.index for each in self._running.values()}
        free = (each for each in self._waiting if each.shard.index not in running)
        return next(free, None)

    def run(self, suspect: Suspect, worker: int) -> None:
        """Takes note that a worker has it, and nothing else."""
        self._waiting.remove(suspect)
        self._running[worker] = suspect

    def clear(self, suspect: Suspect) -> None:
        """Forgets one that waits: all its rows are done."""
        self._waiting.remove(suspect)

    def has(self, worker: int) -> bool:
        """Whether a worker runs a suspect."""
        return worker in self._running

    def describe(self, worker: int, shard: Shard) -> str:
        """The rows of this shard that a worker holds, for people."""
        suspect = self._running.get(worker)
        rows = suspect.rows if suspect else RowRange(0, shard.num_rows)
        if rows.end == rows.first + 1:
            return f"row {shard.row_id(rows.first)}"
        part = "rows" if shard.chosen is None else "some of the rows"
        return f"{part} {shard.row_id(rows.first)} to {shard.first_row + rows.end - 1}"

    def answered(self, worker: int, *, is_complete: bool) -> Suspect | None:
        """Clears the suspect of a worker that has lived; None if it had none.

        It runs again if it is not complete, because another attempt has committed.
        """
        suspect = self._running.pop(worker, None)
        if suspect is not None and not is_complete:
            self._waiting.appendleft(suspect)
        return suspect

    def lost(self, shard: Shard, missing: Sequence[int], worker: int, cause: str) -> None:
        """Takes note that a worker was lost which held this shard, or its suspect.

        Args:
            missing: the rows that the shard lacks, rising.
            cause: why the worker was lost, as far as can be told.

        Raises:
            WorkerError: workers are lost even when they only write a row's error.
        """
        suspect = self._running.pop(worker, None)
        if suspect is None:
            # Others ran beside it: only now is it looked at by itself.
            if missing:
                self._waiting.append(Suspect(shard, RowRange(0, shard.num_rows), worker))
            return
        rows = [row for row in missing if row in suspect.rows]
        suspect = replace(suspect, worker=worker, num_losses=suspect.num_losses + 1)
        if suspect.rows.error is not None:
            self._repeat(suspect, cause)
        elif rows and suspect.rows == RowRange(rows[0], rows[0] + 1):
            self._judge(suspect, cause)
        else:
            pieces = [Suspect(shard, piece, worker) for piece in _cut(rows)]
            self._waiting.extendleft(reversed(pieces))

    def retry_held(self) -> None:
        """Has the rows that are held back tried again: other rows can be done."""
        self._waiting.extendleft(self._held)
        self._held.clear()

    def _judge(self, suspect: Suspect, cause: str) -> None:
        """Holds a single row back, or finds it to blame."""
        if suspect.num_losses < MAX_LOSSES_OF_ROW:
            self._held.append(suspect)
            return
        error = (
            f"killed: {suspect.num_losses} workers were lost while they ran this row alone "
            f"(the last one: {cause})"
        )
        self._waiting.appendleft(
            Suspect(suspect.shard, replace(suspect.rows, error=error), suspect.worker)
        )

    def _repeat(self, suspect: Suspect, cause: str) -> None:
        """Has an error written once more, unless that is what kills."""
        if suspect.num_losses >= MAX_LOSSES_OF_ERROR:
            raise WorkerError(
                f"{suspect.num_losses} workers were lost while they wrote the error of row "
                f"{suspect.row_id} and ran no row at all (the last one: {cause}); see whether "
                f"'{suspect.shard.path}' can be read, and what the logs in .shardmill/logs say"
            )
        self._waiting.appendleft(suspect)


def _cut(rows: Sequence[int]) -> list[RowRange]:
    """The first row by itself, and the others in halves; [] for no rows."""
    others = rows[1:]
    half = (len(others) + 1) // 2
    pieces = (rows[:1], others[:half], others[half:])
    return [RowRange(piece[0], piece[-1] + 1) for piece in pieces if piece]
