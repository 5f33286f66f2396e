from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import Completion, FinishReason, Request, RequestId, Sampling
from pipeline.special_tokens import vocabulary_of
from pipeline.stopping import UNDECODED, Found, Generated, StopStrings, Vocabulary, earliest
from tests.models import (
    CORPUS,
    EOS_ID,
    IM_END_ID,
    SPECIAL_TOKENS,
    VOCABULARY_SIZE,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)

TOKENIZERS = {"bytes": byte_level_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
VOCABULARIES = {
    name: vocabulary_of(tokenizer, VOCABULARY_SIZE, frozenset({EOS_ID}))
    for name, tokenizer in TOKENIZERS.items()
}
KINDS = sorted(VOCABULARIES)


def naive(ids: Sequence[int], stops: Sequence[str], vocabulary: Vocabulary) -> tuple[int, Any]:
    """Decodes everything after every token and searches it; tokens taken and what was found."""
    for num_tokens in range(1, len(ids) + 1):
        found = earliest(stops, vocabulary.decode(ids[:num_tokens]))
        if found is not None:
            return num_tokens, found
    return len(ids), None


def generate(
    ids: Sequence[int], stops: Sequence[str], vocabulary: Vocabulary, max_new_tokens: int = 1000
) -> Completion | None:
    """What becomes of a row to which these tokens come, as far as they are asked for."""
    request = Request(RequestId(0, 0, 0), (5,), Sampling(max_new_tokens, tuple(stops)))
    row = Generated(request, StopStrings(stops, vocabulary), vocabulary)
    for token in ids:
        if row.add(token):
            break
    return row.completion


def ending(ids: Sequence[int], stops: Sequence[str] = (), **options: Any) -> Completion | None:
    """As `generate`, over the bytes and with further options of `Sampling`."""
    vocabulary = VOCABULARIES["bytes"]
    request = Request(RequestId(0, 0, 0), (5,), Sampling(100, tuple(stops), **options))
    row = Generated(request, StopStrings(stops, vocabulary), vocabulary)
    for token in ids:
        if row.add(token):
            break
    return row.completion


def encode(kind: str, text: str) -> list[int]:
    """Tokens of a text, without special ones."""
    return list(TOKENIZERS[kind].encode(text, add_special_tokens=False))


def token_lists(kind: str) -> st.SearchStrategy[list[int]]:
    """Tokens of sensible text with some at random between, so that characters are cut."""
    num_special = len(SPECIAL_TOKENS)
    anything = st.lists(st.integers(num_special, VOCABULARY_SIZE - 1), max_size=8)
    alphabet = st.sampled_from(sorted(set("".join(CORPUS))))
    words = st.text(alphabet, max_size=12).map(lambda text: encode(kind, text))
    return st.lists(st.one_of(words, anything), max_size=6).map(_flat)


def _flat(lists: list[list[int]]) -> list[int]:
    return [token for tokens in lists for token in tokens]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400)
@given(data=st.data())
def test_finds_what_the_naive_method_finds(kind: str, data: st.DataObject) -> None:
    """Same token, same stop string and same text as decoding and searching all after each one."""
    vocabulary = VOCABULARIES[kind]
    ids = data.draw(token_lists(kind))
    text = vocabulary.decode(ids).replace(UNDECODED, "")
    starts = st.integers(0, max(0, len(text) - 1))
    cuts = st.tuples(starts, st.integers(1, 12)).map(lambda cut: text[cut[0] : cut[0] + cut[1]])
    stops = [stop for stop in data.draw(st.lists(cuts, min_size=1, max_size=3)) if stop]
    num_tokens, found = naive(ids, stops, vocabulary)
    completion = generate(ids, stops, vocabulary)
    if found is None:
        assert completion is None
    else:
        assert completion is not None
        assert completion.num_completion_tokens == num_tokens
        assert (completion.stop_reason, completion.text) == found


def test_stop_string_over_several_tokens() -> None:
    """A stop string that no token holds is found when its last one comes, and cut off."""
    vocabulary = VOCABULARIES["bytes"]
    ids = encode("bytes", "It rests; STOP? no")
    completion = generate(ids, ["STOP?"], vocabulary)
    assert completion is not None
    assert completion.text == "It rests; "
    assert completion.stop_reason == "STOP?"
    assert completion.finish_reason is FinishReason.STOP
    assert vocabulary.decode(ids[: completion.num_completion_tokens]).endswith("STOP?")


def test_stop_string_inside_a_token() -> None:
    """Text before the stop string stays, also if one token holds both; the rest of it goes."""
    vocabulary = VOCABULARIES["bytes"]
    token = next(iter(encode("bytes", "Question")))
    assert vocabulary.decode([token]) == "Question"
    completion = generate([token], ["est"], vocabulary)
    assert completion is not None
    assert completion.text == "Qu"
    assert completion.num_completion_tokens == 1


@pytest.mark.parametrize(
    ("stops", "stop", "text"),
    [
        (["cd", "bc"], "bc", "a"),
        (["cd", "bcde", "e"], "cd", "ab"),
        (["cd", "bcd", "d"], "bcd", "a"),
        (["xy"], None, None),
    ],
    ids=["first complete", "shorter inside", "longest of those that end together", "none"],
)
def test_which_of_several_stop_strings(
    stops: list[str], stop: str | None, text: str | None
) -> None:
    """The one that is complete first wins, wherever it starts; then the one that starts first."""
    assert earliest(stops, "abcdef") == (Found(stop, text or "") if stop else None)


@pytest.mark.parametrize("kind", KINDS)
def test_character_of_several_tokens(kind: str) -> None:
    """A stop string that ends in a character of several tokens is found at its last one."""
    ids = encode(kind, "ab🎉c")
    completion = generate(ids, ["b🎉"], VOCABULARIES[kind])
    assert completion is not None
    assert completion.text == "a"
    assert completion.num_completion_tokens == len(ids) - 1


def test_character_within_a_long_run_of_byte_tokens() -> None:
    """A tail that begins within a character is lengthened: cut there, the run is not decoded."""
    ids = encode("sentencepiece", "🗾" * 10 + "🎉🎊")
    completion = generate(ids, ["🎉🎊"], VOCABULARIES["sentencepiece"])
    assert completion is not None
    assert completion.text == "🗾" * 10


def test_leading_space_of_sentencepiece() -> None:
    """A stop string with a space is found in the middle, where decoding a tail alone drops it."""
    completion = generate(encode("sentencepiece", "x y z"), [" z"], VOCABULARIES["sentencepiece"])
    assert completion is not None
    assert completion.text == "x y"


@pytest.mark.parametrize(
    ("ids", "reason", "num_tokens"),
    [([60, 61, EOS_ID], FinishReason.STOP, 3), ([60, 61, 62], FinishReason.LENGTH, 3)],
    ids=["end-of-sequence on the last token", "no end"],
)
def test_stop_beats_length(ids: list[int], reason: FinishReason, num_tokens: int) -> None:
    """The last allowed token may end a row by itself; then the length did not."""
    vocabulary = VOCABULARIES["bytes"]
    completion = generate(ids, [], vocabulary, max_new_tokens=3)
    assert completion is not None
    assert completion.finish_reason is reason
    assert completion.num_completion_tokens == num_tokens
    assert completion.text == vocabulary.decode(ids)
    assert completion.stop_reason is None


def test_stop_string_on_the_last_token_beats_length() -> None:
    """As with end-of-sequence, and with the stop string named."""
    ids = encode("bytes", "so: END")
    completion = generate(ids, ["END"], VOCABULARIES["bytes"], max_new_tokens=len(ids))
    assert completion is not None
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, "END")


def test_end_of_sequence_token_with_text() -> None:
    """A token that ends completions is no part of the text, even if it is not a special one."""
    (newline,) = encode("bytes", "\n")
    tokenizer = TOKENIZERS["bytes"]
    vocabulary = vocabulary_of(tokenizer, VOCABULARY_SIZE, frozenset({newline}))
    completion = generate([*encode("bytes", "so"), newline], [], vocabulary)
    assert completion is not None
    assert completion.text == "so"


def test_special_token_as_stop_string() -> None:
    """A stop string that is a special token's name works, although it is never in the text."""
    ids = [*encode("bytes", "done"), IM_END_ID]
    completion = generate(ids, ["<|im_end|>"], VOCABULARIES["bytes"])
    assert completion is not None
    assert (completion.text, completion.stop_reason) == ("done", "<|im_end|>")


def test_special_tokens_within_a_stop_string() -> None:
    """Tokens without text in the middle do not push the start of a stop string out of sight."""
    first, last = encode("bytes", "EN"), encode("bytes", "D!")
    ids = [*first, *[IM_END_ID] * 30, *last]
    completion = generate(ids, ["END!"], VOCABULARIES["bytes"])
    assert completion is not None
    assert completion.text == ""


@pytest.mark.parametrize("kind", KINDS)
def test_cost_does_not_grow_with_the_text(kind: str) -> None:
    """Most tokens cost no decoding at all, and none more than a tail of fixed length."""
    original = VOCABULARIES[kind]
    decoded: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return original.decode(ids)

    vocabulary = Vocabulary(decode, original.size, original.special_ids, original.eos_ids)
    stops = StopStrings(["dog\n\n"], vocabulary)
    ids = encode(kind, "the lazy dog jumps. " * 50)
    decoded.clear()
    assert all(stops.find(ids[:end]) is None for end in range(1, len(ids) + 1))
    assert len(decoded) < len(ids) / 2
    assert max(decoded, default=0) < 20


def test_unknown_tokens_are_looked_at() -> None:
    """A vocabulary in which no token's text can be told is searched after every token."""
    pieces = {0: "…", 1: "…1", 2: "2"}
    vocabulary = Vocabulary(
        lambda ids: "".join(pieces[number] for number in ids), 3, {}, frozenset()
    )
    completion = generate([0, 1, 2], ["12"], vocabulary)
    assert completion is not None
    assert completion.text == "……"


def test_failed_row() -> None:
    """A row that fails keeps its count and has no text."""
    request = Request(RequestId(1, 2, 3), (5, 6), Sampling(4))
    vocabulary = VOCABULARIES["bytes"]
    row = Generated(request, StopStrings((), vocabulary), vocabulary)
    row.add(60)
    row.fail("nan: no number")
    assert row.completion == Completion(
        RequestId(1, 2, 3), None, FinishReason.ERROR, None, 2, 1, "nan: no number"
    )


def test_a_stop_string_may_stay_in() -> None:
    """And nothing after it, though the token that ended it has more text."""
    ids = encode("bytes", "a b END c")
    completion = ending(ids, ["END", "never"], include_stop=True)
    assert completion is not None
    assert (completion.text, completion.stop_reason) == ("a b END", "END")


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_token_ends_a_row(include_stop: bool) -> None:
    """Whatever its text would be, and is named by its number."""
    ids = encode("bytes", "abcd")
    completion = ending(ids, stop_token_ids=(ids[2], 499), include_stop=include_stop)
    assert completion is not None
    assert completion.text == ("abc" if include_stop else "ab")
    assert completion.stop_reason == str(ids[2])
    assert completion.finish_reason is FinishReason.STOP


def test_end_of_sequence_may_mean_nothing() -> None:
    """It is not in the text, counts as a token, and the row goes on to another ending."""
    ids = [*encode("bytes", "ab"), EOS_ID, *encode("bytes", "cd.")]
    completion = ending(ids, ["."], ignore_eos=True)
    assert completion is not None
    assert (completion.text, completion.num_completion_tokens) == ("abcd", 6)


def test_stop_strings_do_not_count_before_the_minimum() -> None:
    """One that is complete earlier is passed over, also when a later one comes near it."""
    ids = encode("bytes", "x. y.. z.")
    assert len(ids) == 9
    for minimum, text in ((1, "x"), (2, "x. y"), (5, "x. y."), (6, "x. y.. z")):
        completion = ending(ids, ["."], min_new_tokens=minimum)
        assert completion is not None
        assert completion.text == text, minimum
    assert ending(ids, ["."], min_new_tokens=9) is None


@settings(max_examples=200)
@given(
    token_lists("bytes"), st.lists(st.text("ab .é", min_size=1, max_size=3), max_size=3), st.data()
)
def test_minimum_agrees_with_looking_at_everything(
    ids: list[int], stops: list[str], data: st.DataObject
) -> None:
    """The first stop string that the text after a token completes and the minimum does not."""
    decode = VOCABULARIES["bytes"].decode
    minimum = data.draw(st.integers(0, len(ids)))
    free = len(decode(ids[:minimum]).rstrip(UNDECODED))
    expected = None
    for end in range(minimum + 1, len(ids) + 1):
        text = decode(ids[:end])
        stands = {text.find(stop, max(0, free - len(stop) + 1)) for stop in stops}
        if max(stands, default=-1) >= 0:
            expected = end
            break
    completion = ending(ids, stops, min_new_tokens=minimum, ignore_eos=True)
    assert (completion.num_completion_tokens if completion else None) == expected
