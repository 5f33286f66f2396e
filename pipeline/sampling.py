"""Logits -> token, one setting and one source of chance per row.

The filters are those of transformers, in its order and with its rounding: repetition penalty,
min_new_tokens, temperature, top-k, top-p, min-p. Chance is a function of a row's key and the
number of the token, with no state, so that a sample does not depend on batch, worker or attempt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipeline.records import Request, Sampling
from pipeline.stopping import Vocabulary
from pipeline.transfer import to_device

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""Step of SplitMix64 (Steele, Lea and Flood, 2014), whose mixing is used here as a hash."""
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
BROKEN = -1
"""Stands for a token where the logits are not numbers."""


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, or `BROKEN`; (batch,) int64."""
    highest, tokens = logits.max(dim=-1)
    return tokens.masked_fill_(~highest.isfinite(), BROKEN)


def random_key(seed: int, row_id: str, sample: int) -> int:
    """The key of one sample's chance, from 0 to 2**64 - 1."""
    name = f"{seed} {sample} {row_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


class Sampler:
    """Picks the next token of every row of a batch.

    Nothing in it waits for the device: which filters are in use is known from the requests.

    Args:
        requests: one per row of the batch, in order.
        vocabulary: knows the tokens that end a completion.
    """

    def __init__(
        self, requests: Sequence[Request], vocabulary: Vocabulary, device: torch.device
    ) -> None:
        rows = [request.sampling for request in requests]
        self.is_greedy = all(row.temperature == 0 for row in rows)
        self.has_penalty = any(row.repetition_penalty != 1 for row in rows)
        self._max_top_k = max(row.top_k for row in rows)
        self._has_top_p = any(row.top_p < 1 for row in rows)
        self._has_min_p = any(row.min_p > 0 for row in rows)

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return to_device(values, device, dtype)[:, None]  # (batch, 1)

        self._temperature = column([row.temperature or 1.0 for row in rows])
        self._is_sampled = column([row.temperature > 0 for row in rows], torch.bool)
        self._top_k = column([row.top_k for row in rows], torch.int64)
        # Below 0 keeps even tokens whose probability has been rounded to 0.
        self._top_p_cut = column([1 - row.top_p if row.top_p < 1 else -1.0 for row in rows])
        self._min_p = column([row.min_p for row in rows])
        self._penalty = column([row.repetition_penalty for row in rows])
        self._early = _Early(rows, vocabulary, device)
        keys = [_signed(request.random_key) for request in requests]
        self._keys = to_device(keys, device, torch.int64)

    def process(self, logits: Tensor, step: int | Tensor = 0, seen: Tensor | None = None) -> Tensor:
        """Penalized, scaled and filtered scores; what is filtered out is -inf.

        Args:
            logits: (batch, vocabulary) float32.
            step: how many tokens the row has so far, one number for all or (batch,).
            seen: (batch, vocabulary) bool, the tokens of each row's prompt and completion;
                needed if `has_penalty`.
        """
        scores = logits
        if self.has_penalty:
            assert seen is not None, "a repetition penalty needs the tokens seen so far"
            penalized = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
            scores = torch.where(seen, penalized, scores)
        scores = self._early.without_endings(scores, step)
        if self.is_greedy:
            return scores
        scores = scores / self._temperature
        if self._max_top_k:
            scores = self._filter_top_k(scores)
        if self._has_top_p:
            scores = self._filter_top_p(scores)
        if self._has_min_p:
            scores = self._filter_min_p(scores)
        return scores

    def pick(self, scores: Tensor, step: int | Tensor) -> Tensor:
        """The token of each row, (batch,) int64.

        Args:
            scores: from `process`, (batch, vocabulary).
            step: as for `process`.
        """
        best = scores.argmax(dim=-1)
        if self.is_greedy:
            return best
        drawn = draw(scores.softmax(dim=-1), uniform(self._keys, step))
        return torch.where(self._is_sampled[:, 0], drawn, best)

    def _filter_top_k(self, scores: Tensor) -> Tensor:
        max_top_k = min(self._max_top_k, scores.shape[-1])
        highest = scores.topk(max_top_k).values
        lowest_kept = highest.gather(1, (self._top_k - 1).clamp(0, max_top_k - 1))
        return scores.masked_fill((scores < lowest_kept) & (self._top_k > 0), -torch.inf)

    def _filter_top_p(self, scores: Tensor) -> Tensor:
        ascending, order = scores.sort(descending=False)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= self._top_p_cut
        removed[:, -1] = False
        return scores.masked_fill(removed.scatter(1, order, removed), -torch.inf)

    def _filter_min_p(self, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        threshold = self._min_p * probabilities.amax(dim=-1, keepdim=True)
        return scores.masked_fill(probabilities < threshold, -torch.inf)


class _Early:
    """Keeps rows from ending before their `min_new_tokens`."""

    def __init__(
        self, rows: Sequence[Sampling], vocabulary: Vocabulary, device: torch.device
    ) -> None:
        minimum = [row.min_new_tokens for row in rows]
        self._has_any = any(minimum)
        self._minimum = to_device(minimum, device)
        self._endings = [vocabulary.ending_ids(row) if row.min_new_tokens else () for row in rows]
        self._is_ending: Tensor | None = None

    def without_endings(self, scores: Tensor, step: int | Tensor) -> Tensor:
        """The scores, -inf for tokens that would end a row too early."""
        if not self._has_any:
            return scores
        if self._is_ending is None:
            self._is_ending = marked(self._endings, scores.shape[-1], scores.device)
        is_early = (step < self._minimum)[:, None]
        return scores.masked_fill(self._is_ending & is_early, -torch.inf)


def marked(rows: Sequence[Iterable[int]], num_tokens: int, device: torch.device) -> Tensor:
    """Which tokens each row has; (rows, `num_tokens`) bool.

    Others are left out: some models have tokens that they can read and not write.
    """
    places = {
        row * num_tokens + token
        for row, tokens in enumerate(rows)
        for token in tokens
        if token < num_tokens
    }
    marks = torch.zeros(len(rows) * num_tokens, dtype=torch.bool, device=device)
    marks.index_fill_(0, to_device(list(places), device, torch.int64), True)
    return marks.view(len(rows), num_tokens)


def uniform(keys: Tensor, step: int | Tensor) -> Tensor:
    """Numbers from 0 to below 1 in float64, one per key: SplitMix64's output `step` of each key.

    Args:
        keys: (batch,) int64.
        step: at least 0, one number for all or (batch,) int64.
    """
    number = torch.ones_like(keys) + step
    mixed = keys + number * _signed(GOLDEN_GAMMA)  # int64 wraps around, as it should
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(MIX_1)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(MIX_2)
    mixed = mixed ^ _shift_right(mixed, 31)
    return _shift_right(mixed, 11).double() * 2.0**-53


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative probability passes the row's number; (batch,) int64.

    Never a token of probability 0, whatever rounding does: a parallel sum need not even be
    monotonic.

    Args:
        probabilities: (batch, vocabulary), not all 0.
        uniforms: (batch,) float64, from 0 to below 1.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    cumulative = cumulative.masked_fill(probabilities == 0, 0.0)
    # Below the maximum even when rounded: a uniform is at most 1 - 2**-53.
    target = uniforms * cumulative.amax(dim=-1)
    return (cumulative > target[:, None]).byte().argmax(dim=-1)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shifts zeros in, where `>>` on a signed type would copy the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value
