"""What every block of a job file has in common."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Settings(BaseModel):
    """A block of the job file: frozen, and nothing in it is unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class WordOrBlock(Settings):
    """A block of which the job file may give one setting alone, as a plain text.

    Args of a subclass:
        word: that setting.
    """

    _word: ClassVar[str]

    def __init_subclass__(cls, word: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._word = word

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: object) -> object:
        return {cls._word: value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        block = handler.resolve_ref_schema(handler(core_schema))
        return {"anyOf": [block["properties"][cls._word], block]}
