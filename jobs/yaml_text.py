"""YAML as people like to read it, which says the same when it is read back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

_OTHER_BREAKS = re.compile("[\x85\u2028\u2029]")


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as it looks, where YAML has a way to."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes YAML's other line breaks as they are, and reads them back as spaces or as
        # newlines; it escapes them between double quotes only.
        style = '"' if _OTHER_BREAKS.search(data) else "|" if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def dump_yaml(content: Mapping[str, Any]) -> str:
    """One document, its keys in the order that they are in."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_yaml_documents(*documents: Mapping[str, Any]) -> str:
    """Several documents in one text, each behind a line of `---`."""
    return yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, explicit_start=True
    )
