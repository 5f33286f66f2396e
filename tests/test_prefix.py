from __future__ import annotations

from pipeline.prefix import MIN_PREFIX_TOKENS, best_prefix, shared_length

LONG = tuple(range(100, 160))


def test_shared_length_counts_from_the_start() -> None:
    """Up to the first difference, or the end of the shorter."""
    assert shared_length((1, 2, 3), (1, 2, 4, 5)) == 2
    assert shared_length((1, 2), (1, 2, 3)) == 2
    assert shared_length((1,), (2,)) == 0
    assert shared_length((), (2,)) == 0


def test_a_prefix_of_most_prompts_is_found_beside_others() -> None:
    """Odd prompts do not hide it, nor is it longer for what some of them share beyond it."""
    prompts = [(*LONG, 1, row) for row in range(6)] + [(*LONG, 2, row) for row in range(6)]
    prompts += [(row,) * 50 for row in range(5)]
    assert best_prefix(prompts) == LONG


def test_a_longer_prefix_of_fewer_wins_if_it_saves_more() -> None:
    """What counts is tokens times the rows that need not compute them."""
    most = LONG[:33]
    prompts = [(*LONG, row) for row in range(10)] + [(*most, 0, row) for row in range(3)]
    assert best_prefix(prompts) == LONG


def test_nothing_is_shared_where_it_is_not_worth_it() -> None:
    """One prompt, short beginnings, and prompts that differ at once."""
    short = LONG[: MIN_PREFIX_TOKENS - 1]
    assert best_prefix([]) == ()
    assert best_prefix([LONG]) == ()
    assert best_prefix([(*short, row) for row in range(9)]) == ()
    assert best_prefix([(row, *LONG) for row in range(9)]) == ()


def test_a_row_keeps_a_token_of_its_own() -> None:
    """Equal prompts share all but their last token, whose logits are needed."""
    assert best_prefix([LONG, LONG]) == LONG[:-1]
