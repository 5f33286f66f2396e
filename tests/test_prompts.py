"""Rows become token ids as the model expects them."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.errors import JobFileError, ModelError, RowError
from pipeline.prompts import PromptRenderer, check_prompt
from pipeline.settings import PromptSettings

BOS, EOS = "<s>", "</s>"
CHATML = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)


def _tokenizer(chat_template: Any = None, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte; the beginning-of-sequence token is put first, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 0)]
        )
    # As some tokenizer.json files have it; prompts must be neither cut nor padded.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=chat_template,
        model_max_length=8,
    )


def _renderer(tokenizer: Any = None, **settings: Any) -> PromptRenderer:
    return PromptRenderer(PromptSettings(**settings), tokenizer or _tokenizer(CHATML))


def _texts(renderer: PromptRenderer, tokenizer: Any, rows: list[Any]) -> list[str]:
    """Rendered, tokenized and decoded: the prompts as the model sees them."""
    return [
        str(ids) if isinstance(ids, RowError) else tokenizer.decode(ids)
        for ids in renderer.encode(rows)
    ]


def test_needed_columns_in_the_order_of_the_input() -> None:
    """Only columns that the template names are read."""
    settings = PromptSettings(template="{{ b }}{{ a.x }}{% for i in range(2) %}{{ i }}{% endfor %}")
    assert check_prompt(settings, ["a", "other", "b"]) == ("a", "b")
    assert check_prompt(PromptSettings(messages="chat"), ["a", "chat"]) == ("chat",)
    assert check_prompt(PromptSettings(template="constant"), ["a"]) == ()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"template": "{{ qestion }}"},
            r"names 'qestion'.*did you mean 'question'\? .*'question', 'range', 'dict'",
        ),
        ({"messages": "chat"}, r"prompt\.messages names 'chat', which is no input column"),
        ({"template": "{{ dict }}"}, "'dict', which is both a function of Jinja and an input"),
        ({"template": "{{ range(3) }}"}, "'range', which is both a function of Jinja and an input"),
        ({"template": "{{ question"}, "line 1"),
    ],
)
def test_prompt_that_does_not_fit_the_input(settings: dict[str, str], sentence: str) -> None:
    """What could never render is refused before anything runs."""
    with pytest.raises(JobFileError, match=sentence):
        check_prompt(PromptSettings(**settings), ["question", "range", "dict"])


def test_plain_prompt_gets_the_special_tokens_of_the_tokenizer() -> None:
    """The beginning-of-sequence token is put before a template's text, whatever its length."""
    tokenizer = _tokenizer()
    renderer = _renderer(tokenizer, template="Q: {{ q }}\nA:")
    assert renderer.columns == ("q",)
    assert _texts(renderer, tokenizer, [{"q": "ä?"}]) == ["<s>Q: ä?\nA:"]


def test_beginning_of_sequence_is_never_doubled() -> None:
    """A template that writes the token itself gets one; so does a chat template."""
    tokenizer = _tokenizer(CHATML)
    plain = _renderer(tokenizer, template="<s>{{ q }}")
    assert _texts(plain, tokenizer, [{"q": "hi"}, {"q": "<s>"}]) == ["<s>hi", "<s><s>"]
    chat = _renderer(tokenizer, template="{{ q }}", chat_template=True)
    assert _texts(chat, tokenizer, [{"q": "hi"}]) == ["<s><user>hi</s><assistant>"]
    bare = _renderer(_tokenizer("{{ messages[0].content }}"), template="q", chat_template=True)
    assert _texts(bare, tokenizer, [{}]) == ["q"]
    without = _tokenizer(adds_bos=False)
    assert _texts(_renderer(without, template="<s>{{ q }}"), without, [{"q": "a"}]) == ["<s>a"]
    assert _texts(_renderer(without, template="{{ q }}"), without, [{"q": "a"}]) == ["a"]


def test_bad_rows_stand_in_their_place() -> None:
    """One call gives ids or an error for each row, in order, and hands errors on."""
    tokenizer = _tokenizer(adds_bos=False)
    renderer = _renderer(tokenizer, template="{{ q }}")
    unreadable = RowError("value", "cannot be read")
    rows = [{"q": "a"}, {"q": None}, unreadable, {"q": ""}, {}, {"q": "b"}]
    outcomes = renderer.encode(rows)
    kinds = [outcome.kind if isinstance(outcome, RowError) else "ok" for outcome in outcomes]
    assert kinds == ["ok", "null_column", "value", "empty_prompt", "template", "ok"]
    assert [tokenizer.decode(outcomes[i]) for i in (0, 5)] == ["a", "b"]
    assert renderer.encode([]) == []


def test_text_that_the_tokenizer_refuses_costs_its_row() -> None:
    """A lone surrogate, which no tokenizer takes, does not spoil the batch."""
    outcomes = _renderer(template="{{ q }}").encode([{"q": "a"}, {"q": "\ud800"}, {"q": "b"}])
    lengths = [str(ids)[:9] if isinstance(ids, RowError) else len(ids) for ids in outcomes]
    assert lengths == [2, "tokenizer", 2]


def test_single_prompt_equals_the_batch() -> None:
    """`render` and `token_ids` give what `encode` gives, errors raised."""
    renderer = _renderer(template="{{ q }}")
    assert renderer.encode([{"q": "abc"}]) == [renderer.token_ids(renderer.render({"q": "abc"}))]
    with pytest.raises(RowError, match="null_column"):
        renderer.render({"q": None})
    with pytest.raises(RowError, match="empty"):
        _renderer(_tokenizer(adds_bos=False), template="{{ q }}").token_ids("")


def test_messages_go_through_the_chat_template() -> None:
    """A conversation comes out with its roles, the system prompt first and the answer opened."""
    renderer = _renderer(messages="chat", system="Be brief.")
    assert renderer.columns == ("chat",)
    chat = [
        {"role": "user", "content": "1+1?", "name": None},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert renderer.render({"chat": chat}) == (
        "<s><system>Be brief.</s><user>1+1?</s><assistant>2</s><user>a\nb</s><assistant>"
    )


@pytest.mark.parametrize(
    ("chat", "sentence"),
    [
        (None, "null_column: column 'chat' is null"),
        ("hello", "messages: column 'chat' holds a str"),
        ([], "messages: .* an empty list"),
        (["hello"], "message 0 is not an object"),
        ([{"content": "x"}], "message 0 is not an object"),
        ([{"role": "user"}], "message 0: its content is not text"),
        ([{"role": "user", "content": None}], "message 0: its content is not text"),
        ([{"role": "user", "content": []}], "message 0: its content is not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0: its content is not text"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "nothing to"),
        ([{"role": "system", "content": "x"}], r"begins with a system message and prompt\.system"),
    ],
)
def test_messages_that_cannot_be_asked(chat: Any, sentence: str) -> None:
    """Each malformed conversation is its row's error and says what is wrong."""
    with pytest.raises(RowError, match=sentence):
        _renderer(messages="chat", system="s").render({"chat": chat})


def test_system_message_of_the_row_is_kept() -> None:
    """Without `prompt.system`, a conversation may bring its own."""
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    text = _renderer(messages="chat").render({"chat": chat})
    assert text == "<s><system>x</s><user>y</s><assistant>"


def test_chat_template_that_refuses_a_row() -> None:
    """What the model's chat template raises is the row's error, in its words."""
    renderer = _renderer(_tokenizer(NO_SYSTEM + CHATML), messages="chat")
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(RowError, match="template: the model's chat template: no system role"):
        renderer.render({"chat": chat})


def test_chat_template_that_refuses_every_row_is_found_at_once() -> None:
    """A model without system prompts, or without a chat template, is refused before row one."""
    with pytest.raises(ModelError, match=r"no system role.*leave out prompt\.system"):
        _renderer(_tokenizer(NO_SYSTEM + CHATML), messages="chat", system="s")
    with pytest.raises(ModelError, match=r"no \(default\) chat template"):
        _renderer(_tokenizer(), template="{{ q }}", chat_template=True)
    with pytest.raises(ModelError, match=r"no \(default\) chat template"):
        _renderer(_tokenizer({"a": CHATML, "b": CHATML}), messages="chat")


NOW = datetime(2031, 3, 9, 7, 5)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # As Llama 3's do it.
        (
            "{%- if strftime_now is defined %}\n    {%- set today = strftime_now('%d %b %Y') %}\n"
            "{%- else %}\n    {%- set today = '26 Jul 2024' %}\n{%- endif %}\n"
            "{{- today }} {{ messages[0].content }}",
            "09 Mar 2031 hi",
        ),
        # As Mistral's, which cut it up.
        ("{% set d = strftime_now('%Y-%m-%d').split('-') %}{{ d[2] }}.{{ d[1] | int }}", "09.3"),
        (
            "{% set f = '%Y' %}{% macro m() %}{{ strftime_now(format=f) }}{% endmacro %}{{ m() }}",
            "2031",
        ),
        ("{{ strftime_now('100%% %-d/%-m %H:%M %A %') }}", "100% 9/3 07:05 Sunday %"),
        ("{{ strftime_now('') }}|{{ strftime_now('plain text') }}", "|plain text"),
    ],
)
def test_chat_template_that_prints_the_date(template: str, text: str) -> None:
    """It prints the moment that is given, however the template goes about it."""
    settings = PromptSettings(messages="chat")
    renderer = PromptRenderer(settings, _tokenizer(template), now=NOW)
    assert renderer.render({"chat": [{"role": "user", "content": "hi"}]}) == text


@pytest.mark.parametrize(
    "start", ["\n", "  {% if true %}", "\n\n  {% if true %}", " ", "{%- if 1 %}"]
)
def test_nothing_else_of_a_chat_template_changes(start: str) -> None:
    """Spaces and lines at its beginning are as they would be without a given moment."""
    end = "{% endif %}" if "if" in start else ""
    template = (
        start
        + "x {{ messages[0].content }}"
        + end
        + "{% if 0 %}{{ strftime_now('') }}{% endif %}\n"
    )
    chat = {"chat": [{"role": "user", "content": "hi"}]}
    settings = PromptSettings(messages="chat")
    plain = PromptRenderer(settings, _tokenizer(template)).render(chat)
    assert PromptRenderer(settings, _tokenizer(template), now=NOW).render(chat) == plain


def test_without_a_given_moment_it_is_now() -> None:
    """The default is what transformers does; and system prompts see the same clock."""
    template = "{{ strftime_now('%Y') }}{{ messages[0].content }}"
    settings = PromptSettings(template="?", chat_template=True, system="s")
    years = {f"{year}s" for year in (datetime.now().year, datetime.now().year + 1)}
    assert PromptRenderer(settings, _tokenizer(template)).render({}) in years
    assert PromptRenderer(settings, _tokenizer(template), now=NOW).render({}) == "2031s"


def test_threads_may_share_a_renderer() -> None:
    """Shards are encoded from several threads at once, the first ones too."""
    rows = [{"q": "x" * n} for n in range(50)]
    expected = _renderer(template="{{ q }}").encode(rows)
    renderer = _renderer(template="{{ q }}")
    with ThreadPoolExecutor(4) as pool:
        assert all(outcome == expected for outcome in pool.map(renderer.encode, [rows] * 40))


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [
        ("error", [1, 10, 11, 12, 13, 14]),
        ("truncate_left", [1, 12, 13, 14]),
        ("truncate_right", [1, 10, 11, 12]),
    ],
)
def test_a_long_prompt_is_cut_as_asked(overlong: str, expected: list[int]) -> None:
    """Left, its first token stays if it begins a sequence; one that fits stays as it is."""
    settings = PromptSettings(template="{{ q }}", overlong=overlong)  # type: ignore[arg-type]
    renderer = PromptRenderer(settings, _NumberTokenizer(), max_tokens=4)
    short, long = renderer.encode([{"q": "10 11 12"}, {"q": "10 11 12 13 14"}])
    assert short == [1, 10, 11, 12]
    assert long == expected


@pytest.mark.parametrize("room", [0, -3])
def test_where_there_is_no_room_nothing_is_cut(room: int) -> None:
    """The engine says of each row that it is too long."""
    settings = PromptSettings(template="{{ q }}", overlong="truncate_left")
    renderer = PromptRenderer(settings, _NumberTokenizer(), max_tokens=room)
    assert renderer.encode([{"q": "10 11"}]) == [[1, 10, 11]]


def test_a_chat_is_not_cut() -> None:
    """A cut would go through the template's own tokens and the model would go astray."""
    with pytest.raises(ValueError, match="plain 'template'"):
        PromptSettings(template="{{ q }}", chat_template=True, overlong="truncate_left")


class _NumberTokenizer:
    """Numbers in, the same numbers out, after a beginning-of-sequence token of 1."""

    bos_token_id = 1

    def __call__(self, text: Any, *, add_special_tokens: bool, verbose: bool) -> Any:
        return {"input_ids": [[1, *map(int, one.split())] for one in text]}

    def get_chat_template(self) -> str:
        raise ValueError

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        raise NotImplementedError
