"""What differs between the job a folder was started with and the one that is to run now."""

from __future__ import annotations

import json
from collections.abc import Mapping

MOST_LINES = 20
WIDTH = 60


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """A line `name: old -> new` for each differing field; what is long is cut around the change."""
    names = [name for name in {**old, **new} if _text(old, name) != _text(new, name)]
    lines = [f"{name}: {_change(_text(old, name), _text(new, name))}" for name in names]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"… and {len(lines) - MOST_LINES} more"]
    return lines


def _text(fields: Mapping[str, object], name: str) -> str:
    return json.dumps(fields[name], ensure_ascii=False) if name in fields else "(absent)"


def _change(old: str, new: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
        min(len(old), len(new)),
    )
    return f"{_cut(old, same)} -> {_cut(new, same)}"


def _cut(text: str, important: int) -> str:
    first = 0 if important < WIDTH // 2 else important - WIDTH // 3
    shown = text[first : first + WIDTH]
    end = "…" + '"' * text.endswith('"') if first + WIDTH < len(text) else ""
    return '"' * (bool(first) and text.startswith('"')) + "…" * bool(first) + shown + end
