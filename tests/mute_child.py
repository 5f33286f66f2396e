"""A process that never answers: `python -m tests.mute_child DESCRIPTOR`."""

from __future__ import annotations

import time

time.sleep(600)
