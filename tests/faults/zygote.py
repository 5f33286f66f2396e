"""Forks children that have everything imported already and wait until a debugger is attached.

    python -m tests.faults.zygote < folders

For each folder on standard input: prints the child's process id, lets it run `commit_and_roll_up`
there once it is traced, and prints how it ended. A start of the interpreter takes a hundred times
as long as what is to be traced.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.errors import ShardmillError
from tests.faults.steps import commit_and_roll_up

UNTRACED = 99
"""Exit code of a child to which nothing was attached."""

_PR_SET_PTRACER = 0x59616D61  # linux/prctl.h: who else may trace this process
_ANYBODY = ctypes.c_ulong(-1)
_ATTACH_LIMIT = 10.0  # seconds


def main() -> None:
    """Forks one child after the other, until standard input ends."""
    with TemporaryDirectory() as folder:
        commit_and_roll_up(Path(folder))  # what is imported late is imported now
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_live(Path(line.rstrip("\n"))))
        _say(child)
        _say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _live(folder: Path) -> int:
    """The child's life; returns its exit code."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY)
    if not _wait_for_tracer():
        return UNTRACED
    try:
        commit_and_roll_up(folder)
    except ShardmillError as error:
        return error.exit_code
    except BaseException:  # noqa: BLE001 - shown, and told apart by its code
        traceback.print_exc()
        return 1
    return 0


def _wait_for_tracer() -> bool:
    deadline = time.monotonic() + _ATTACH_LIMIT
    while time.monotonic() < deadline:
        if "\nTracerPid:\t0\n" not in Path("/proc/self/status").read_text():
            time.sleep(0.01)  # it has seized us; until it follows our calls takes a moment
            return True
        time.sleep(0.001)
    return False


if __name__ == "__main__":
    main()
