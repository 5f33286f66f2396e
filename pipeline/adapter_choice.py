"""Which adapter a row has chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import RowError
from pipeline.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """The column that rows choose by, and what they may choose; nothing if there is no choice."""

    column: str | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: ModelSettings) -> AdapterChoice:
        """The choice that the model block of a job gives."""
        adapter = settings.adapter
        if adapter is None or adapter.column is None:
            return cls()
        return cls(adapter.column, tuple(adapter.named_paths))

    @property
    def columns(self) -> tuple[str, ...]:
        """What a row must have."""
        return () if self.column is None else (self.column,)

    def made_by(self, row: Mapping[str, object]) -> str:
        """The name of the row's adapter; empty is none.

        Raises:
            RowError: `adapter`, as there is none of that name.
        """
        value = None if self.column is None else row[self.column]
        if value is None or value == "":
            return ""
        if value not in self.names:
            known = ", ".join(map(repr, self.names))
            raise RowError("adapter", f"column '{self.column}' has {value!r}; there are {known}")
        return str(value)
