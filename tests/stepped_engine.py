"""An engine without a model, of which a test says when it gets on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from pipeline.metrics import EngineMetrics
from pipeline.records import Completion, FinishReason, Request, RequestId


class SteppedEngine:
    """Finishes the oldest request whenever the test allows one more step."""

    def __init__(self) -> None:
        self.metrics = EngineMetrics()
        self.requests: deque[Request] = deque()
        self._allowed = threading.Semaphore(0)
        self.failure: Exception | None = None
        self.has_begun = False  # with all that it has

    @property
    def num_waiting(self) -> int:
        return len(self.requests)

    @property
    def num_running(self) -> int:
        return 0

    def add(self, requests: Sequence[Request]) -> None:
        self.requests.extend(requests)

    def unstarted(self) -> list[RequestId]:
        return [] if self.has_begun else [request.id for request in self.requests]

    def withdraw(self, ids: AbstractSet[RequestId]) -> list[RequestId]:
        withdrawn = [identity for identity in self.unstarted() if identity in ids]
        self.requests = deque(each for each in self.requests if each.id not in withdrawn)
        return withdrawn

    def step(self) -> list[Completion]:
        if not self.requests or not self._allowed.acquire(timeout=0.01):
            return []
        if self.failure is not None:
            raise self.failure
        request = self.requests.popleft()
        self.metrics = self.metrics.after_decode(num_slots=1, num_live=1, seconds=0.0)
        return [Completion(request.id, f"answer {request.id.row}", FinishReason.STOP, None, 3, 1)]

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)
