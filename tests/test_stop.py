"""Being asked to stop: the same, whatever asks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from jobs.stop import STOP_SIGNALS, StopRequest
from pipeline.errors import StoppedError


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_step_at_once(number: signal.Signals) -> None:
    """Where nothing is in flight, nobody waits for the step to end."""
    stop = StopRequest()
    with stop.listening(), pytest.raises(StoppedError, match=number.name):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_deferred_signal_only_says_so(number: signal.Signals) -> None:
    """Where workers have something to commit, the driver decides when."""
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        signal.raise_signal(number)
        assert stop.reason() == f"got {number.name}"
    with pytest.raises(StoppedError):
        stop.check()


def test_a_stop_file_does_not_count_as_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first signal after it still lets workers commit; only the second one ends at once."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    (tmp_path / "stop").touch()
    stop = StopRequest(stop_file=tmp_path / "stop")
    assert "stop file" in (stop.reason() or "")
    with stop.listening(), stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert exits == []
        signal.raise_signal(signal.SIGTERM)
    assert exits == [143]


def test_the_wall_time_comes_to_its_end() -> None:
    """And not before."""
    assert StopRequest(max_walltime=60).reason() is None
    assert "wall time" in (StopRequest(max_walltime=0).reason() or "")


def test_handlers_are_put_back() -> None:
    """What was there before a run is there after it."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
