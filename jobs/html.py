"""A `Page` as one HTML file that needs nothing beside it."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from jobs.page import Page
from pipeline.publish import output_errors, replace, temporary_file

_TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ page.title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse; margin: 0.5em 0 2em }
th, td { padding: 0.15em 0.8em; text-align: right; border-bottom: 1px solid #ddd;
  font-variant-numeric: tabular-nums; vertical-align: top }
th { font-weight: 600 }
.name { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto }
</style>
<h1>{{ page.title }}</h1>
<table>
{%- for name, text in page.facts %}
<tr><th class="name">{{ name }}<td class="name">{{ text }}
{%- endfor %}
</table>
{{ plot }}
{%- for table in page.tables %}
<h2>{{ table.title }}</h2>
<table>
{%- if table.header %}
<tr>{% for cell in table.header %}<th{{ left if table.is_name(loop.index0) }}>{{ cell }}{% endfor %}
{%- endif %}
{%- for row in table.rows %}
<tr>{% for cell in row %}<td{{ left if table.is_name(loop.index0) }}>{{ cell }}{% endfor %}
{%- endfor %}
</table>
{%- endfor %}
{%- for note in page.notes %}
<p>{{ note }}
{%- endfor %}
</html>
"""


def page_html(page: Page, plot: str = "") -> str:
    """The page; `plot` is an SVG element."""
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render(page=page, plot=Markup(plot), left=Markup(' class="name"'))


def write_html(path: Path, html: str) -> None:
    """Writes the file, or replaces it, whole.

    Raises:
        OutputError: it cannot be written.
    """
    folder = path.absolute().parent
    with output_errors(folder), temporary_file(folder, path.name, ".tmp") as temporary:
        temporary.write_text(html, encoding="utf-8")
        replace(temporary, path.absolute())
