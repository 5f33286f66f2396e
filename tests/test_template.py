"""The sandbox that prompts are rendered in."""

import datetime
from decimal import Decimal
from typing import Any

import pytest

from pipeline import template as template_module
from pipeline.errors import JobFileError, RowError
from pipeline.template import Template


def _render(source: str, **row: Any) -> str:
    return Template(source).render(row)


def _kind(source: str, **row: Any) -> str:
    with pytest.raises(RowError) as caught:
        _render(source, **row)
    return caught.value.kind


def test_text_is_exact() -> None:
    """Nothing is escaped, trimmed or lost at the end; values print as str() has them."""
    assert _render("Q: {{ q }}\nA:\n", q="<a & 'b'> ä") == "Q: <a & 'b'> ä\nA:\n"
    row = {"p": Decimal("1.50"), "t": datetime.datetime(2024, 1, 2), "f": 0.1, "b": False}
    assert _render("{{ p }} {{ t }} {{ f }} {{ b }}", **row) == "1.50 2024-01-02 00:00:00 0.1 False"


def test_columns_are_the_free_names() -> None:
    """Names set by the template and Jinja's functions are not columns."""
    template = Template(
        "{% set x = a %}{% for i in range(n) %}{{ i }}{{ x }}{{ loop.index }}{% endfor %}"
        "{{ o.inner }}{{ namespace(z=1).z }}"
    )
    assert template.columns == {"a", "n", "o"}
    assert template.functions == {"range", "namespace"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("a\n{{ q", r"line 2: "),
        ("{% if q %}", "line 1: "),
        ("{{ q | nofilter }}", "No filter named 'nofilter'"),
        ("{{ [1, 2] | random }}", "No filter named 'random'"),
        ("{% include 'other' %}", "include, import or extends"),
        ("{% from 'other' import x %}", "include, import or extends"),
    ],
)
def test_bad_template_is_one_sentence(source: str, sentence: str) -> None:
    """A template that cannot work is refused before anything runs, with its line."""
    with pytest.raises(JobFileError, match=sentence) as caught:
        Template(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ q }}",
        "{{ q | upper }}",
        "{{ 'a' ~ q }}",
        "{{ q + 'a' }}",
        "{{ q.inner }}",
        "{{ q['inner'] }}",
        "{{ q | length }}",
        "{% for c in q %}{{ c }}{% endfor %}",
        "{{ q | join(', ') }}",
        "{{ q | trim }}",
    ],
)
def test_null_never_becomes_text(source: str) -> None:
    """Using a null's value is that row's error and names the column; 'None' is never printed."""
    with pytest.raises(RowError, match="null_column: column 'q' is null"):
        _render(source, q=None)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if q %}{{ q }}{% else %}-{% endif %}", "-"),
        ("{{ q or '-' }}", "-"),
        ("{{ q | default('-') }}", "-"),
        ("{{ '-' if q is none else q }}", "-"),
        ("{{ '-' if q is not none else 'null' }}", "null"),
        ("{{ '-' if q == none else q }}", "-"),
        ("{{ 'x' if q != none else '-' }}", "-"),
        ("{% if false %}{{ q }}{% endif %}-", "-"),
    ],
)
def test_template_may_deal_with_a_null(source: str, text: str) -> None:
    """A template that asks first, as Alpaca's does for `input`, renders rows with nulls."""
    assert _render(source, q=None) == text


def test_null_inside_a_value_and_bytes_are_not_printed() -> None:
    """Neither 'None' from a nested null nor a repr of bytes gets into a prompt."""
    assert _kind("{{ o.x }}", o={"x": None}) == "null_column"
    assert _kind("{{ b }}", b=b"raw") == "template"


@pytest.mark.parametrize(
    "source",
    [
        "{{ o.missing }}",
        "{{ o['missing'] }}",
        "{{ 1 / 0 }}",
        "{{ o.x.append(1) }}",
        "{{ o.__class__ }}",
    ],
)
def test_failing_template_is_a_row_error(source: str) -> None:
    """Missing keys, exceptions and what the sandbox forbids cost one row."""
    assert _kind(source, o={"x": [1]}) == "template"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "ranges"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "ranges"),
        ("{{ 'x' * n }}", "repetition"),
        ("{{ n * [1] }}", "repetition"),
        ("{{ 9 ** n }}", "power"),
        ("{{ 9 ** (9 ** 9) }}", "power"),
    ],
)
def test_runaway_template_is_bounded(source: str, sentence: str) -> None:
    """What would take all time or memory ends as a row error."""
    with pytest.raises(RowError, match=f"^template: .*{sentence}"):
        _render(source, n=10**12)


def test_longest_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on the whole prompt counts what is put together from small pieces."""
    monkeypatch.setattr(template_module, "MAX_CHARS", 100)
    source = "{% for i in range(n) %}{{ q }}{% endfor %}"
    assert _render(source, n=10, q="x" * 10) == "x" * 100
    assert _kind(source, n=11, q="x" * 10) == "template"


def test_budget_is_per_row() -> None:
    """One row's loops leave the next row its whole budget."""
    template = Template("{% for i in range(n) %}{% endfor %}ok")
    assert [template.render({"n": 600_000}) for _ in range(2)] == ["ok", "ok"]
