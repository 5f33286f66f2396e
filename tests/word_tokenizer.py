"""A tokenizer for tests that have no use for a real one."""

from __future__ import annotations

from typing import Any


class WordTokenizer:
    """A fake with one token for each word."""

    bos_token_id = None

    def __call__(self, text: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * len(one.split()) for one in text]}

    def get_chat_template(self) -> str:
        raise ValueError

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        raise NotImplementedError
