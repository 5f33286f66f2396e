"""Durations as people write them: `90`, `45s`, `30m`, `2h`, `1h30m`, `2d`."""

from __future__ import annotations

import re

_PATTERN = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", re.ASCII)


def parse_duration(text: str) -> float:
    """The seconds of a duration.

    Raises:
        ValueError: it is none.
    """
    match = _PATTERN.fullmatch(text.strip())
    if not match or not match[0]:
        raise ValueError(f"'{text}' is no duration such as 45s, 30m, 2h or 1h30m")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
