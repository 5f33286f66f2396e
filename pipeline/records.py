"""The plain values that travel from stage to stage. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class FinishReason(str, Enum):
    """Why a completion ended."""

    STOP = "stop"  # end-of-sequence token or stop string
    LENGTH = "length"  # max_new_tokens reached
    ERROR = "error"  # the row could not be done


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of rows of one input file, or some of them: handed out and retried as one.

    Attributes:
        index: position in the job's plan; shards in this order give the input's order.
        path: the Parquet file to read.
        name: how `row_id` names the file.
        first_row: the shard's first row in that file, from 0.
        num_rows: at least 1.
        chosen: the positions to generate, as rising (first, end) pairs; None is all of them.
    """

    index: int
    path: str
    name: str
    first_row: int
    num_rows: int
    chosen: tuple[tuple[int, int], ...] | None = None

    def row_id(self, row: int) -> str:
        """The stable name of the shard's `row`-th row, counted from 0 within the shard."""
        return f"{self.name}#{self.first_row + row}"

    def wanted(self, positions: Iterable[int]) -> list[int]:
        """Those of `positions` that are to be generated."""
        if self.chosen is None:
            return list(positions)
        chosen = {position for first, end in self.chosen for position in range(first, end)}
        return [position for position in positions if position in chosen]


@dataclass(frozen=True, slots=True)
class RowRange:
    """Some consecutive rows of a shard, run apart from its others.

    Attributes:
        first: within the shard, from 0.
        end: not included.
        error: `kind: message`, if they shall become error rows instead of being generated.
    """

    first: int
    end: int
    error: str | None = None

    def __contains__(self, row: int) -> bool:
        return self.first <= row < self.end


class RequestId(NamedTuple):
    """Which completion of a job this is."""

    shard: int
    row: int  # within the shard
    sample: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request is generated, with nothing left open.

    Attributes:
        max_new_tokens: at least 1; the end-of-sequence token counts.
        stop: strings that end the completion; they are not part of it.
        stop_token_ids: tokens that end it likewise.
        include_stop: the stop string, or the stop token's text, is part of it after all.
        min_new_tokens: so many tokens come before one that ends it or completes a stop string.
        ignore_eos: an end-of-sequence token is one like the others.
        temperature: 0 is greedy, and then top_k, top_p and min_p mean nothing.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    min_new_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to be generated.

    Attributes:
        prompt_ids: token ids, at least one, special tokens included.
        random_key: 64 bits drawn from seed, row id and sample: the only source of chance, so
            that a sample does not depend on batch, worker or attempt.
        adapter: name of the one that the row has chosen; empty is none, or the only one.
    """

    id: RequestId
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    random_key: int = 0
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of a request.

    Attributes:
        text: without the stop string, unless it was asked for, and without special tokens; None
            on an error.
        stop_reason: the stop string that ended it, or the id of the stop token in decimal; None
            for end-of-sequence, length and error.
        num_completion_tokens: tokens generated, the ending one included.
        error: `kind: message`, or None.
    """

    id: RequestId
    text: str | None
    finish_reason: FinishReason
    stop_reason: str | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    error: str | None = None
