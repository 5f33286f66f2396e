"""Being asked to stop: the same, whatever asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import stop as stop_module
from jobs.content import content_digests
from jobs.stop import STOP_SIGNALS, StopRequest
from pipeline.errors import RayFailedError, StoppedError


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_step_at_once(number: signal.Signals) -> None:
    """Where nothing is in flight, nobody waits for the step to end."""
    stop = StopRequest()
    with stop.listening(), pytest.raises(StoppedError, match=number.name):
        signal.raise_signal(number)


def test_a_signal_in_the_midst_of_a_library_is_no_bug_of_it() -> None:
    """Code that is not made for it turns the exception into another one; it is a stop even so."""

    def make_a_lock() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise AttributeError("a lock that was about to be made")

    with pytest.raises(StoppedError, match="SIGTERM"), StopRequest().listening():
        make_a_lock()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_deferred_signal_only_says_so(number: signal.Signals) -> None:
    """Where workers have something to commit, the driver decides when."""
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        signal.raise_signal(number)
        assert stop.reason() == f"got {number.name}"
    with pytest.raises(StoppedError):
        stop.check()


def test_a_stop_file_has_to_go_first(tmp_path: Path) -> None:
    """The same command would stop again at once, whatever it was that has stopped it now."""
    for late in (False, True):
        stop = StopRequest(tmp_path / "stop")
        stop._signal = "SIGTERM" if late else None
        (tmp_path / "stop").touch()
        words = "got SIGTERM" if late else "the stop file .* is there"
        with pytest.raises(StoppedError, match=f"stopped: {words}; remove .*stop, then run the"):
            stop.check()
        (tmp_path / "stop").unlink()
        with pytest.raises(StoppedError, match=f"stopped: {words}; run the same command again"):
            stop.check()


def test_a_stop_file_that_goes_again_has_stopped_the_run(tmp_path: Path) -> None:
    """Its workers have been told and take nothing more: going on, the driver would never end."""
    stop = StopRequest(tmp_path / "stop")
    assert stop.reason() is None
    (tmp_path / "stop").touch()
    reason = stop.reason()
    (tmp_path / "stop").unlink()
    assert stop.reason() == reason is not None
    with pytest.raises(StoppedError):
        stop.check()


def test_a_signal_does_not_cut_short_what_a_stop_has_to_clean_up(tmp_path: Path) -> None:
    """The lock is given back after the last part, and not while that is being written."""
    (tmp_path / "stop").touch()
    stop, done = StopRequest(tmp_path / "stop"), []

    def run() -> None:
        try:
            stop.check()
        finally:
            signal.raise_signal(signal.SIGTERM)
            done.append("cleaned up")

    with pytest.raises(StoppedError), stop.listening():
        run()
    assert done == ["cleaned up"]


@pytest.mark.timeout(20)
def test_hashing_ends_with_the_run(tmp_path: Path) -> None:
    """Threads that read large files hear of it, too: hashing these takes a minute."""
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.touch()
        os.truncate(path, 2**36)
    stop = StopRequest(max_walltime=0.2)
    with pytest.raises(StoppedError, match="wall time"), stop.listening():
        content_digests(paths)


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


def _sleep(stop: StopRequest, seconds: float) -> None:
    """A step of a run that looks at nothing."""
    with stop.listening():
        time.sleep(seconds)
        raise AssertionError("nobody has ended it")


@pytest.mark.parametrize("is_file", [True, False])
def test_file_and_clock_end_a_step_as_a_signal_does(tmp_path: Path, is_file: bool) -> None:
    """Hashing a terabyte, or a download, looks at neither; the scheduler's time is over, though."""
    stop = StopRequest(tmp_path / "stop", max_walltime=None if is_file else 0.1)
    if is_file:
        (tmp_path / "stop").touch()
    with pytest.raises(StoppedError, match="the stop file" if is_file else "wall time"):
        _sleep(stop, 20)


def test_file_and_clock_wait_where_workers_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are seen when the driver has ended, and do not count as a first signal."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(stop_module, "LOOK_INTERVAL", 0.01)
    stop, seen = StopRequest(tmp_path / "stop"), []

    def run() -> None:
        with stop.deferred():
            (tmp_path / "stop").touch()
            time.sleep(0.2)
            seen.append(stop.reason())
            signal.raise_signal(signal.SIGTERM)
        _sleep(stop, 20)

    with pytest.raises(StoppedError), stop.listening():
        run()
    assert exits == []
    assert seen == [f"the stop file {tmp_path / 'stop'} is there"]


def test_a_ray_that_ends_with_a_stop_is_a_stop() -> None:
    """What is sent to all processes of a run ends its Ray first, which is no failure."""

    def run(stop: StopRequest) -> None:
        with stop.listening(), stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            raise RayFailedError("Ray has ended")

    with pytest.raises(StoppedError, match="SIGTERM"):
        run(StopRequest())


def test_handlers_are_put_back() -> None:
    """What was there before a run is there after it."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


SLOW_TO_STOP = """
import os, signal, time
from contextlib import suppress
from typing import Any
from jobs.progress import Silent
from jobs.run import Run, RunOptions
from jobs.stop import StopRequest
from pipeline.errors import StoppedError

nothing: Any = None
stop = StopRequest()
run = Run(nothing, nothing, RunOptions(), stop, Silent())
with suppress(StoppedError), stop.listening(), run.ray(), stop.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)
    print(stop.reason())
"""


def test_ray_does_not_cut_the_time_to_stop_short() -> None:
    """Workers may take longer to commit than the three seconds that Ray leaves after SIGTERM."""
    done = subprocess.run(
        [sys.executable, "-c", SLOW_TO_STOP], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "got SIGTERM"
    assert "SIGTERM received at" not in done.stderr
