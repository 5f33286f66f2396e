"""That nobody else can read or join the Ray that a run starts, and that nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray

from jobs.cluster import ray_cluster
from jobs.private_ray import AUTHENTICATION, PREFIX, STALE_AGE, TOKEN_PATH, private_ray
from pipeline.errors import RayFailedError, ResourceError

DASHBOARD_PORT = 8265
AGENT_PORT = 52365
"""Which Ray's agents ask for, one of them on each machine."""
JOIN = (
    "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(len(ray.nodes()))"
)


@pytest.fixture(autouse=True)
def nothing_settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nobody had asked for a kind of authentication."""
    for name in AUTHENTICATION:
        monkeypatch.delenv(name, raising=False)
    yield
    assert not [name for name in AUTHENTICATION if name in os.environ]


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray's folders come: not there yet, as Ray would make it."""
    with tempfile.TemporaryDirectory(prefix="sm", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", f"{folder}/r")
        yield Path(folder) / "r"


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _join(address: str, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in AUTHENTICATION}
    return subprocess.run(
        [sys.executable, "-c", JOIN, address],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_ray_of_ones_own(tmp_path: Path) -> None:
    """Only who has the token may join; no port is one that others want; nothing is left."""
    with ray_cluster(None):
        token = Path(os.environ[TOKEN_PATH])
        folder = token.parent
        assert (_mode(folder), _mode(token)) == (0o700, 0o600)
        address = ray.get_runtime_context().gcs_address
        assert ray._private.worker._global_node.dashboard_agent_listen_port != AGENT_PORT
        below = psutil.Process().children(recursive=True)
        assert not [each for each in below if "monitor.py" in " ".join(each.cmdline())]
        wrong = tmp_path / "token"
        wrong.write_text("0" * 64)
        mode, path = "RAY_AUTH_MODE", TOKEN_PATH
        kinds = [
            {mode: "token", path: str(token)},
            {mode: "token", path: str(wrong)},
            {mode: "disabled"},
        ]
        with ThreadPoolExecutor() as pool:
            let_in, *refused = pool.map(lambda settings: _join(address, settings), kinds)
        assert let_in.stdout == "1\n", let_in.stderr
        for one in refused:
            assert one.returncode != 0, one.stdout
            assert "nauthenticated" in one.stderr + one.stdout
        sockets = psutil.Process().children(recursive=True)
        ports = {one.laddr.port for process in sockets for one in process.net_connections()}
        assert DASHBOARD_PORT not in ports
    assert not folder.exists()


def test_folders_of_killed_runs_are_swept(base: Path) -> None:
    """Old ones that nobody owns, and no others; whoever has them open keeps them."""
    with private_ray() as inner:
        owned = inner.parent
        for name, age in ((f"{PREFIX}killed", STALE_AGE + 60), (f"{PREFIX}young", 0.0)):
            (base / name).mkdir()
            (base / name / "owner").touch()
            os.utime(base / name, (time.time() - age,) * 2)
        os.utime(owned, (time.time() - STALE_AGE - 60,) * 2)
        (base / "other").mkdir()
        with private_ray() as mine:
            left = {path.name for path in base.iterdir()}
            assert left == {owned.name, mine.parent.name, f"{PREFIX}young", "other"}


def test_the_logs_of_a_ray_that_failed_are_kept(base: Path) -> None:
    """Whoever has to find out why will look for them."""
    with pytest.raises(RayFailedError), private_ray() as inner:
        raise RayFailedError("no Ray")
    assert (inner.parent / "owner").exists()
    for error in (KeyboardInterrupt(), ResourceError("too little memory for the model")):
        with pytest.raises(type(error)), private_ray() as inner:
            raise error
        assert not inner.parent.exists()


def test_a_place_that_cannot_be_is_a_sentence(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of Ray would say what is wrong."""
    base.touch()
    with (
        pytest.raises(ResourceError, match="no place for its files"),
        private_ray(),
    ):
        pass
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 30 * "a")
    with pytest.raises(ResourceError, match="35 characters, and 26 are possible"), private_ray():
        pass


def test_who_has_settled_authentication_is_left_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token or a mode of one's own is what Ray gets."""
    with monkeypatch.context() as patched:
        patched.setenv("RAY_AUTH_TOKEN_PATH", "/mine")
        with private_ray() as inner:
            assert os.environ[TOKEN_PATH] == "/mine"
            assert not (inner.parent / "token").exists()
