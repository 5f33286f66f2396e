"""The rows that are being generated: their cache, their last tokens, how the next are chosen."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pipeline.bands import grouped_order
from pipeline.decoder import Decoder
from pipeline.fixed_step import Decoded
from pipeline.sampling import BROKEN, Sampler, greedy, marked
from pipeline.slots import SlotCache
from pipeline.stopping import Vocabulary
from pipeline.transfer import Readback, to_device
from pipeline.waiting import Row


class Picker:
    """Chooses the next tokens of a fixed set of rows.

    Args:
        last_tokens: the last token of each row, (rows,) int64; None if all are known to the rows.
        unread: rows whose last token is still unknown to them.
        seen: the tokens of each row so far, (rows, vocabulary) bool; None if nobody has marked
            them yet.

    Attributes:
        seen: the same, kept up to date; None as long as nobody needs it.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        vocabulary: Vocabulary,
        device: torch.device,
        last_tokens: Tensor | None = None,
        unread: Collection[Row] = (),
        seen: Tensor | None = None,
    ) -> None:
        self.seen = seen
        self._is_plain = all(_is_plain(row) for row in rows)
        if self._is_plain:
            return
        self._rows = rows
        self._last_tokens = last_tokens
        self._sampler = Sampler([row.requests[0] for row in rows], vocabulary, device)
        self._steps = to_device([len(row.generated.ids) + (row in unread) for row in rows], device)

    def pick(self, decoded: Decoded) -> Tensor:
        """The next token of each row, or `BROKEN`; (rows,) int64.

        Args:
            decoded: of the same rows, one token further at each call.
        """
        if self._is_plain:
            return decoded.best
        tokens = self._sample(decoded.logits.float())
        return tokens.masked_fill_(decoded.best == BROKEN, BROKEN)

    def _sample(self, logits: Tensor) -> Tensor:
        if self._sampler.has_penalty and self.seen is None:
            self.seen = marked([row.tokens for row in self._rows], logits.shape[-1], logits.device)
            if self._last_tokens is not None:
                self.seen.scatter_(1, self._last_tokens[:, None], True)
        scores = self._sampler.process(logits, self._steps, self.seen)
        tokens = self._sampler.pick(scores, self._steps)
        self._steps += 1
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens


def _is_plain(row: Row) -> bool:
    """Whether the row's next token is the one with the highest logit."""
    sampling = row.requests[0].sampling
    is_early = len(row.generated.ids) < sampling.min_new_tokens
    return sampling.temperature == 0 and sampling.repetition_penalty == 1 and not is_early


class Launched:
    """A step whose tokens may still be on their way; those of rows that leave are dropped."""

    def __init__(self, rows: Sequence[Row], tokens: Tensor) -> None:
        self.rows = set(rows)
        self._in_order = list(rows)
        self._tokens = Readback(tokens)

    def read(self) -> list[tuple[Row, int]]:
        """The rows that are still wanted, each with its token or `BROKEN`."""
        pairs = zip(self._in_order, self._tokens.read(), strict=True)
        return [(row, token) for row, token in pairs if row in self.rows]


class Batch:
    """Rows in consecutive slots.

    Args:
        reads_behind: `decode` gives the tokens of the step before the one it launches, so that a
            GPU works while the host looks at them. A row that has ended is then computed once
            more, for nothing.

    Attributes:
        rows: slot by slot.
        cache: holds all tokens of each row but the last.
    """

    def __init__(
        self, decoder: Decoder, vocabulary: Vocabulary, reads_behind: bool = False
    ) -> None:
        self.rows: list[Row] = []
        self.cache = SlotCache(decoder.forward.num_layers, num_slots=0, capacity=0)
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._device = decoder.forward.device
        self._reads_behind = reads_behind
        self._last_tokens = torch.empty(0, dtype=torch.int64, device=self._device)
        self._adapters: list[str] = []
        self._picker: Picker | None = None
        self._seen: Tensor | None = None
        self._unread: Launched | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self) -> list[tuple[Row, int]]:
        """Rows with their next tokens, or `BROKEN`. The cache must have room for a column."""
        tokens = self._launch()
        if self._reads_behind:
            unread, self._unread = self._unread, Launched(self.rows, tokens)
            pairs = unread.read() if unread else []
            # A broken row may be computed once more, and needs a token for that.
            self._last_tokens = tokens.clamp(min=0)
        else:
            pairs = list(zip(self.rows, tokens.tolist(), strict=True))
            self._last_tokens = tokens
        for row, token in pairs:
            if token == BROKEN:
                self.cache.blank(self.rows.index(row))
        return pairs

    def _launch(self) -> Tensor:
        """Starts a step; its tokens are there when they are read."""
        if self._picker is None:
            unread = self._unread.rows if self._unread else ()
            self._picker = Picker(
                self.rows, self._vocabulary, self._device, self._last_tokens, unread, self._seen
            )
            self._adapters = [row.adapter for row in self.rows]
        return self._picker.pick(self._decoder(self._last_tokens, self.cache, self._adapters))

    def append(self, rows: Sequence[Row], prefilled: SlotCache, sources: Sequence[int]) -> None:
        """Takes rows in, whose last token is not in the prefilled cache.

        Args:
            sources: the row of the prefilled cache that each copies.
        """
        self.cache.append(prefilled, sources)
        self._add(rows)

    def begin_with(self, rows: Sequence[Row], prefilled: SlotCache) -> None:
        """Takes in the first rows, with the very cache that they were prefilled into."""
        assert not self.rows, "the rows that there are have another cache"
        self.cache = prefilled
        self._add(rows)

    def _add(self, rows: Sequence[Row]) -> None:
        added = to_device([row.generated.ids[-1] for row in rows], self._device)
        self._last_tokens = torch.cat([self._last_tokens, added])
        self._drop_picker()
        if self._seen is not None:
            tokens = [row.tokens for row in rows]
            self._seen = torch.cat([self._seen, marked(tokens, self._seen.shape[1], self._device)])
        self.rows.extend(rows)
        self._group_by_length()

    def _group_by_length(self) -> None:
        """Moves rows where attention gains by it."""
        order = grouped_order(self.cache.lengths) if self._decoder.forward.has_bands else None
        if order is not None:
            self.cache.reorder(order)
            self._take_order(order)

    def by_age(self) -> list[Row]:
        """The rows, the one that has had a slot first in front."""
        return sorted(self.rows, key=lambda row: row.number)

    def remove(self, slots: Collection[int]) -> None:
        """Takes rows out; others move into their slots."""
        num_rows = len(self.rows)
        leaving = [self.rows[slot] for slot in slots]
        order = self.cache.keep([slot for slot in range(num_rows) if slot not in slots])
        self._take_order(order)
        if self._unread is not None:
            self._unread.rows.difference_update(leaving)
            # The unread step may have left there what is not a number.
            for slot in range(len(order), num_rows):
                self.cache.blank(slot)

    def _take_order(self, order: Sequence[int]) -> None:
        """Follows the cache, in which each slot now has the row of the given one."""
        slots = to_device(order, self._device, torch.int64)
        self.rows = [self.rows[slot] for slot in order]
        self._last_tokens = self._last_tokens[slots]
        self._drop_picker()
        if self._seen is not None:
            self._seen = self._seen[slots]

    def _drop_picker(self) -> None:
        """Lets go of what is made for the rows as they were, but for the tokens they have seen."""
        if self._picker is not None:
            self._seen, self._picker = self._picker.seen, None


def pick_first(rows: Sequence[Row], vocabulary: Vocabulary, logits: Tensor) -> list[int]:
    """The token after each row, or `BROKEN`, from the prompts' logits, (rows, vocabulary)."""
    picker = Picker(rows, vocabulary, logits.device)
    tokens: list[int] = picker.pick(Decoded(logits, greedy(logits))).tolist()
    return tokens
