"""Tokens so far -> finished or not, and why. Standard library only: a tokenizer is a `decode`.

A stop string may span tokens, sit inside one, or begin within a character that tokens share. To
decode the whole completion after every token and search it would be right, and quadratic. Here a
token is looked at only if its text could complete a stop string (a set worked out once per
vocabulary), and then only the tail is decoded; what is found there counts if it is also in the
whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from pipeline.records import Completion, FinishReason, Request

UNDECODED = "\ufffd"
"""What `decode` puts for bytes that are not, or not yet, a character."""

NUM_MARGIN_TOKENS = 3
"""A tail starts this many tokens early: its first character may be cut (4 bytes at most), and
some decoders drop a leading space."""


class Vocabulary:
    """What stopping knows of a tokenizer.

    Args:
        decode: token ids -> text, without special tokens and without clean-up of spaces.
        size: ids are below this.
        special_ids: text of each special token -> its id.
        eos_ids: tokens that end a completion; empty if nothing but length and strings does.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        size: int,
        special_ids: Mapping[str, int],
        eos_ids: frozenset[int],
    ) -> None:
        self.decode = decode
        self.size = size
        self.special_ids = special_ids
        self.eos_ids = eos_ids

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """What each token adds to a text; `UNDECODED` where that cannot be told.

        Not what it decodes to alone, as some tokenizers drop a first space.
        """
        anchor = self._anchor()
        if anchor is None:
            return (UNDECODED,) * self.size
        before = self.decode([anchor])
        pairs = (self.decode([anchor, token]) for token in range(self.size))
        return tuple(
            pair[len(before) :] if pair.startswith(before) else UNDECODED for pair in pairs
        )

    def _anchor(self) -> int | None:
        """A token of plain letters, whose text nothing that follows can change."""
        for token in range(self.size):
            text = self.decode([token])
            if text.isascii() and text.isalpha():
                return token
        return None


class Found(NamedTuple):
    """A stop string, and the text before it."""

    stop: str
    text: str


class StopStrings:
    """The stop strings of a request.

    A stop string that is a special token's text, such as `<|im_end|>`, stands for that token,
    which `decode` leaves out.
    """

    def __init__(self, stops: Sequence[str], vocabulary: Vocabulary) -> None:
        self._stops = tuple(stops)
        self._decode = vocabulary.decode
        special_ids = vocabulary.special_ids
        self._special = {special_ids[stop]: stop for stop in stops if stop in special_ids}
        self._texts = vocabulary.texts if stops else ()
        self._triggers = frozenset(_triggers(self._texts, self._stops))
        num_bytes = max((len(stop.encode("utf-8", "surrogatepass")) for stop in stops), default=0)
        self._num_tail_tokens = num_bytes + NUM_MARGIN_TOKENS

    def find(self, ids: Sequence[int]) -> Found | None:
        """The stop string that the last of `ids`, all generated, has just completed.

        Of several, the one that was complete first, and then the longest. To be called after
        every token, until something is found.
        """
        token = ids[-1]
        if token in self._special:
            return Found(self._special[token], self._decode(ids[:-1]))
        if token not in self._triggers or earliest(self._stops, self._tail(ids)) is None:
            return None
        return earliest(self._stops, self._decode(ids))

    def _tail(self, ids: Sequence[int]) -> str:
        """The end of the text: at least as many bytes as the longest stop string has."""
        start = len(ids)
        num_missing = self._num_tail_tokens
        while start > 0 and num_missing > 0:
            start -= 1
            num_missing -= bool(self._texts[ids[start]])  # each that has text has a byte at least
        text = self._decode(ids[start:])
        # Cut within a character, some decoders give up the whole run of bytes that follows.
        for earlier in range(start - 1, max(start - 4, -1), -1):
            if not text.startswith(UNDECODED):
                break
            text = self._decode(ids[earlier:])
        return text


def earliest(stops: Sequence[str], text: str) -> Found | None:
    """The stop string that is complete first in `text`; of those that end together the longest."""
    starts = [(text.find(stop), stop) for stop in stops]
    ends = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
    if not ends:
        return None
    _, start, stop = min(ends)
    return Found(stop, text[:start])


def _triggers(texts: Sequence[str], stops: Sequence[str]) -> Iterator[int]:
    """Tokens after which a stop string may be complete."""
    endings = tuple({stop[start:] for stop in stops for start in range(len(stop))})
    inside = (*stops, UNDECODED)
    for token, text in enumerate(texts):
        if text.startswith(endings) or any(part in text for part in inside):
            yield token


class Generated:
    """The tokens of one completion, and whether and how it has ended.

    Args:
        stops: those of the request's sampling.
    """

    def __init__(self, request: Request, stops: StopStrings, vocabulary: Vocabulary) -> None:
        self.request = request
        self.ids: list[int] = []
        self._stops = stops
        self._vocabulary = vocabulary
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion | None:
        """None until it has ended."""
        return self._completion

    def add(self, token: int) -> bool:
        """Takes the next token in; True if it ends the completion. Not to be called after."""
        self.ids.append(token)
        if token in self._vocabulary.eos_ids:
            self._end(self._vocabulary.decode(self.ids[:-1]), FinishReason.STOP)
        elif found := self._stops.find(self.ids):
            self._end(found.text, FinishReason.STOP, found.stop)
        elif len(self.ids) == self.request.sampling.max_new_tokens:
            self._end(self._vocabulary.decode(self.ids), FinishReason.LENGTH)
        return self._completion is not None

    def fail(self, error: str) -> None:
        """Ends it as an error row; `error` is `kind: message`."""
        self._end(None, FinishReason.ERROR, error=error)

    def _end(
        self,
        text: str | None,
        reason: FinishReason,
        stop: str | None = None,
        error: str | None = None,
    ) -> None:
        self._completion = Completion(
            id=self.request.id,
            text=text,
            finish_reason=reason,
            stop_reason=stop,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_completion_tokens=len(self.ids),
            error=error,
        )


TokenListener = Callable[[Generated], None]
"""Told of a row after each of its tokens, by somebody who shows it while it grows."""


def nobody_listens(generated: Generated) -> None:
    """The listener of an engine that works alone."""
