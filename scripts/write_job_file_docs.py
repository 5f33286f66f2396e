"""Writes docs/job-file.md from the settings:  python scripts/write_job_file_docs.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.config import JobConfig  # noqa: E402 - found only now

DOCS = ROOT / "docs" / "job-file.md"

HEAD = """# The job file

YAML, one block for each subject. Unknown and doubled keys are refused. Paths are relative to the
job file; those on the command line (`--set`, `--output`) to the current folder.
`shardmill schema` prints the JSON Schema for editors.

On the command line, `--set block.setting=value` changes a setting; the value is YAML, and text
needs no second pair of quotes. `--output`, `--limit` and `--workers` are short for `output.path`,
`input.limit` and `workers.count`.

This page is made by `python scripts/write_job_file_docs.py`.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_blocks()])


def _blocks() -> Iterator[str]:
    for name, field in JobConfig.model_fields.items():
        block = field.annotation
        yield f"## `{name}`\n"
        if not (isinstance(block, type) and issubclass(block, BaseModel)):
            yield f"{field.description} Required.\n"
            continue
        yield f"{(block.__doc__ or '').splitlines()[0]}\n"
        yield "| setting | default | |\n|---|---|---|"
        yield from _rows(block, "")
        yield ""


def _rows(block: type[BaseModel], prefix: str) -> Iterator[str]:
    for setting, details in block.model_fields.items():
        yield f"| `{prefix}{setting}` | {_default(details)} | {details.description} |"
        for part in (details.annotation, *get_args(details.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _rows(part, f"{prefix}{setting}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


if __name__ == "__main__":
    DOCS.write_text(render(), encoding="utf-8")
