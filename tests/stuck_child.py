"""A process that hangs up and goes on: `python -m tests.stuck_child DESCRIPTOR`."""

from __future__ import annotations

import os
import sys
import time

os.close(int(sys.argv[1]))
time.sleep(600)
