from __future__ import annotations

from pipeline.records import Request, RequestId, Sampling
from pipeline.stopping import Generated, StopStrings, Vocabulary
from pipeline.waiting import Row, Waiting

VOCABULARY = Vocabulary(lambda ids: "", 10, {}, frozenset())


def row_of(length: int) -> Row:
    """A row with a prompt of so many tokens."""
    request = Request(RequestId(0, 0, 0), (1,) * length, Sampling(max_new_tokens=4))
    return Row(request, Generated(request, StopStrings((), VOCABULARY), VOCABULARY))


def lengths(rows: list[Row]) -> list[int]:
    """By which the rows of a test are told apart."""
    return [row.length for row in rows]


def test_the_longest_of_the_oldest_come_first() -> None:
    """And none waits for longer than the run it is in: later ones, however long, come after."""
    waiting = Waiting(num_lookahead=3)
    for length in (2, 5, 3, 9, 1, 8):
        waiting.add(row_of(length))
    assert lengths(waiting.head(2)) == [5, 3]
    assert lengths(waiting.take(2)) == [5, 3]
    waiting.add(row_of(20))
    assert lengths(waiting.head(5)) == [2]
    waiting.take(1)
    assert lengths(waiting.head(5)) == [9, 8, 1]
    assert len(waiting) == 4


def test_rows_that_have_been_taken_are_not_withdrawn() -> None:
    """They have tokens by now; what is left keeps its order."""
    waiting = Waiting(num_lookahead=2)
    for length in (4, 3, 2, 1):
        waiting.add(row_of(length))
    waiting.head(1)
    waiting.put_back(waiting.take(1))
    everything = {RequestId(0, 0, 0)}
    assert len(waiting.unstarted()) == 3
    assert sorted(lengths(waiting.withdraw(everything))) == [1, 2, 3]
    assert waiting.withdraw(everything) == waiting.unstarted() == []
    assert lengths(waiting.head(4)) == [4]


def test_rows_put_back_are_next_and_keep_their_number() -> None:
    """So the row that came first is never the one that has to go again and again."""
    waiting = Waiting(num_lookahead=4)
    for length in (4, 3, 2, 1):
        waiting.add(row_of(length))
    waiting.head(4)
    first, second, third = waiting.take(3)
    waiting.put_back([second, third])
    waiting.head(3)
    assert waiting.take(3)[:2] == [second, third]
    assert [first.number, second.number, third.number] == [0, 1, 2]
    second.generated.add(5)
    assert second.tokens == (1, 1, 1, 5)
    assert second.length == 4
