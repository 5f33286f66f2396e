"""What is in a file, told by a hash of all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.reader import unreadable

_CHUNK_BYTES = 1 << 20
_THREADS = 8  # the hash gives the interpreter's lock back, so disks are what it waits for


def content_digests(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file, in hex; reads them all.

    Raises:
        InputError: a file cannot be read.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise unreadable(str(path), error) from error
    return digest.hexdigest()
