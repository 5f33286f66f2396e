"""What waits for a slot, and in which order it gets one. Standard library only."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import count, islice

from pipeline.prefix import best_prefix
from pipeline.records import Completion, Request, RequestId
from pipeline.stopping import Generated


class Row:
    """What is generated once: one request, or several that must have the same answer.

    Attributes:
        requests: at least one; the first is the one that is generated.
        number: counts rows in the order in which they were first taken; -1 before.
    """

    def __init__(self, request: Request, generated: Generated) -> None:
        self.requests = [request]
        self.generated = generated
        self.number = -1

    @property
    def adapter(self) -> str:
        """Whose answer it is to be: prompts of two adapters have nothing in common."""
        return self.requests[0].adapter

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of the prompt and of the completion so far."""
        return (*self.requests[0].prompt_ids, *self.generated.ids)

    @property
    def length(self) -> int:
        """How many tokens that is."""
        return len(self.requests[0].prompt_ids) + len(self.generated.ids)

    @property
    def has_ended(self) -> bool:
        """Whether it has its answer."""
        return self.generated.completion is not None

    def completions(self) -> list[Completion]:
        """One for each request; none if it has not ended."""
        completion = self.generated.completion
        if completion is None:
            return []
        return [replace(completion, id=request.id) for request in self.requests]


class Waiting:
    """Rows in runs: of the oldest, those with the longest prompts come first.

    So neighbours are of similar length, a batch that is too big shows at once, and the window
    seldom has to move; and no row waits for longer than its run takes.

    Args:
        num_lookahead: rows of a run.

    Attributes:
        prefix: what most of the current run's prompts begin with; perhaps nothing.
        prefix_adapter: whose prompts those are.
    """

    def __init__(self, num_lookahead: int) -> None:
        self.prefix: tuple[int, ...] = ()
        self.prefix_adapter = ""
        self._num_lookahead = num_lookahead
        self._arrived: deque[Row] = deque()
        self._run: deque[Row] = deque()
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._run) + len(self._arrived)

    def add(self, row: Row) -> None:
        """Queues a row."""
        self._arrived.append(row)

    def unstarted(self) -> list[RequestId]:
        """The requests of rows that have never been taken."""
        rows = (*self._run, *self._arrived)
        return [request.id for row in rows if row.number < 0 for request in row.requests]

    def withdraw(self, ids: AbstractSet[RequestId]) -> list[Row]:
        """Removes the rows that have never been taken and whose requests are all among `ids`."""
        gone = {
            row
            for row in (*self._run, *self._arrived)
            if row.number < 0 and all(request.id in ids for request in row.requests)
        }
        for rows in (self._run, self._arrived):
            kept = [row for row in rows if row not in gone]
            rows.clear()
            rows.extend(kept)
        return list(gone)

    def put_back(self, rows: Sequence[Row]) -> None:
        """Takes rows again that had been taken, to be the next ones, in this order."""
        self._run.extendleft(reversed(rows))

    def head(self, num_rows: int) -> list[Row]:
        """The next rows, at most so many, without taking them."""
        if not self._run:
            self._start_run()
        return list(islice(self._run, num_rows))

    def take(self, num_rows: int) -> list[Row]:
        """Removes the next rows: as many as `head` has shown."""
        rows = [self._run.popleft() for _ in range(num_rows)]
        for row in rows:
            if row.number < 0:
                row.number = next(self._numbers)
        return rows

    def _start_run(self) -> None:
        num_rows = min(self._num_lookahead, len(self._arrived))
        run = [self._arrived.popleft() for _ in range(num_rows)]
        self._run.extend(sorted(run, key=lambda row: -row.length))
        if run:
            counts = Counter(row.adapter for row in run)
            self.prefix_adapter = counts.most_common(1)[0][0]
        alike = [row for row in run if row.adapter == self.prefix_adapter]
        self.prefix = best_prefix([row.requests[0].prompt_ids for row in alike])
