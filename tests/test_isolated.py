"""The process of a measurement, as its caller sees it end."""

from __future__ import annotations

import signal

import pytest

from jobs import isolated
from jobs.isolated import Isolated, LostError


def test_a_process_that_hangs_up_and_goes_on_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no answer to give; nobody waits for it, and it is not left behind."""
    monkeypatch.setattr(isolated, "END_SECONDS", 0.5)
    with Isolated("tests.stuck_child", {}) as child:
        process = child._process
        with pytest.raises(LostError) as caught:
            child.ask("anything", timeout=60)
        assert caught.value.signal == signal.SIGKILL
        assert process.poll() == -signal.SIGKILL


def test_a_process_that_does_not_answer_is_ended() -> None:
    """Nor is one that has not hung up waited for longer than it was given."""
    with Isolated("tests.mute_child", {}) as child:
        with pytest.raises(LostError, match="gave no answer for 1 s") as caught:
            child.ask("anything", timeout=1)
        assert caught.value.is_late
        assert child._process.poll() == -signal.SIGKILL
