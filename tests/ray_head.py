"""A Ray cluster of one node as somebody else keeps it: with a dashboard, and a token."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT = 100.0
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


class RayHead:
    """Starts one, in a folder of its own; it ends with the `with` block."""

    def __init__(self, num_cpus: int) -> None:
        self._num_cpus = num_cpus
        self._port = _free_port()
        self.dashboard = f"http://127.0.0.1:{self._port}"
        self._token = secrets.token_hex(16)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        self.environment["RAY_USAGE_STATS_ENABLED"] = "0"
        self.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"

    def __enter__(self) -> RayHead:
        # A short path: the names of Ray's sockets must fit in 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="sm-", dir="/tmp"))
        options = [f"--temp-dir={self._folder}", f"--port={_free_port()}", "--block"]
        options += [f"--dashboard-port={self._port}", "--include-dashboard=true"]
        options += [f"--num-cpus={self._num_cpus}", f"--ray-client-server-port={_free_port()}"]
        options += ["--dashboard-agent-listen-port=0", "--object-store-memory=83886080"]
        with (self._folder / "head.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *options],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait_for(self._answers)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until something is so."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self._process.poll() is None, (self._folder / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def job(self, identity: str) -> dict[str, Any]:
        """What Ray says of a job."""
        facts: dict[str, Any] = json.loads(self._ask("GET", f"/api/jobs/{identity}"))
        return facts

    def stop(self, identity: str) -> None:
        """What `ray job stop` does."""
        self._ask("POST", f"/api/jobs/{identity}/stop")

    def wait_for_end(self, identity: str) -> dict[str, Any]:
        """What Ray says of a job once it has ended."""
        self.wait_for(lambda: self.job(identity)["status"] in ENDED)
        return self.job(identity)

    def _answers(self) -> bool:
        try:
            self._ask("GET", "/api/jobs/")
        except urllib.error.URLError:
            return False
        return True

    def _ask(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(f"{self.dashboard}{path}", method=method)
        request.add_header("Authorization", f"Bearer {self._token}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            content: bytes = answer.read()
            return content


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
