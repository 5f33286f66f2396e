"""What an engine has done so far. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple


class PrefillCounts(NamedTuple):
    """Tokens of one batch of prompts.

    Attributes:
        worked: through by the model, those of a prefix computed for the batch included.
        padding: computed beside them, only because the rows differ in length.
        saved: copied, from a shared prefix or an equal prompt, less what the prefix took.
    """

    worked: int
    padding: int
    saved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """A moment's figures; they only grow.

    Attributes:
        num_steps: decode steps, each a token for every live row.
        num_slot_steps: slots, summed over the steps.
        num_live_slot_steps: slots that held a row, summed over the steps.
        num_prefilled_tokens, num_padding_tokens, num_saved_tokens: see `PrefillCounts`.
        num_generated_tokens: repeated work included.
        num_window_moves: times the window was moved within the buffers, or to other ones.
        num_put_back: rows that lost their slot to longer ones, to be continued later.
        num_out_of_memory: times memory ran out.
    """

    num_steps: int = 0
    num_slot_steps: int = 0
    num_live_slot_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_prefilled_tokens: int = 0
    num_padding_tokens: int = 0
    num_saved_tokens: int = 0
    num_generated_tokens: int = 0
    num_window_moves: int = 0
    num_put_back: int = 0
    num_out_of_memory: int = 0

    def __add__(self, other: EngineMetrics) -> EngineMetrics:
        """Of two engines together."""
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
        }
        return EngineMetrics(**sums)

    @property
    def slot_occupancy(self) -> float:
        """Share of the slots that held a row, from 0 to 1."""
        return self.num_live_slot_steps / max(1, self.num_slot_steps)

    @property
    def padding_share(self) -> float:
        """Share of what prefill computed that no row needed, from 0 to 1."""
        num_computed = self.num_prefilled_tokens + self.num_padding_tokens
        return self.num_padding_tokens / max(1, num_computed)

    def after_decode(self, num_slots: int, num_live: int, seconds: float) -> EngineMetrics:
        """With one more step, which gave each live row a token."""
        return replace(
            self,
            num_steps=self.num_steps + 1,
            num_slot_steps=self.num_slot_steps + num_slots,
            num_live_slot_steps=self.num_live_slot_steps + num_live,
            num_generated_tokens=self.num_generated_tokens + num_live,
            decode_seconds=self.decode_seconds + seconds,
        )

    def after_prefill(self, num_rows: int, counts: PrefillCounts, seconds: float) -> EngineMetrics:
        """With one more batch of prompts, which gave each row its first token."""
        return replace(
            self,
            num_prefilled_tokens=self.num_prefilled_tokens + counts.worked,
            num_padding_tokens=self.num_padding_tokens + counts.padding,
            num_saved_tokens=self.num_saved_tokens + counts.saved,
            num_generated_tokens=self.num_generated_tokens + num_rows,
            prefill_seconds=self.prefill_seconds + seconds,
        )

    def plus(self, *, put_back: int = 0, out_of_memory: int = 0) -> EngineMetrics:
        """With more of what happens now and then."""
        return replace(
            self,
            num_put_back=self.num_put_back + put_back,
            num_out_of_memory=self.num_out_of_memory + out_of_memory,
        )
