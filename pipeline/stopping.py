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

from pipeline.records import Completion, FinishReason, Request, Sampling

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

    def ending_ids(self, sampling: Sampling) -> frozenset[int]:
        """Tokens that end a completion whatever stands before them."""
        special = {self.special_ids[stop] for stop in sampling.stop if stop in self.special_ids}
        eos_ids = frozenset() if sampling.ignore_eos else self.eos_ids
        return eos_ids.union(special, sampling.stop_token_ids)

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

    Attributes:
        triggers: tokens after which there may be something to find.
    """

    def __init__(self, stops: Sequence[str], vocabulary: Vocabulary) -> None:
        self._stops = tuple(stops)
        self._decode = vocabulary.decode
        special_ids = vocabulary.special_ids
        self._special = {special_ids[stop]: stop for stop in stops if stop in special_ids}
        self._texts = vocabulary.texts if stops else ()
        self.triggers = frozenset(self._special) | set(_triggers(self._texts, self._stops))
        num_bytes = max((len(stop.encode("utf-8", "surrogatepass")) for stop in stops), default=0)
        self._num_tail_tokens = num_bytes + NUM_MARGIN_TOKENS

    def find(self, ids: Sequence[int], num_free: int = 0) -> Found | None:
        """The stop string that the last of `ids`, all generated, has just completed.

        Of several, the one that was complete first, and then the longest. To be called after
        every token, until something is found.

        Args:
            num_free: first tokens that may complete stop strings without ending anything; the
                last is none of them.
        """
        token = ids[-1]
        if token in self._special:
            return Found(self._special[token], self._decode(ids[:-1]))
        if token not in self.triggers or earliest(self._stops, self._tail(ids)) is None:
            return None
        # A character that is not whole yet has fewer letters than it will have.
        free = self._decode(ids[:num_free]).rstrip(UNDECODED)
        return earliest(self._stops, self._decode(ids), len(free))

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


def earliest(stops: Sequence[str], text: str, num_free: int = 0) -> Found | None:
    """The stop string that is complete first in `text`; of those that end together the longest.

    Args:
        num_free: letters at the start of the text, within which no stop string counts.
    """
    starts = [(text.find(stop, max(0, num_free - len(stop) + 1)), stop) for stop in stops]
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
        self._decode = vocabulary.decode
        self._eos_ids = frozenset() if request.sampling.ignore_eos else vocabulary.eos_ids
        self._ending_ids = vocabulary.ending_ids(request.sampling)
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion | None:
        """None until it has ended."""
        return self._completion

    def add(self, token: int) -> bool:
        """Takes the next token in; True if it ends the completion. Not to be called after."""
        self.ids.append(token)
        sampling = self.request.sampling
        is_watched = token in self._ending_ids or token in self._stops.triggers
        if is_watched and len(self.ids) > sampling.min_new_tokens:
            self._look(token)
        if self._completion is None and len(self.ids) == sampling.max_new_tokens:
            self._end(self._decode(self.ids), FinishReason.LENGTH)
        return self._completion is not None

    def _look(self, token: int) -> None:
        """Ends it if the token, the last, or a stop string does."""
        sampling = self.request.sampling
        if token in self._eos_ids:
            self._end(self._decode(self.ids[:-1]), FinishReason.STOP)
        elif token in sampling.stop_token_ids:
            text = self._decode(self.ids if sampling.include_stop else self.ids[:-1])
            self._end(text, FinishReason.STOP, str(token))
        elif found := self._stops.find(self.ids, sampling.min_new_tokens):
            ending = found.stop if sampling.include_stop else ""
            self._end(found.text + ending, FinishReason.STOP, found.stop)

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
