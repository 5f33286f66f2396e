"""How far two models give the same answers, and how often one is right. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.measured import Answer


@dataclass(frozen=True, slots=True)
class Agreement:
    """One model's answers held against the reference's.

    Attributes:
        num_compared: rows that both have answered.
        num_same: of these, the ones with the same text.
        first_difference: of the others, which token is the first to differ, from 1; the median.
            None if there are none.
        share_before: the part of the reference's tokens before it, from 0 to 1; the median.
    """

    num_compared: int
    num_same: int
    first_difference: float | None
    share_before: float | None

    @property
    def share(self) -> float | None:
        """Of the compared rows, those with the same text; None of nothing."""
        return self.num_same / self.num_compared if self.num_compared else None


@dataclass(frozen=True, slots=True)
class Score:
    """How often the text is what is expected, spaces around both left out.

    Attributes:
        num_scored: rows that expect something; one that failed is among them, and wrong.
        num_lost: rows that the reference has right and this one wrong.
        num_gained: the other way round.
    """

    num_scored: int
    num_right: int
    num_lost: int
    num_gained: int


def agreement(reference: Sequence[Answer], answers: Sequence[Answer]) -> Agreement:
    """Compares answers to the same rows, in the same order."""
    pairs = [
        (right, other)
        for right, other in zip(reference, answers, strict=True)
        if right.text is not None and other.text is not None
    ]
    differing = [(right.ids, other.ids) for right, other in pairs if right.text != other.text]
    equal = [_num_equal(*ids) for ids in differing]
    shares = [num / max(1, len(ids)) for num, (ids, _) in zip(equal, differing, strict=True)]
    return Agreement(
        num_compared=len(pairs),
        num_same=len(pairs) - len(differing),
        first_difference=1 + median(equal) if equal else None,
        share_before=median(shares) if shares else None,
    )


def score(
    reference: Sequence[Answer], answers: Sequence[Answer], expected: Mapping[str, str]
) -> Score:
    """Counts right answers.

    Args:
        expected: by row id; rows that are not in it are not scored.
    """
    pairs = [
        (_is_right(right, expected), _is_right(other, expected))
        for right, other in zip(reference, answers, strict=True)
        if right.row_id in expected
    ]
    return Score(
        num_scored=len(pairs),
        num_right=sum(is_right for _, is_right in pairs),
        num_lost=sum(was_right and not is_right for was_right, is_right in pairs),
        num_gained=sum(is_right and not was_right for was_right, is_right in pairs),
    )


def _is_right(answer: Answer, expected: Mapping[str, str]) -> bool:
    return answer.text is not None and answer.text.strip() == expected[answer.row_id].strip()


def _num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(one, other, strict=False)
    different = (number for number, (mine, theirs) in enumerate(pairs) if mine != theirs)
    return next(different, min(len(one), len(other)))
