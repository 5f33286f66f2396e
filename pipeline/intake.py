"""Requests -> rows to be generated. Requests that must have the same answer share one."""

from __future__ import annotations

from pipeline.records import Request, Sampling
from pipeline.stopping import Generated, StopStrings, Vocabulary
from pipeline.waiting import Row

Key = tuple[tuple[int, ...], Sampling, str]


class Intake:
    """Knows the rows that have not ended, as far as others could share them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._greedy: dict[Key, Row] = {}

    def row_for(self, request: Request) -> Row | None:
        """A new row; None if the request has joined one that waits or runs.

        Greedy requests of one prompt, setting and adapter share a row: chance has no part in them.
        """
        key = _key(request)
        if key in self._greedy:
            self._greedy[key].requests.append(request)
            return None
        row = Row(request, Generated(request, self._stops_of(request), self._vocabulary))
        if request.sampling.temperature == 0:
            self._greedy[key] = row
        return row

    def forget(self, row: Row) -> None:
        """Lets nothing join a row any more."""
        request = row.requests[0]
        if request.sampling.temperature == 0:
            del self._greedy[_key(request)]

    def _stops_of(self, request: Request) -> StopStrings:
        stop = request.sampling.stop
        if stop not in self._stops:
            self._stops[stop] = StopStrings(stop, self._vocabulary)
        return self._stops[stop]


def _key(request: Request) -> Key:
    return request.prompt_ids, request.sampling, request.adapter
