"""Runs a job on the real command line and kills its processes at random until it is complete."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.small_jobs import shardmill

ROOT = Path(__file__).parents[2]

RUN_LIMIT = 300.0
"""Seconds that a run may take that nobody kills, on a busy machine."""

DEATH_LIMIT = 120.0
"""Seconds in which a run must have ended after what it cannot do without was killed."""

LIFE = (0.5, 18.0)
"""Least and most seconds that a run is given; its workers are ready after about ten."""

WORKER_LIFE = (0.2, 5.0)
"""Likewise for a worker, after it has appeared or another one was killed."""

MAX_WORKER_KILLS = 2
"""In one run: a third might hit the same rows, which the run would then rightly suspect."""

CODES = {
    "driver": {-9},
    "group": {-9},
    "tree": {-9},
    "raylet": {69, 1},  # 1 is Ray's own, when a part of it is gone before all have started
    "gcs_server": {69, 1},
}
"""How a run may end when this was killed; 0 is possible too, if it was done by then."""

ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
"""For the sake of time: Ray's start would wait a minute for a head that is gone."""


@dataclass
class Campaign:
    """One job, killed over and over.

    Attributes:
        arguments: of `shardmill`.
        folder: for what the runs say on standard error.
        scratch: a folder for Ray; its path must be short.
        module: the command line; another one than the real has a fault in it.
        max_worker_kills: in one run.
        kills: what has been killed, and how often.
        codes: the exit codes of the runs.
    """

    arguments: list[str]
    folder: Path
    scratch: Path
    seed: int
    module: str = "jobs"
    max_worker_kills: int = MAX_WORKER_KILLS
    kills: Counter[str] = field(default_factory=Counter)
    codes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def run(self, num_kills: int) -> None:
        """Runs the same command again and again; nothing is killed any more after `num_kills`."""
        while self.kills.total() < num_kills:
            if self._disturbed_run(num_kills) == 0:
                return
        process = self.start()
        assert process.wait(RUN_LIMIT) == 0, self.last_words()
        self.codes.append(0)

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the command, in a process group of its own."""
        with (self.folder / f"{len(self.codes)}.err").open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(self.scratch)},
                cwd=ROOT,
                start_new_session=True,
            )

    def last_words(self) -> str:
        """What the last run has written to standard error."""
        return (self.folder / f"{len(self.codes)}.err").read_text(errors="replace")

    def _disturbed_run(self, num_kills: int) -> int:
        """One run, of which up to two workers are killed and then something it cannot spare."""
        process = self.start()
        ends_at = time.monotonic() + self._chance.uniform(*LIFE)
        for _ in range(self._chance.randint(0, self.max_worker_kills)):
            if self.kills.total() + 1 < num_kills and self._wait_for_worker(process, ends_at):
                self.kill(process, "worker")
        what = self._chance.choice(sorted(CODES))
        if self._is_running(process, ends_at - time.monotonic()) and self.kill(process, what):
            code = process.wait(DEATH_LIMIT)
            assert code in CODES[what] | {0}, f"{what} killed, then {code}: {self.last_words()}"
        else:
            code = process.wait(RUN_LIMIT)
            assert code == 0, self.last_words()
        self.codes.append(code)
        return code

    def _wait_for_worker(self, process: subprocess.Popen[bytes], ends_at: float) -> bool:
        """Waits for a worker, and a random time more; whether there is one then."""
        while time.monotonic() < ends_at and self._is_running(process, 0.1):
            if "worker" in processes_of(process.pid):
                return self._is_running(process, self._chance.uniform(*WORKER_LIFE))
        return False

    @staticmethod
    def _is_running(process: subprocess.Popen[bytes], seconds: float) -> bool:
        """Waits so long; whether the run still goes on then."""
        try:
            process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return True
        return False

    def kill(self, process: subprocess.Popen[bytes], what: str) -> bool:
        """Kills that part of a run; whether it was there."""
        victims = processes_of(process.pid).get(what, [])
        if what == "group" and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            victims = []
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        is_done = what == "group" or bool(victims)
        self.kills[what] += is_done
        return is_done


def processes_of(driver: int) -> dict[str, list[psutil.Process]]:
    """What can be killed of a run.

    The driver, its process group (Ray's workers have groups of their own and outlive it by a
    moment), the tree of all processes below it, one worker, and two parts of Ray.
    """
    try:
        root = psutil.Process(driver)
        below = root.children(recursive=True)
    except psutil.NoSuchProcess:
        return {}
    found: dict[str, list[psutil.Process]] = {"driver": [root], "tree": [root, *below]}
    for process in below:
        name = _name(process)
        if re.match(r"ray::\w*Worker", name):  # with a fault in it, too
            found["worker"] = [process]
        elif name in ("raylet", "gcs_server"):
            found[name] = [process]
    return found


def _name(process: psutil.Process) -> str:
    try:
        command = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
    return Path(command[0].split()[0]).name if command and command[0] else ""


def prove_complete(output: Path) -> None:
    """Asserts that `verify` finds all rows and nothing wrong, and that nothing is left over."""
    proof = shardmill("verify", output, "--json")
    assert proof.code == 0, proof.stdout
    assert proof.json["state"] == "complete"
    assert proof.json["damage"] == proof.json["missing"] == []
    assert list((output / ".shardmill" / "tmp").iterdir()) == []
