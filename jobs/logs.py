"""Which log lines go where, and how they look in files."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

FILE_ONLY = {"is_for_file_only": True}
"""The `extra` of a message that is too long for the terminal, such as a traceback of Ray's."""


CHATTY = ("torchao",)
"""Libraries that warn when they are imported, whether they are used or not."""


class _TerminalHandler(logging.Handler):
    """Writes a line above the progress bar, if there is one."""

    def __init__(self, stream: TextIO, level: int) -> None:
        super().__init__(level)
        self._stream = stream

    def filter(self, record: logging.LogRecord) -> bool:
        """Our own messages, and those of libraries from warnings on, of some from errors on."""
        library = record.name.partition(".")[0]
        least = logging.ERROR if library in CHATTY else logging.WARNING
        is_shown = library in ("jobs", "pipeline") or record.levelno >= least
        return is_shown and not hasattr(record, "is_for_file_only")

    def emit(self, record: logging.LogRecord) -> None:
        # Who has stopped reading along must not stop the run.
        with suppress(BrokenPipeError):
            tqdm.write(f"shardmill: {self.format(record)}", file=self._stream)


def terminal_handler(stream: TextIO, level: int) -> logging.Handler:
    """A handler that shows messages from `level` on to somebody who watches."""
    return _TerminalHandler(stream, level)


def log_handler(path: Path) -> logging.Handler:
    """A handler that appends to `path`.

    Raises:
        OSError: it cannot be opened.
    """
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
