"""A job's Jinja template: checked once, then rendered row by row within limits.

Knows nothing of tokenizers or of which columns there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import JobFileError, RowError

MAX_CHARS = 10_000_000  # of one rendered prompt: far beyond any model's context
_MAX_STEPS = 1_000_000  # that `range` may yield in one rendering
_MAX_POWER_BITS = 10_000
_FUNCTIONS = ("cycler", "dict", "joiner", "namespace")


class Template:
    """A compiled prompt template.

    Args:
        source: sandboxed Jinja; a newline at its end is kept.

    Attributes:
        columns: the columns that it takes from a row.
        functions: Jinja's own functions that it uses; they hide columns of the same name.

    Raises:
        JobFileError: the template is not valid Jinja, or asks for other templates.
    """

    def __init__(self, source: str) -> None:
        environment = _Environment()
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise JobFileError(
                f"prompt.template, line {error.lineno}: {(error.message or '').rstrip('.')}; "
                "correct the Jinja there."
            ) from error
        _refuse_other_templates(tree)
        names = meta.find_undeclared_variables(tree)
        self._functions = environment.functions
        self.functions = frozenset(names & {*self._functions, "range"})
        self.columns = frozenset(names - self.functions)

    def render(self, row: Mapping[str, object]) -> str:
        """The prompt of one row.

        Raises:
            RowError: `null_column` where the template uses a null's value, else `template`.
        """
        values = {name: _value(name, row[name]) for name in self.columns if name in row}
        try:
            return self._render({**self._functions, "range": _BoundedRange(), **values})
        except RowError:
            raise
        except _NullUsedError as error:
            raise RowError("null_column", str(error)) from error
        # A template is a program: it may raise anything, and that is the row's fault.
        except Exception as error:
            raise RowError("template", f"{type(error).__name__}: {error}") from error

    def _render(self, context: dict[str, object]) -> str:
        pieces, num_chars = [], 0
        for piece in self._template.generate(context):
            num_chars += len(piece)
            if num_chars > MAX_CHARS:
                raise RowError("template", f"the prompt is longer than {MAX_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)


class _NullUsedError(jinja2.UndefinedError):
    """The template used the value of a null."""


class _Null(jinja2.StrictUndefined):
    """Stands for a null: false, and equal to none; any other use of it raises.

    So `{% if x %}`, `x is none` and `x | default('')` deal with a null, and nothing prints "None".
    """

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return other is None or isinstance(other, _Null)

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not self == other

    __hash__ = None  # type: ignore[assignment]


def _value(name: str, value: object) -> object:
    if value is None:
        return _Null(hint=f"column '{name}' is null", name=name, exc=_NullUsedError)
    return value


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja without chance, without other templates, and with an end to repetition."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_printable
        )
        # A retried row must get the same prompt, so there is neither `random` nor `lipsum`.
        del self.filters["random"]
        # Given with each rendering instead: `range` has a budget per row, and Jinja's parser
        # does not report the use of a global, which may be meant for a column.
        self.functions = {name: self.globals[name] for name in _FUNCTIONS}
        self.globals.clear()
        self.tests["none"] = lambda value: value is None or isinstance(value, _Null)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_repeat(left, right)
            _check_repeat(right, left)
        elif isinstance(left, int) and isinstance(right, int):
            _check_size("power", left.bit_length() * right, _MAX_POWER_BITS)
        return super().call_binop(context, operator, left, right)


def _check_repeat(value: object, times: object) -> None:
    if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
        _check_size("repetition", len(value) * times, MAX_CHARS)


def _check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise RowError("template", f"a {what} of size {size} is over the limit of {limit}")


class _BoundedRange:
    """`range` with a budget, so that nested loops come to an end."""

    def __init__(self) -> None:
        self._left = _MAX_STEPS

    def __call__(self, *args: int) -> range:
        steps = range(*args)
        self._left -= len(steps)
        if self._left < 0:
            raise RowError("template", f"its ranges are longer than {_MAX_STEPS} in all")
        return steps


def _printable(value: object) -> object:
    """What `{{ }}` may print: neither a null inside a value nor bytes."""
    if value is None:
        raise RowError("null_column", "the template prints a null that is inside a column")
    if isinstance(value, bytes):
        raise RowError("template", "the template prints a binary column; prompts are text")
    return value


def _refuse_other_templates(tree: nodes.Template) -> None:
    if list(meta.find_referenced_templates(tree)):
        raise JobFileError(
            "prompt.template uses include, import or extends: a prompt is one template; put the "
            "other's text into it."
        )
