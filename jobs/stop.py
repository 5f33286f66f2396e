"""The ways a run is asked to stop: a signal, a file, a time limit. All mean the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipeline.errors import RayFailedError, StoppedError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

LOOK_INTERVAL = 1.0
"""Seconds between two looks at the stop file and the clock."""


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
        self._signal: str | None = None
        self._reason: str | None = None
        self._is_deferred = False
        self._has_interrupted = False
        self._is_reminded = False
        self._has_stopped = False

    def reason(self) -> str | None:
        """Why to stop, or None to go on; the first answer stays, whatever becomes of the file.

        A run that has begun to stop cannot go on: its workers have been told.
        """
        self._reason = self._reason or self._find_reason()
        return self._reason

    def _find_reason(self) -> str | None:
        if self._signal is not None:
            return f"got {self._signal}"
        if self._is_stop_file_there():
            return f"the stop file {self._stop_file} is there"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"the wall time of {self._max_walltime:.0f} s is over"
        return None

    def check(self) -> None:
        """Ends the run here if it shall stop; for the steps between which nothing is in flight.

        Raises:
            StoppedError: saying why.
        """
        if reason := self.reason():
            self._has_stopped = True
            first = f"remove {self._stop_file}, then " if self._is_stop_file_there() else ""
            raise StoppedError(f"stopped: {reason}; {first}run the same command again to continue")

    def _is_stop_file_there(self) -> bool:
        return self._stop_file is not None and os.path.exists(self._stop_file)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the stop signals for as long as the block lasts, and looks at file and clock.

        Raises:
            StoppedError: one of them has interrupted the block.
        """
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.reclaim()
        try:
            with self._looking():
                yield
        except Exception as error:
            # Raised in the midst of anything, it may come out as what that has made of it; and what
            # is sent to all processes of a run ends its Ray, too.
            if self._has_interrupted or isinstance(error, RayFailedError):
                self.check()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Has file and clock interrupt what a signal would, such as hashing or a download."""
        is_over = threading.Event()

        def look() -> None:
            while not is_over.wait(LOOK_INTERVAL) and not self._has_stopped:
                if not self._is_deferred and self.reason():
                    self._is_reminded = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

        thread = threading.Thread(target=look, name="stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def reclaim(self) -> None:
        """Takes the stop signals back from a library that has put its own handlers in front.

        Ray's prints a stack at SIGTERM, hands it on, and aborts the process three seconds later,
        which is too soon for workers that have something to commit.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.alarm(0)  # in case it has been asked to abort already

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In the block a first signal only sets the reason: workers have something to commit.

        Outside of it, it ends the run at once.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_reminded:
            self._is_reminded = False
            self._interrupt()
            return
        if self._signal is not None:
            # The user means it. Nothing committed can be lost, and Ray's processes end with us.
            os._exit(128 + number)
        self._signal = signal.Signals(number).name
        self._interrupt()

    def _interrupt(self) -> None:
        # A second exception would cut short the cleaning up after the first.
        if not self._is_deferred and not self._has_stopped:
            self._has_interrupted = True
            self.check()
