"""How log lines look in files."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.publish import output_errors


def log_handler(path: Path) -> logging.Handler:
    """A handler that appends to `path`.

    Raises:
        OutputError: it cannot be opened.
    """
    with output_errors(path.parent):
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
