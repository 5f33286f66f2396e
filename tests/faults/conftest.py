"""What fault tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short path: the names of Ray's sockets must fit in 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="sm-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
