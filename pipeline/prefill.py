"""Waiting rows -> their prompts' keys and values, and logits for their next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pipeline.forward import Forward
from pipeline.metrics import PrefillCounts
from pipeline.prefix import shared_length
from pipeline.slots import SlotCache
from pipeline.waiting import Row

MAX_PREFILL_TOKENS = 4096
"""Most positions of one forward pass, unless a single row has more; bounds its memory."""
MAX_PREFILL_COLUMNS = 16384
"""Most positions of which a forward pass keeps keys and values, a prefix counted for each row."""
MIN_FILL = 0.8
"""A row joins a batch if it has this share of the longest row's tokens…"""
FREE_PADDING_TOKENS = 16
"""…or lacks no more than these."""
MIN_REUSE = 0.9
"""A prefix that is there is used if it has this share of the one that is wanted."""


class Part(NamedTuple):
    """Rows that go well into one forward pass.

    Attributes:
        num_shared: tokens that all of them have in common with the shared prefix.
    """

    rows: list[Row]
    num_shared: int


@dataclass(frozen=True)
class Prefilled:
    """What a forward pass over prompts gave.

    Attributes:
        cache: of the different prompts, each once.
        logits: (rows of the part, vocabulary).
        sources: for each row of the part, its row in the cache.
    """

    cache: SlotCache
    logits: Tensor
    sources: list[int]
    counts: PrefillCounts


class Prefiller:
    """Works through prompts, and through a prefix that they share only once."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._active: tuple[int, ...] = ()
        self._stored: tuple[int, ...] = ()
        self._adapter = ""
        self._cache: SlotCache | None = None

    def share(self, prefix: tuple[int, ...], adapter: str = "") -> None:
        """Says what most of the next prompts begin with; it is computed when the first comes.

        Args:
            adapter: whose prompts these are; to others, what is computed is of no use.
        """
        if adapter != self._adapter:
            self.forget()
            self._adapter = adapter
        overlap = shared_length(prefix, self._stored)
        self._active = prefix[:overlap] if overlap >= MIN_REUSE * len(prefix) else prefix

    def forget(self) -> None:
        """Frees the prefix, and shares none until told again."""
        self._active, self._stored, self._cache = (), (), None

    def next_part(self, rows: Sequence[Row], max_columns: int | None = None) -> Part:
        """The first of these rows: as many as are alike in length and in the prefix.

        Args:
            max_columns: as many of their keys and values as there is memory for; None if nobody
                knows, which the first row has to show by itself.
        """
        num_shared = self._num_shared(rows[0])
        longest = rows[0].length
        width = longest - num_shared
        least = min(MIN_FILL * width, width - FREE_PADDING_TOKENS)
        part: list[Row] = []
        different: set[tuple[tuple[int, ...], str]] = set()
        max_columns = min(MAX_PREFILL_COLUMNS, max_columns or 0)
        most = max(1, min(MAX_PREFILL_TOKENS // width, max_columns // longest))
        for row in rows:
            is_alike = least <= row.length - num_shared and row.length <= longest
            if not is_alike or self._num_shared(row) != num_shared:
                break
            different.add((row.tokens, row.adapter))
            if len(different) > most:
                break
            part.append(row)
        return Part(part, num_shared)

    def run(self, part: Part) -> Prefilled:
        """Computes what the prefix and the rows lack."""
        num_shared = part.num_shared
        num_prefix_tokens = self._compute_prefix() if num_shared else 0
        prompts = [(row.tokens, row.adapter) for row in part.rows]
        different = list(dict.fromkeys(prompts))
        cache, logits = self._forward.prefill(
            [tokens for tokens, _ in different],
            self._cache if num_shared else None,
            num_shared,
            [adapter for _, adapter in different],
        )
        places = {prompt: place for place, prompt in enumerate(different)}
        sources = [places[prompt] for prompt in prompts]
        return Prefilled(
            cache=cache,
            logits=logits[sources],
            sources=sources,
            counts=_count(part.rows, [t for t, _ in different], num_shared, num_prefix_tokens),
        )

    def _num_shared(self, row: Row) -> int:
        length = len(self._active)
        # The last token is computed in any case, for its logits.
        has_room = row.length > length and row.adapter == self._adapter
        return length if has_room and row.tokens[:length] == self._active else 0

    def _compute_prefix(self) -> int:
        """Sees to it that the active prefix is there; how many tokens that took."""
        if self._stored[: len(self._active)] == self._active:
            return 0
        self._cache, _ = self._forward.prefill([self._active], None, 0, [self._adapter])
        self._stored = self._active
        return len(self._active)


def _count(
    rows: Sequence[Row],
    different: Sequence[tuple[int, ...]],
    num_shared: int,
    num_prefix_tokens: int,
) -> PrefillCounts:
    num_needed = sum(len(prompt) - num_shared for prompt in different)
    num_computed = len(different) * (max(map(len, different)) - num_shared)
    num_worked = num_prefix_tokens + num_needed
    return PrefillCounts(
        worked=num_worked,
        padding=num_computed - num_needed,
        saved=sum(row.length for row in rows) - num_worked,
    )
