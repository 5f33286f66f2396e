"""The docs say what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.write_job_file_docs import DOCS, render

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_job_file_page_is_up_to_date() -> None:
    """Every setting with its default and description, as the code has them."""
    assert DOCS.read_text(encoding="utf-8") == render()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """No page points at a file that is not there."""
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_source_file_has_its_place_in_the_architecture() -> None:
    """A newcomer finds each file on the page that explains the files."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in ("jobs", "pipeline"):
        for path in (ROOT / package).glob("*.py"):
            if not path.name.startswith("__"):
                assert f"`{path.name}`" in page, f"{package}/{path.name}"
