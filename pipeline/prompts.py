"""Row -> prompt text -> token ids, through the job's template and the model's chat template.

Knows rows as plain Python values; knows neither files nor models, only the model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from typing import Any, Protocol

from pipeline.chat import Message, checked_messages, with_fixed_clock
from pipeline.errors import JobFileError, ModelError, RowError
from pipeline.settings import PromptSettings
from pipeline.template import Template

Row = Mapping[str, object]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> Any:
        """The id of the beginning-of-sequence token, or None."""

    def __call__(self, text: Any, *, add_special_tokens: bool, verbose: bool) -> Any:
        """The token ids of each text of a list, under `input_ids`."""

    def get_chat_template(self) -> str:
        """The chat template; ValueError where there is none."""

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> Any:
        """The conversation as one text, through this chat template."""


def check_prompt(settings: PromptSettings, columns: Sequence[str]) -> tuple[str, ...]:
    """Check the `prompt` block against the input's columns.

    Returns:
        The columns that rendering needs, in the input's order.

    Raises:
        JobFileError: the template is not valid, or a column it names is not there.
    """
    template = _template(settings)
    needed = _columns(settings, template)
    where = "prompt.template" if settings.messages is None else "prompt.messages"
    unknown = set(needed) - set(columns)
    if unknown:
        raise JobFileError(_unknown_column(where, min(unknown), columns))
    hidden = set() if template is None else template.functions & set(columns)
    if hidden:
        raise JobFileError(
            f"{where} uses '{min(hidden)}', which is both a function of Jinja and an input column: "
            "rename the column."
        )
    return tuple(column for column in columns if column in needed)


def _template(settings: PromptSettings) -> Template | None:
    return None if settings.template is None else Template(settings.template)


def _columns(settings: PromptSettings, template: Template | None) -> tuple[str, ...]:
    if template is not None:
        return tuple(sorted(template.columns))
    assert settings.messages is not None, "the settings have one of the two"
    return (settings.messages,)


def _unknown_column(where: str, name: str, columns: Sequence[str]) -> str:
    nearest = get_close_matches(name, columns, n=1)
    hint = f"did you mean '{nearest[0]}'? " if nearest else ""
    there = ", ".join(map(repr, columns))
    return f"{where} names '{name}', which is no input column: {hint}the input has {there}."


class PromptRenderer:
    """Turns rows into token ids.

    Args:
        settings: checked by `check_prompt`.
        tokenizer: the model's.
        now: the moment that `strftime_now` of a chat template formats, so that a job's prompts
            stay the same from run to run; None is the moment of the call.
        max_tokens: what prompts are cut to, if the settings ask for that; None for no limit.

    Raises:
        ModelError: a chat template is needed and the tokenizer has none, or it takes no system
            prompt.

    Attributes:
        columns: what a row must have.

    Its methods may be called from several threads.
    """

    def __init__(
        self,
        settings: PromptSettings,
        tokenizer: Tokenizer,
        now: datetime | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._settings = settings
        self._max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._template = _template(settings)
        self.columns = _columns(settings, self._template)
        self._chat_template = ""
        if settings.uses_chat_template:
            self._chat_template = _chat_template(tokenizer, now)
            _check_system(tokenizer, self._chat_template, settings.system)

    def render(self, row: Row) -> str:
        """The text that the tokenizer gets.

        A chat has its special tokens written out; to any other text the tokenizer adds its own.

        Raises:
            RowError: `null_column`, `template` or `messages`.
        """
        if not self._settings.uses_chat_template:
            return self._text(row)
        return self._apply_chat_template(self._conversation(row))

    def token_ids(self, text: str) -> list[int]:
        """Token ids of one rendered prompt, at least one.

        Raises:
            RowError: `empty_prompt` or `tokenizer`.
        """
        ids = self._ids_or_errors([text])[0]
        if isinstance(ids, RowError):
            raise ids
        return ids

    def encode(self, rows: Sequence[Row | RowError]) -> list[list[int] | RowError]:
        """Token ids of many rows, in one call of the tokenizer.

        Args:
            rows: a RowError among them is handed on.

        Returns:
            For each row, in order, its ids or what is wrong with it.
        """
        texts = [row if isinstance(row, RowError) else self._try_render(row) for row in rows]
        ids = iter(self._ids_or_errors([text for text in texts if isinstance(text, str)]))
        return [next(ids) if isinstance(text, str) else text for text in texts]

    def _try_render(self, row: Row) -> str | RowError:
        try:
            return self.render(row)
        except RowError as error:
            return error

    def _ids_or_errors(self, texts: list[str]) -> list[list[int] | RowError]:
        try:
            every = self._tokenize(texts) if texts else []
        except Exception as error:  # noqa: BLE001 - tokenizers raise anything; it costs one row
            if len(texts) == 1:
                return [RowError("tokenizer", f"{type(error).__name__}: {error}")]
            return [ids for text in texts for ids in self._ids_or_errors([text])]
        return [ids or RowError("empty_prompt", "the prompt has no tokens") for ids in every]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        special = not self._settings.uses_chat_template
        output = self._tokenizer(texts, add_special_tokens=special, verbose=False)
        return [self._cut(self._single_bos(ids)) for ids in output["input_ids"]]

    def _single_bos(self, ids: list[int]) -> list[int]:
        """Drop the tokenizer's beginning-of-sequence token where the text has brought its own."""
        bos = self._tokenizer.bos_token_id
        return ids[1:] if ids[:2] == [bos, bos] else ids

    def _cut(self, ids: list[int]) -> list[int]:
        """What is left of a prompt that is too long, if it is not to be an error."""
        # With room for none, every prompt is an error, which the engine says.
        if self._max_tokens is None or not 0 < self._max_tokens < len(ids):
            return ids
        if self._settings.overlong == "truncate_right":
            return ids[: self._max_tokens]
        if self._settings.overlong == "truncate_left":
            # Many models go astray without their first token.
            num_kept = int(ids[0] == self._tokenizer.bos_token_id)
            return ids[:num_kept] + ids[len(ids) - self._max_tokens + num_kept :]
        return ids

    def _text(self, row: Row) -> str:
        assert self._template is not None, "messages have no text"
        return self._template.render(row)

    def _conversation(self, row: Row) -> list[Message]:
        column, system = self._settings.messages, self._settings.system
        if column is None:
            messages: list[Message] = [{"role": "user", "content": self._text(row)}]
        else:
            messages = checked_messages(column, row[column])
        if system is None:
            return messages
        if messages[0]["role"] == "system":
            raise RowError(
                "messages",
                f"column '{column}' begins with a system message and prompt.system is set: "
                "leave one of them out",
            )
        return [{"role": "system", "content": system}, *messages]

    def _apply_chat_template(self, messages: list[Message]) -> str:
        try:
            return _apply(self._tokenizer, self._chat_template, messages)
        # A chat template comes with the model and may raise anything.
        except Exception as error:
            raise RowError("template", f"the model's chat template: {error}") from error


def _apply(tokenizer: Tokenizer, chat_template: str, messages: list[Message]) -> str:
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
    )
    return str(text)


def _chat_template(tokenizer: Tokenizer, now: datetime | None) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            "The model's tokenizer has no (default) chat template, which prompt.chat_template and "
            "prompt.messages need: use prompt.template alone, or a chat model."
        ) from error
    return template if now is None else with_fixed_clock(template, now)


def _check_system(tokenizer: Tokenizer, chat_template: str, system: str | None) -> None:
    if system is None:
        return
    probe = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    try:
        _apply(tokenizer, chat_template, probe)
    except Exception as error:
        raise ModelError(
            f"The model's chat template takes no system prompt ({error}): leave out prompt.system "
            "and put its text into the user's turn."
        ) from error
