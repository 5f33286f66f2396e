"""A folder and a token for the Ray that a run starts, which no other user can read.

Left to itself, Ray keeps sockets and logs of all users in one folder that everybody may write to,
never removes them, and puts its token into the home folder, for everybody to read.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from pipeline.errors import RayFailedError, ResourceError

logger = logging.getLogger(__name__)

TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", TOKEN_PATH)
"""Variables by which somebody has settled authentication already."""

MAX_BASE_LENGTH = 26
"""Characters: a socket's path has 107 at most, and Ray's session adds 66 to our 15."""

PREFIX = "shm-"
STALE_AGE = 3600.0
"""Seconds after which a folder without an owner is removed: its run was killed."""


@contextmanager
def private_ray() -> Iterator[Path]:
    """A place for one Ray, removed with the block; its token is what Ray will use.

    Where Ray has failed, its logs are kept for a while.
    """
    folder = _make()
    try:
        with _owned(folder), _authenticated(folder / "token"):
            yield folder / "r"  # not the folder itself, which Ray would open to everybody
    except RayFailedError:
        logger.info("Ray's own logs are in %s, until a run starts in an hour or later", folder)
        raise
    except BaseException:
        _remove(folder)
        raise
    _remove(folder)


def _remove(folder: Path) -> None:
    # Some processes of Ray take a moment longer and may still write there.
    shutil.rmtree(folder, ignore_errors=True)


def _make() -> Path:
    """A new folder that only this user can read.

    Raises:
        ResourceError: there can be none.
    """
    asked = os.environ.get("RAY_TMPDIR")
    base = Path(asked or _short(tempfile.gettempdir()))
    if len(str(base)) > MAX_BASE_LENGTH:
        raise ResourceError(
            f"RAY_TMPDIR '{base}' is too long for the names of Ray's sockets: "
            f"{len(str(base))} characters, and {MAX_BASE_LENGTH} are possible; set a shorter one"
        )
    try:
        base.mkdir(parents=True, exist_ok=True)
        _sweep(base)
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    except OSError as error:
        raise ResourceError(
            f"Ray has no place for its files in '{base}' ({error.strerror}); set RAY_TMPDIR to a "
            "folder that can be written"
        ) from error


def _short(folder: str) -> str:
    return folder if len(folder) <= MAX_BASE_LENGTH else "/tmp"


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Holds a lock by which others tell that the folder is in use, wherever they run."""
    with (folder / "owner").open("w", encoding="utf-8") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield


@contextmanager
def _authenticated(token: Path) -> Iterator[None]:
    """Has Ray take the token in this file, unless somebody has settled it in another way."""
    if any(name in os.environ for name in AUTHENTICATION):
        yield
        return
    token.touch(0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    os.environ[TOKEN_PATH] = str(token)
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        for name in AUTHENTICATION:  # Ray sets the mode itself
            os.environ.pop(name, None)
        AuthenticationTokenLoader.instance().reset_cache()


def _sweep(base: Path) -> None:
    """Removes the folders of runs that were killed."""
    for folder in base.glob(f"{PREFIX}*"):
        # Another user's cannot be opened, and another run may be removing it too.
        with suppress(OSError):
            is_old = time.time() - folder.stat().st_mtime > STALE_AGE
            with (folder / "owner").open("r+", encoding="utf-8") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_old:
                    _remove(folder)
