"""An engine in a thread of its own, and where its completions are collected.

An `Engine` belongs to one thread. This is that thread: others hand requests in and wait at a
`Collector` for what becomes of them.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from pipeline.engine import Engine
from pipeline.records import Completion, Request, RequestId


class Collector:
    """The completions of one attempt at a shard, as they come in.

    Args:
        num_expected: completions after which the collection is whole.

    Attributes:
        num_expected: the same, less what will not come.
    """

    def __init__(self, num_expected: int) -> None:
        self._changed = threading.Condition()
        self.num_expected = self._num_missing = num_expected
        self._completions: list[Completion] = []
        self._failure: BaseException | None = None
        self._is_closed = False

    def put(self, completions: Iterable[Completion]) -> None:
        """Takes completions in; called from any thread."""
        with self._changed:
            before = len(self._completions)
            self._completions.extend(completions)
            self._num_missing -= len(self._completions) - before
            self._changed.notify_all()

    def expect_fewer(self, count: int) -> None:
        """Does without so many completions: others will have them made."""
        with self._changed:
            self.num_expected -= count
            self._num_missing -= count
            self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """Makes every `wait` raise: the engine has ended and nothing more will come."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def close(self) -> None:
        """Ends every `wait`: nothing more is wanted."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Waits until whole or closed, at most `timeout` seconds; tells whether that is so."""
        with self._changed:
            self._changed.wait_for(self._has_ended, timeout)
            if self._failure is not None:
                raise self._failure
            return self._has_ended()

    def take(self) -> list[Completion]:
        """What has come since the last call."""
        with self._changed:
            taken, self._completions = self._completions, []
            return taken

    def _has_ended(self) -> bool:
        return self._num_missing == 0 or self._is_closed or self._failure is not None


@dataclass
class Wish:
    """Somebody waits for requests to be given up.

    Attributes:
        share: of those that can be.
        granted: which were.
    """

    share: float
    granted: Future[list[RequestId]] = field(default_factory=Future)


class EngineThread:
    """Runs an engine whenever it has work.

    An exception of the engine is not a row's: it ends the thread and is raised to everyone who
    waits or submits.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._inbox: list[Sequence[Request]] = []
        self._unwanted: set[RequestId] = set()
        self._wishes: deque[Wish] = deque()
        # By request and not by shard: what a dropped attempt has still in the engine must not
        # reach the next attempt at the same shard, which may ask for other rows.
        self._collectors: dict[RequestId, Collector] = {}
        self._failure: BaseException | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], collector: Collector) -> None:
        """Queues requests; the completion of each goes to `collector`, once."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._is_stopped:
                collector.close()
            self._collectors |= dict.fromkeys((request.id for request in requests), collector)
            self._inbox.append(requests)
            self._changed.notify_all()

    def forget(self, requests: Sequence[Request], collector: Collector) -> None:
        """Throws away what may still come for a collector; what has no token yet is not begun.

        Args:
            requests: as they were submitted.
        """
        with self._changed:
            self._inbox = [each for each in self._inbox if each is not requests]
            for request in requests:
                if self._collectors.get(request.id) is collector:
                    del self._collectors[request.id]
                    self._unwanted.add(request.id)

    def release(self, share: float) -> list[RequestId]:
        """Gives up requests that have no token yet, of the shard that has most of them.

        Blocks until the step is done. Their collectors expect them no more; what is given up lies
        at the shard's end. Empty when all have been started, and after `stop`.

        Args:
            share: of those of the shard, from 0 to 1; one at least is given up.
        """
        wish = Wish(share)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._is_stopped:
                return []
            self._wishes.append(wish)
            self._changed.notify_all()
        return wish.granted.result()

    def stop(self) -> None:
        """Ends the thread after the step it is in, and every wait at once."""
        with self._changed:
            self._is_stopped = True
            for collector in set(self._collectors.values()):
                collector.close()
            self._changed.notify_all()

    def _main(self) -> None:
        try:
            while self._admit():
                self._deliver(self.engine.step())
        except BaseException as failure:  # noqa: BLE001 - raised again by all who wait for it
            with self._changed:
                self._failure = failure
                for collector in set(self._collectors.values()):
                    collector.fail(failure)
        finally:
            with self._changed:
                self._is_stopped = True
                for wish in self._wishes:
                    wish.granted.set_result([])

    def _admit(self) -> bool:
        """Waits until there is work and hands the engine what is new; False when stopped."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_stopped or self._inbox or self._wishes or self._is_busy()
            )
            if self._is_stopped:
                return False
            arrived, self._inbox = self._inbox, []
            unwanted, self._unwanted = self._unwanted, set()
        if unwanted:  # before another attempt may ask for them again
            self.engine.withdraw(unwanted)
        for requests in arrived:
            self.engine.add(requests)
        while self._wishes:
            self._wishes[0].granted.set_result(self._give_up(self._wishes[0].share))
            self._wishes.popleft()
        return True

    def _give_up(self, share: float) -> list[RequestId]:
        unstarted = self.engine.unstarted()
        if not unstarted:
            return []
        [(shard, count)] = Counter(identity.shard for identity in unstarted).most_common(1)
        of_shard = sorted(identity for identity in unstarted if identity.shard == shard)
        withdrawn = self.engine.withdraw(set(of_shard[-max(1, round(count * share)) :]))
        with self._changed:
            # What an attempt that was dropped has begun is nobody's to give, and may be there
            # a second time, for another attempt.
            given_up = {identity for identity in withdrawn if identity in self._collectors}
            for identity in given_up:
                self._collectors.pop(identity).expect_fewer(1)
        return sorted(given_up)

    def _is_busy(self) -> bool:
        return self.engine.num_waiting + self.engine.num_running > 0

    def _deliver(self, completions: Sequence[Completion]) -> None:
        by_collector: dict[Collector, list[Completion]] = {}
        with self._changed:
            for completion in completions:
                collector = self._collectors.pop(completion.id, None)
                if collector is not None:
                    by_collector.setdefault(collector, []).append(completion)
        for collector, finished in by_collector.items():
            collector.put(finished)
