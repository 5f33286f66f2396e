"""A decode step whose shapes and addresses stay the same, so that it can be recorded once.

All slots are computed, whether a row is in them or not; the columns are a bucket's; what changes
from step to step is in tensors that are filled before the step and never replaced. A slot without
a row sees only the column that it writes itself: nothing seen at all would be NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.fixed_cache import fixed_cache
from pipeline.forward import Forward
from pipeline.sampling import greedy
from pipeline.slots import SlotCache


class Decoded(NamedTuple):
    """What a decode step gives.

    Attributes:
        logits: (rows, vocabulary), in the model's type.
        best: the most likely tokens, or `BROKEN`; (rows,) int64.
    """

    logits: Tensor
    best: Tensor


class FixedStep:
    """The decode step of a cache's buffers as they are now.

    Args:
        cache: has its buffers; once it has others, this is of no use.
    """

    def __init__(self, forward: Forward, cache: SlotCache) -> None:
        self._forward = forward
        self._cache = cache
        slots = (cache.num_slots, 1)
        device = forward.device
        self._input_ids = torch.empty(slots, dtype=torch.int64, device=device)
        self._starts = torch.empty(slots, dtype=torch.int64, device=device)
        self._column = torch.empty(1, dtype=torch.int64, device=device)
        self._loaded_starts: Tensor | None = None
        self._decoded: Decoded | None = None

    def load(self, last_tokens: Tensor) -> None:
        """Fills in what the next step is about.

        Args:
            last_tokens: of the rows in the first slots, (rows,) int64.
        """
        num_rows = len(last_tokens)
        starts = self._cache.starts_on(self._forward.device)
        if starts is not self._loaded_starts:
            self._starts.fill_(self._cache.capacity)  # right of any column: no row
            self._starts[:num_rows] = starts
            self._input_ids.fill_(self._forward.pad_id)
            self._loaded_starts = starts
        self._input_ids[:num_rows, 0] = last_tokens
        self._column.fill_(self._cache.window.end)

    def run(self, width: int) -> Decoded:
        """Computes what is loaded, for all slots; to do it again changes nothing.

        Args:
            width: columns of the bucket; more than the window's end.

        Returns:
            the same tensors each time: a recorded step keeps what it gives, and there are many.
        """
        starts = self._starts.minimum(self._column)
        columns = torch.arange(width, device=self._forward.device)
        logits = self._forward.logits(
            self._input_ids,
            attention_mask=(columns >= starts) & (columns <= self._column),
            position_ids=self._column - starts,
            cache=fixed_cache(self._cache, self._column, width),
        )
        best = greedy(logits)
        if self._decoded is None:
            self._decoded = Decoded(torch.empty_like(logits), torch.empty_like(best))
        self._decoded.logits.copy_(logits)
        self._decoded.best.copy_(best)
        return self._decoded
