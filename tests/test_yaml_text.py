"""A text that is written as YAML is the same text when it is read."""

from __future__ import annotations

import yaml
from hypothesis import example, given

from jobs.yaml_text import dump_yaml, dump_yaml_documents
from tests.submissions import texts


@given(text=texts)
@example(text="next\x85line")
@example(text="\u2028")
@example(text="a\n\u2029\n b \n")
@example(text="\n\t:\r\n")
def test_texts_stay_as_they_are(text: str) -> None:
    """PyYAML by itself gives other texts back where there are YAML's rarer line breaks."""
    content = {"b": text, text or "a": [text, {"deep": text}]}
    assert yaml.safe_load(dump_yaml(content)) == content
    assert list(yaml.safe_load_all(dump_yaml_documents(content, {}))) == [content, {}]


def test_lines_look_like_lines() -> None:
    """A prompt is to be read and mended by people."""
    assert (
        dump_yaml({"template": "Question:\n{{ q }}\n"}) == "template: |\n  Question:\n  {{ q }}\n"
    )
