"""A page of facts and tables: as text for a terminal, or as HTML by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of equal length.

    Attributes:
        header: empty for none.
        num_names: first columns that name a row; they stand on the left, figures on the right.
    """

    title: str
    header: Row
    rows: tuple[Row, ...]
    num_names: int = 1

    def is_name(self, place: int) -> bool:
        """Whether a column names its row."""
        return place < self.num_names


@dataclass(frozen=True, slots=True)
class Page:
    """What there is to say, from top to bottom; notes explain the tables and come last."""

    title: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()


def page_text(page: Page) -> str:
    """For a terminal."""
    blocks = [_block(Table(page.title, (), page.facts, 2))]
    blocks += map(_block, page.tables)
    if page.notes:
        blocks.append("\n".join(page.notes))
    return "\n\n".join(blocks)


def _block(table: Table) -> str:
    rows = [table.header, *table.rows] if table.header else [*table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join([table.title, *(_line(table, row, widths) for row in rows)])


def _line(table: Table, row: Row, widths: Sequence[int]) -> str:
    cells = [
        f"{cell:<{width}}" if table.is_name(place) else f"{cell:>{width}}"
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return ("  " + "  ".join(cells)).rstrip()


def mebibytes(num_bytes: int) -> str:
    """Of a size, with a digit behind the point where it is small."""
    size = num_bytes / 2**20
    return f"{size:,.1f}" if size < 100 else f"{size:,.0f}"


def rate(value: float | None) -> str:
    """Tokens a second, to three digits where they are few."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
