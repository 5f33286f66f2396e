"""The beginning that most of a run of prompts share. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

MIN_PREFIX_TOKENS = 32
"""Below this, copying costs more than it saves."""


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their start."""
    if first[: len(second)] == second[: len(first)]:
        return min(len(first), len(second))
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def best_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The prefix whose being computed once saves the most tokens; empty if none is worth it.

    Sorted, prompts that share a prefix stand together; so a prefix of more than half of them is
    one of the middle prompt.
    """
    if len(prompts) < 2:
        return ()
    middle = sorted(prompts)[len(prompts) // 2]
    # The last token is always computed, for its logits.
    lengths = [min(shared_length(prompt, middle), len(prompt) - 1) for prompt in prompts]
    long_enough = sorted(filter(MIN_PREFIX_TOKENS.__le__, lengths), reverse=True)
    savings = [(num_others * length, length) for num_others, length in enumerate(long_enough)]
    num_saved, length = max(savings, default=(0, 0))
    return middle[:length] if num_saved else ()
