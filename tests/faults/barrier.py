"""The command line, ready to go, at a gate: `python -m tests.faults.barrier GATE -m jobs …`.

It starts when the file GATE appears, so that several start in the same few milliseconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jobs.run  # noqa: F401 - what takes time is done before the gate
from jobs.cli import main

if __name__ == "__main__":
    _, gate, _, _, *arguments = sys.argv
    Path(f"{gate}.{time.monotonic_ns()}").touch()
    while not Path(gate).exists():
        time.sleep(0.001)
    sys.argv = ["shardmill", *arguments]
    main()
