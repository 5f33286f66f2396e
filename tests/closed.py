"""Folders that may not be entered, also for root, whom no mode keeps out."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest


def close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing below `folder` can be looked at, though it is there."""
    look = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if not isinstance(path, int) and folder in Path(os.fsdecode(path)).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
