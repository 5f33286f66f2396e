"""A service in a process of its own, asked one thing at a time: both sides of the pipe.

Its memory is its own, its death costs nobody else, and it ends with us, however we end: then the
pipe is closed, and a thread of it does nothing but wait for that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pipeline.errors import ShardmillError

END_SECONDS = 10.0
"""For a process that has been killed to be gone."""
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Reply:
    """What the service says to a question: a value, or the error that it has raised."""

    value: Any = None
    error: ShardmillError | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """What it says while it works."""

    value: Any


Tell = Callable[[Any], None]
Service = Callable[[Any, Tell], Any]
"""Question and what notes are given to -> answer."""
Open = Callable[[Any, Tell], tuple[Service, Any]]
"""The first question -> the service for all others, and the answer."""


def serve(descriptor: int, open_service: Open) -> None:
    """Answers questions until whoever started this process is gone, which ends it at once.

    Args:
        descriptor: number of the pipe's end.
    """
    connection: Connection[Any, Any] = Connection(descriptor)
    questions: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, questions), daemon=True).start()

    def tell(value: Any) -> None:
        connection.send(Note(value))

    service: Service | None = None
    while True:
        question = questions.get()
        try:
            if service is None:
                service, answer = open_service(question, tell)
            else:
                answer = service(question, tell)
        except ShardmillError as error:
            connection.send(Reply(error=error))
        else:
            connection.send(Reply(answer))


def _listen(connection: Connection[Any, Any], questions: SimpleQueue[Any]) -> None:
    """Hands questions on; in a thread of its own, to hear of the end in the midst of work."""
    try:
        while True:
            questions.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


class LostError(Exception):
    """The process is gone, or had to be ended.

    Args:
        signal: the one that killed it; 0 if it ended by itself.
        is_late: it was ended because it did not answer in time.
    """

    def __init__(self, message: str, signal: int = 0, is_late: bool = False) -> None:
        super().__init__(message)
        self.signal = signal
        self.is_late = is_late


class Isolated:
    """A process that serves, for as long as the block of this context manager lasts.

    Args:
        module: is run with the number of a pipe's end as its argument, to `serve` there.
        environment: beside our own.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        ours, theirs = Pipe()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen(
                # -P: a folder named `jobs` where the user happens to stand is not ours.
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # facts alone go to standard output
                # Ctrl-C is for us: we end the process, and it need not say so too.
                start_new_session=True,
            )
        self._connection = ours

    def ask(self, question: Any, timeout: float, on_note: Tell = lambda value: None) -> Any:
        """What the service answers.

        Args:
            timeout: seconds that may pass without an answer or a note.
            on_note: is given each note.

        Raises:
            LostError: there will be no answer; the process is gone.
            ShardmillError: the service has raised it.
        """
        try:
            self._connection.send(question)
            while self._connection.poll(timeout):
                message = self._connection.recv()
                if isinstance(message, Reply):
                    if message.error is not None:
                        raise message.error
                    return message.value
                on_note(message.value)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise self._lost() from None
        self.close()
        raise LostError(f"gave no answer for {timeout:.0f} s", is_late=True)

    def _lost(self) -> LostError:
        code = self._wait()
        if code < 0:
            return LostError(f"was killed by signal {-code}", signal=-code)
        return LostError(f"ended with code {code}; its last words are above")

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._wait()
        self._connection.close()

    def _wait(self) -> int:
        started = time.monotonic()
        try:
            return self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # it has closed its end and goes on, or hangs in a driver
            self._process.kill()
            left = max(0.0, started + 2 * END_SECONDS - time.monotonic())
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(left)
            return -signal.SIGKILL  # it is dead as soon as the driver lets go of it

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
