"""What is in a file, told by a hash of all of it."""

from __future__ import annotations

import hashlib
import threading
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
    is_over = threading.Event()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            return list(pool.map(lambda path: _digest(path, is_over), paths))
        finally:
            is_over.set()  # the pool waits for its threads, also when the run is to stop


def _digest(path: Path, is_over: threading.Event) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while not is_over.is_set() and (chunk := file.read(_CHUNK_BYTES)):
                digest.update(chunk)
    except OSError as error:
        raise unreadable(str(path), error) from error
    return digest.hexdigest()
