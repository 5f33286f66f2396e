"""A column of chat messages -> what a chat template takes. Standard library only."""

from __future__ import annotations

import json
import string
from datetime import datetime
from typing import Any

from pipeline.errors import RowError

Message = dict[str, Any]

FIXED_CLOCK = """\
{%- macro strftime_now(format) -%}
{%- set clock = namespace(directive='') -%}
{%- for character in format -%}
{%- set clock.directive = clock.directive + character -%}
{%- if clock.directive not in ('%', '%-') -%}
{{ TABLE.get(clock.directive, clock.directive) }}{%- set clock.directive = '' -%}
{%- endif -%}
{%- endfor -%}
{{ clock.directive }}
{%- endmacro %}
"""
"""Walks over a format, character by character; `TABLE` has each directive's text."""


def checked_messages(column: str, value: object) -> list[Message]:
    """A row's messages, each with a string as its content.

    Args:
        column: the name to give in an error.
        value: as Arrow gives it.

    Raises:
        RowError: `null_column`, or `messages` for anything that is not a conversation that waits
            for an answer.
    """
    if value is None:
        raise RowError("null_column", f"column '{column}' is null")
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise RowError("messages", f"column '{column}' holds {kind}, not a list of messages")
    messages = [_checked_message(index, message) for index, message in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise RowError(
            "messages", "the last message is the assistant's: there is nothing to answer"
        )
    return messages


def _checked_message(index: int, message: object) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError("messages", f"message {index} is not an object with a 'role' and 'content'")
    return {**message, "content": _text_content(index, message.get("content"))}


def _text_content(index: int, content: object) -> str:
    """The content as one string; text parts are joined by newlines, as vLLM's server does."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) and content else [content]
    return "\n".join(_text_part(index, part) for part in parts)


def _text_part(index: int, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RowError("messages", f"message {index}: its content is not text")
    return text


def with_fixed_clock(template: str, now: datetime) -> str:
    """A chat template in which `strftime_now` formats a given moment.

    A macro, since transformers lets no function of a caller into a template: it puts a placeholder
    in its place.

    Args:
        template: as the model has it; one without `strftime_now` comes back as it is.
        now: in the time zone that the template is to show.
    """
    if "strftime_now" not in template:
        return template
    letters = [flag + letter for flag in ("", "-") for letter in string.ascii_letters]
    directives = [f"%{letter}" for letter in ("%", *letters)]
    table = {directive: now.strftime(directive) for directive in directives}
    # The line's end belongs to the macro's last tag, so that the template begins as before.
    return FIXED_CLOCK.replace("TABLE", json.dumps(table)) + template
