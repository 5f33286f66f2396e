"""The five fields of a crontab, as both cron and Kubernetes understand them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_STAR = re.compile(r"\*(/0*1)?")
_ITEM = re.compile(r"(?:\*|(\w+)(?:-(\w+))?)(/\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Field:
    """What may stand in a field.

    Attributes:
        names: of `first`, the number after it, and so on.
    """

    name: str
    first: int
    last: int
    names: tuple[str, ...] = ()

    def check(self, text: str) -> None:
        """Refuses what no scheduler takes, or what one takes otherwise than another."""
        for item in text.split(","):
            found = _ITEM.fullmatch(item)
            if found is None:
                raise ValueError(f"has '{item}' as {self.name}: {self._range()}, or *")
            first, last, step = found.groups()
            numbers = [self._number(word) for word in (first, last) if word is not None]
            if numbers != sorted(numbers):
                raise ValueError(f"has '{item}' as {self.name}, which goes backwards")
            if step is not None and int(step[1:]) == 0:
                raise ValueError(f"has '{item}' as {self.name}, a step of 0")
            if step is not None and len(numbers) == 1:  # cron would quietly leave the step out
                wish = f"{first}-{self.last}{step}"
                raise ValueError(f"has '{item}' as {self.name}; write {wish}")

    def _number(self, word: str) -> int:
        if word.lower() in self.names:
            return self.first + self.names.index(word.lower())
        if not word.isdecimal() or not self.first <= int(word) <= self.last:
            raise ValueError(f"has '{word}' as {self.name}: {self._range()}")
        return int(word)

    def _range(self) -> str:
        named = f", {self.names[0]} to {self.names[-1]}" if self.names else ""
        return f"it goes from {self.first} to {self.last}{named}"


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of the week", 0, 6, _DAYS),
)


def parse_schedule(text: str) -> str:
    """The fields with one space between two.

    Raises:
        ValueError: with what follows the setting's name in a sentence.
    """
    words = text.split()
    if len(words) != len(_FIELDS):
        raise ValueError(f"must be five fields as in a crontab, such as '0 2 * * *', got '{text}'")
    for field, word in zip(_FIELDS, words, strict=True):
        field.check(word)
    _check_days(words[2], words[4])
    return " ".join(words)


def _check_days(of_month: str, of_week: str) -> None:
    """Refuses two day fields that cron and Kubernetes put together in different ways.

    Either wants both days to be right if one field has a star, else one of them is enough. But for
    cron it is the field's first character that counts (Vixie's cron and cronie), for Kubernetes
    any item of the list, and only without a step (robfig/cron).
    """
    days = (of_month, of_week)
    in_cron = any(day.startswith("*") for day in days)
    in_kubernetes = any(_STAR.fullmatch(item) for day in days for item in day.split(","))
    if in_cron != in_kubernetes:
        both, either = ("cron", "Kubernetes") if in_cron else ("Kubernetes", "cron")
        raise ValueError(
            f"has '{of_month}' as day of the month and '{of_week}' as day of the week: {both} "
            f"starts on days that are both, {either} on days that are either; make one of the two "
            "a *"
        )
