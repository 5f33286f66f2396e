"""`model.adapter`: one LoRA adapter for all rows, or several that a column chooses from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, model_validator

from pipeline.block import WordOrBlock


class AdapterSettings(WordOrBlock, word="path"):
    """LoRA on top of the model: `path` for all rows, or `column` and `paths` for each its own."""

    path: str | None = Field(
        default=None, description="Folder or hub id of the adapter; a hub id may end in @revision."
    )
    merge: bool = Field(
        default=False,
        description="Add the adapter to the weights: as fast as without, but a quantized model is "
        "rounded again.",
    )
    column: str | None = Field(
        default=None,
        description="Input column with the name of each row's adapter; null or empty is none.",
    )
    paths: Mapping[Annotated[str, Field(min_length=1)], str] | None = Field(
        default=None, description="Name in the column -> folder or hub id."
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> AdapterSettings:
        if (self.path is None) == (self.paths is None):
            raise ValueError("needs exactly one of 'path' and 'paths'")
        if (self.paths is None) != (self.column is None):
            raise ValueError("needs 'column' and 'paths' together, or neither")
        if self.paths is not None and (self.merge or not self.paths):
            raise ValueError("can merge one adapter by 'path', and needs at least one in 'paths'")
        return self

    @property
    def named_paths(self) -> dict[str, str]:
        """Name -> folder or hub id; a single one has the name `""`."""
        return dict(self.paths) if self.paths is not None else {"": self.path or ""}
