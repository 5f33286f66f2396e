"""Hosts on one machine: each a network namespace with an address and a name of its own.

They hang on one switch by a link each, and a link can be cut. Nothing of it is seen, or can be
disturbed, by the machine's own network.

The hosts see the same files, as nodes with a network file system do. Only Ray's folder is each
host's own, at the same path: there nodes keep their sockets and who they are.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.faults.nodes import ENVIRONMENT, ROOT

PORT = 6379
LIMIT = 60.0
"""Seconds in which a head must be there, and what was killed must be gone."""

_NAMESPACE = re.compile(r"shardmill-(\d+)-\w+")
_ENTER = 'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'


def why_not() -> str | None:
    """Why there can be no such hosts here, or None."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if missing := [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]:
        return f"{', '.join(missing)} is not installed"
    name = _namespace("probe")
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "name", "switch", "type", "bridge")
        _ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    finally:
        _remove(name)
    return None


@dataclass(frozen=True)
class Host:
    """A machine as far as the network goes, and as Ray sees it.

    Attributes:
        name: its host name.
        ray_folder: what every host has at this path ...
        own_folder: ... is for this one here.
    """

    name: str
    address: str
    ray_folder: Path
    own_folder: Path

    def inside(self, *command: object) -> list[str]:
        """The command that runs another one on this host, as the same process."""
        enter = ["ip", "netns", "exec", _namespace(self.name), "unshare", "--uts"]
        folders = [str(self.own_folder), str(self.ray_folder)]
        return [*enter, "sh", "-c", _ENTER, "sh", self.name, *folders, *map(str, command)]

    def cut(self) -> None:
        """Nothing reaches the host any more, nothing comes from it; nobody is told."""
        _ip("-n", _namespace("switch"), "link", "set", self.name, "down")

    def restore(self) -> None:
        """The link works as before."""
        _ip("-n", _namespace("switch"), "link", "set", self.name, "up")

    def kill(self) -> None:
        """All that runs on the host is gone, as when it loses power."""
        _kill(_namespace(self.name))


@contextmanager
def hosts(scratch: Path, count: int) -> Iterator[list[Host]]:
    """So many hosts that reach each other, for as long as the block lasts.

    Args:
        scratch: a folder whose path must be short, for the names of Ray's sockets.
    """
    _sweep()
    (scratch / "ray").mkdir()
    names = [f"host{number}" for number in range(count)]
    try:
        _ip("netns", "add", _namespace("switch"))
        _ip("-n", _namespace("switch"), "link", "add", "name", "switch", "type", "bridge")
        _ip("-n", _namespace("switch"), "link", "set", "switch", "up")
        yield [_make(name, f"10.0.0.{n}", scratch) for n, name in enumerate(names, 1)]
    finally:
        for name in (*names, "switch"):
            _remove(_namespace(name))


def _make(name: str, address: str, scratch: Path) -> Host:
    namespace, switch, own = _namespace(name), _namespace("switch"), scratch / name
    own.mkdir()
    _ip("netns", "add", namespace)
    link = ("type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("-n", switch, "link", "add", "name", name, *link)
    _ip("-n", switch, "link", "set", name, "master", "switch", "up")
    _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")
    # Ray finds its own address by asking which way a packet to the internet would take.
    _ip("-n", namespace, "route", "add", "default", "dev", "eth0")
    return Host(name, address, scratch / "ray", own)


class Cluster:
    """A Ray cluster with a token: a head without cores, and nodes of one core.

    Attributes:
        environment: for whoever joins it.
    """

    def __init__(self, head: Host, *nodes: Host) -> None:
        self.environment = {
            **ENVIRONMENT,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_TMPDIR": str(head.ray_folder),
            "PYTHONPATH": str(ROOT),
        }
        self.head = head
        self._nodes = nodes
        self._processes: dict[Host, subprocess.Popen[bytes]] = {}
        self.address = f"{head.address}:{PORT}"

    def __enter__(self) -> Cluster:
        self._start(
            self.head, "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"
        )
        self._await_head()
        for node in self._nodes:
            self.add(node)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for host, process in self._processes.items():
            host.kill()
            process.wait(LIMIT)

    def add(self, host: Host) -> None:
        """Has a node join."""
        self._start(host, f"--address={self.address}", "--num-cpus=1")

    def rejoin(self, host: Host) -> None:
        """What a service manager does: starts a node once more when its Ray has ended."""
        self._processes[host].wait(LIMIT)
        self.add(host)

    def _await_head(self) -> None:
        deadline = time.monotonic() + LIMIT
        while "Ray runtime started" not in (log := _log(self.head).read_text()):
            assert time.monotonic() < deadline, log
            time.sleep(0.1)

    def _start(self, host: Host, *options: str) -> None:
        common = [f"--node-ip-address={host.address}", "--block", "--disable-usage-stats"]
        common += ["--object-store-memory=83886080"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        with _log(host).open("ab") as log:
            self._processes[host] = subprocess.Popen(
                host.inside(*ray, *options, *common),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                cwd=ROOT,
            )


def _log(host: Host) -> Path:
    return host.own_folder / "start.log"


def _namespace(name: str) -> str:
    return f"shardmill-{os.getpid()}-{name}"


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _kill(namespace: str) -> None:
    deadline = time.monotonic() + LIMIT
    while pids := _ip("netns", "pids", namespace).split():
        assert time.monotonic() < deadline, f"{pids} do not end"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)


def _remove(namespace: str) -> None:
    """Removes a namespace, if it is there, and all that runs in it."""
    if namespace in _listed():
        _kill(namespace)
        _ip("netns", "delete", namespace)


def _listed() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines()]


def _sweep() -> None:
    """Removes what tests have left that were killed."""
    for name in _listed():
        found = _NAMESPACE.fullmatch(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(name)
