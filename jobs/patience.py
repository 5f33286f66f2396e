"""How long a worker may take, and for what, before it counts as lost. Asks Ray for nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from jobs.member import Member

logger = logging.getLogger(__name__)

PLACE_TIMEOUT = 300.0
"""Seconds for Ray to find room for one worker's process at least, and start it."""

DOWNLOAD_TIMEOUT = 6 * 3600.0
"""Seconds for a model to arrive on a node."""

LOAD_TIMEOUT = 3600.0
"""Seconds to load a model: hundreds of gigabytes from a slow disk fit in."""

PAUSE = 10.0
"""Seconds between two looks at the workers, beyond what was to be waited, that are no wait for
them: this process was stopped, or stood before a file system that did not answer."""


class Patience:
    """With the workers of one run.

    Args:
        stall_timeout: seconds without a new token or commit, for one that has something to do.
    """

    def __init__(self, stall_timeout: float) -> None:
        self._stall_timeout = stall_timeout
        self._looked_at = time.monotonic()
        self._had_room_at: float | None = None

    def look(self, members: Sequence[Member], waited: float) -> None:
        """Called before workers are judged: forgives them what this process itself has lost.

        Args:
            waited: seconds that were to pass since the last look.
        """
        now = time.monotonic()
        pause = now - self._looked_at - waited
        self._looked_at = now
        if pause > PAUSE:
            logger.warning("this process stood still for %.0f s; no worker is blamed", pause)
            for member in members:
                member.moved_at = min(now, member.moved_at + pause)
            if self._had_room_at is not None:
                self._had_room_at = min(now, self._had_room_at + pause)

    def has_room(self, members: Sequence[Member]) -> bool:
        """False if no worker at all has found room for too long.

        While others work, one that finds none waits for it: its node may come back.
        """
        now = time.monotonic()
        if self._had_room_at is None or any(member.has_room for member in members):
            self._had_room_at = now
        return now - self._had_room_at <= PLACE_TIMEOUT

    def exhausted(self, member: Member) -> str | None:
        """Why a member counts as lost; None if it may go on."""
        silence = time.monotonic() - member.moved_at
        if member.is_asked("place") and silence > PLACE_TIMEOUT:
            logger.warning("worker %d: no room for %.0f s; it waits", member.index, silence)
            member.moved_at = time.monotonic()
        if member.is_asked("fetch") and silence > DOWNLOAD_TIMEOUT:
            return f"its model was not downloaded in {DOWNLOAD_TIMEOUT:.0f} s"
        if member.is_asked("load") and silence > LOAD_TIMEOUT:
            return f"its model was not loaded in {LOAD_TIMEOUT:.0f} s"
        is_busy = member.shards() or member.is_asked("release")
        if is_busy and silence > self._stall_timeout:
            return f"it stood still for {self._stall_timeout:.0f} s"
        return None
