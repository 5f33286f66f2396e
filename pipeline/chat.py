"""A column of chat messages -> what a chat template takes. Standard library only."""

from __future__ import annotations

from typing import Any

from pipeline.errors import RowError

Message = dict[str, Any]


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
