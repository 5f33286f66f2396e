"""The rows that are being generated: their cache, their last tokens, how the next are chosen."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pipeline.forward import Forward
from pipeline.sampling import Sampler
from pipeline.slots import SlotCache
from pipeline.waiting import Row

BROKEN = -1
"""Stands for a token where the logits are not numbers."""


class Picker:
    """Chooses the next tokens of a fixed set of rows."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        settings = [row.requests[0].sampling for row in rows]
        self._is_plain = all(s.temperature == 0 and s.repetition_penalty == 1 for s in settings)
        if self._is_plain:
            return
        self._rows = rows
        self._sampler = Sampler([row.requests[0] for row in rows], device)
        self._steps = torch.tensor([len(row.generated.ids) for row in rows], device=device)
        self._seen: Tensor | None = None

    def pick(self, logits: Tensor) -> Tensor:
        """The next token of each row, or `BROKEN`; (rows,) int64.

        Args:
            logits: (rows, vocabulary); those of the same row one token further at each call.
        """
        highest, tokens = logits.max(dim=-1)
        if not self._is_plain:
            tokens = self._sample(logits.float())
        return tokens.masked_fill_(~highest.isfinite(), BROKEN)

    def _sample(self, logits: Tensor) -> Tensor:
        if self._sampler.has_penalty and self._seen is None:
            self._seen = _tokens_seen(self._rows, logits)
        tokens = self._sampler.pick(self._sampler.process(logits, self._seen), self._steps)
        self._steps += 1
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens


class Batch:
    """Rows in consecutive slots.

    Attributes:
        rows: slot by slot.
        cache: holds all tokens of each row but the last.
    """

    def __init__(self, forward: Forward) -> None:
        self.rows: list[Row] = []
        self.cache = SlotCache(forward.num_layers, num_slots=0, capacity=0)
        self._forward = forward
        self._last_tokens = torch.empty(0, dtype=torch.int64, device=forward.device)
        self._picker: Picker | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self) -> list[int]:
        """The next token of each row, or `BROKEN`. The cache must have room for a column."""
        if self._picker is None:
            self._picker = Picker(self.rows, self._forward.device)
        logits = self._forward(self._last_tokens[:, None], self.cache)
        self._last_tokens = self._picker.pick(logits)
        tokens: list[int] = self._last_tokens.tolist()
        for slot, token in enumerate(tokens):
            if token == BROKEN:
                self.cache.blank(slot)
        return tokens

    def append(self, rows: Sequence[Row], prefilled: SlotCache, sources: Sequence[int]) -> None:
        """Takes rows in, whose last token is not in the prefilled cache.

        Args:
            sources: the row of the prefilled cache that each copies.
        """
        self.cache.append(prefilled, sources)
        self.rows.extend(rows)
        last = [row.generated.ids[-1] for row in rows]
        added = torch.tensor(last, device=self._last_tokens.device)
        self._last_tokens = torch.cat([self._last_tokens, added])
        self._picker = None

    def by_age(self) -> list[Row]:
        """The rows, the one that has had a slot first in front."""
        return sorted(self.rows, key=lambda row: row.number)

    def remove(self, slots: Collection[int]) -> None:
        """Takes rows out; others move into their slots."""
        order = self.cache.keep([slot for slot in range(len(self.rows)) if slot not in slots])
        self.rows = [self.rows[slot] for slot in order]
        self._last_tokens = self._last_tokens[order]
        self._picker = None


def _tokens_seen(rows: Sequence[Row], logits: Tensor) -> Tensor:
    """Which tokens each row has in prompt and completion; (rows, vocabulary) bool."""
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    for slot, row in enumerate(rows):
        # Prompt tokens beyond the logits cannot be generated.
        ids = [token for token in row.tokens if token < logits.shape[-1]]
        seen[slot, ids] = True
    return seen
