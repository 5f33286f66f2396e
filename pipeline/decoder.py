"""One decode step of all live rows: a recorded one that is replayed, or the model's call."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from pipeline.cuda_graph import Capture
from pipeline.errors import describe
from pipeline.fixed_step import Decoded, FixedStep
from pipeline.forward import Forward
from pipeline.room import bucket
from pipeline.sampling import greedy
from pipeline.slots import SlotCache

logger = logging.getLogger(__name__)

MakeCapture = Callable[[], Capture[Decoded]]


class Decoder:
    """Last tokens -> logits, with one recorded step for each bucket of columns.

    A step is recorded when its bucket first comes, and forgotten when the cache has other buffers.
    Where one cannot be recorded, there is a line in the log, and no other is tried.

    Args:
        make_capture: gives what records the steps of one cache's buffers; None records none.
    """

    def __init__(self, forward: Forward, make_capture: MakeCapture | None = None) -> None:
        self.forward = forward
        self._make_capture = make_capture
        self._recorded: _Recorded | None = None

    @property
    def replays(self) -> bool:
        """Whether steps are recorded and replayed."""
        return self._make_capture is not None

    def __call__(
        self, last_tokens: Tensor, cache: SlotCache, adapters: Sequence[str] = ()
    ) -> Decoded:
        """Works through one more column, which then belongs to the cache's window.

        Args:
            last_tokens: (rows,) int64.
            adapters: of each row, the one that it has chosen; steps with any are not recorded.

        Returns:
            the rows' logits and tokens, to be used before the next call.
        """
        decoded = None if any(adapters) else self._replayed(last_tokens, cache)
        if decoded is None:
            logits = self.forward(last_tokens[:, None], cache, adapters)
            return Decoded(logits, greedy(logits))
        cache.advance(1)
        num_rows = len(last_tokens)
        return Decoded(decoded.logits[:num_rows], decoded.best[:num_rows])

    def forget(self) -> None:
        """Frees what was recorded."""
        self._recorded = None

    def _replayed(self, last_tokens: Tensor, cache: SlotCache) -> Decoded | None:
        if self._make_capture is None:
            return None
        if self._recorded is None or not self._recorded.fits(cache):
            self.forget()  # first, as the new one takes the same memory
            self._recorded = _Recorded(self.forward, cache, self._make_capture())
        try:
            replay = self._recorded.load(last_tokens)
        except Exception as error:  # noqa: BLE001 - what fails without recording, too, is raised there
            logger.warning("decode steps go on without CUDA graphs: %s", describe(error))
            self._make_capture = None
            self.forget()
            return None
        return replay()


class _Recorded:
    """The steps recorded for a cache's buffers."""

    def __init__(self, forward: Forward, cache: SlotCache, capture: Capture[Decoded]) -> None:
        self._cache = cache
        # Not held, or buffers that the cache gives up would stay.
        self._buffer = weakref.ref(cache.layers[0].keys)
        self._step = FixedStep(forward, cache)
        self._capture = capture
        self._replays: dict[int, Callable[[], Decoded]] = {}

    def fits(self, cache: SlotCache) -> bool:
        """Whether what was recorded would write to this cache's buffers."""
        return cache is self._cache and self._buffer() is cache.layers[0].keys

    def load(self, last_tokens: Tensor) -> Callable[[], Decoded]:
        """Makes the next step ready; it is recorded if it is the first of its bucket."""
        self._step.load(last_tokens)
        width = min(bucket(self._cache.window.end + 1), self._cache.capacity)
        if width not in self._replays:
            self._replays[width] = self._capture(partial(self._step.run, width))
        return self._replays[width]
