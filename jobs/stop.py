"""The ways a run is asked to stop: a signal, a file, a time limit. All mean the same."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether, and why, the run shall stop.

    Args:
        stop_file: stop when this file is there.
        max_walltime: stop this many seconds after now.
    """

    def __init__(self, stop_file: Path | None = None, max_walltime: float | None = None) -> None:
        self._stop_file = stop_file
        self._max_walltime = max_walltime
        self._deadline = None if max_walltime is None else time.monotonic() + max_walltime
        self._reason: str | None = None

    def reason(self) -> str | None:
        """Why to stop, or None to go on."""
        if self._reason is None:
            if self._stop_file is not None and self._stop_file.exists():
                self._reason = f"the stop file {self._stop_file} is there"
            elif self._deadline is not None and time.monotonic() >= self._deadline:
                self._reason = f"the wall time of {self._max_walltime:.0f} s is over"
        return self._reason

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the stop signals for as long as the block lasts.

        Enter it after `ray.init`, which installs handlers of its own.
        """
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reason is not None:
            # The user means it. Nothing committed can be lost, and Ray's processes end with us.
            os._exit(128 + number)
        self._reason = f"got {signal.Signals(number).name}"
