"""A process that runs commands one after the other, so that a crash or a hang costs no test run.

    python -m tests.faults.border < commands

For each list of arguments, a line of JSON, it prints a line of JSON: exit code, standard output
and standard error. There is no Ray in it: a job that gets so far finds no cluster.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import NoReturn
from unittest.mock import patch

from jobs.cli import main as command_line
from pipeline.errors import ResourceError
from tests.small_jobs import Result

ROOT = Path(__file__).parents[2]
LIMIT = 60.0
"""Seconds after which a command hangs."""


class Border:
    """The other side: starts the process, and starts it anew when a command has killed it."""

    def __init__(self) -> None:
        self._start()

    def call(self, *arguments: object) -> Result:
        """Runs a command; one that dies has minus its signal as its code.

        Raises:
            queue.Empty: it hangs.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._answers.get(timeout=LIMIT)
        if answer is None:
            code = self._process.wait()
            self.close()
            self._start()
            return Result(code, "", "")
        return Result(**json.loads(answer))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.border"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._answers: Queue[str | None] = Queue()
        self._listener = Thread(target=self._listen, args=(self._process, self._answers))
        self._listener.start()

    @staticmethod
    def _listen(process: subprocess.Popen[str], answers: Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put(None)


def main() -> None:
    """Runs commands until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with patch("jobs.run.ray_cluster", _no_cluster):
        for line in sys.stdin:
            answers.write(json.dumps(_run(json.loads(line))) + "\n")
            answers.flush()


@contextmanager
def _no_cluster(address: str | None) -> Iterator[NoReturn]:
    raise ResourceError("there is no Ray at the border")
    yield


def _run(arguments: list[str]) -> dict[str, object]:
    sys.argv = ["shardmill", *arguments]
    logging.getLogger().handlers.clear()
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command_line()
        except SystemExit as ended:
            code = ended.code
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


if __name__ == "__main__":
    main()
