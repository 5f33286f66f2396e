"""Files and folders that appear whole, once, and survive a power cut. Standard library only.

Knows nothing of Parquet, shards or jobs. A file is written under a temporary name and gets its
final name only when all of it is on the disk. Only `replace` writes a final name that exists.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from uuid import uuid4

from pipeline.errors import OutputError, SupersededError

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_NOREPLACE = 1  # linux/fs.h


@contextmanager
def output_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write in `folder` into an `OutputError`."""
    try:
        yield
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise OutputError(
            f"output folder '{folder}' cannot be written: {cause}; {_advice(error.errno)}, "
            "then run the same command again"
        ) from error


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to read `path` into an `OutputError`.

    Not if it is not there, nor what a library raises without the system's number for it.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OutputError(
            f"'{path}' cannot be read: {os.strerror(error.errno)}; check it and its file system, "
            "then run the same command again"
        ) from error


def is_there(path: Path) -> bool:
    """Whether a file or folder is there.

    Raises:
        OutputError: the operating system does not say.
    """
    with read_errors(path):
        return path.exists()


def _advice(number: int | None) -> str:
    if number in _FULL:
        return "free space or raise the quota"
    if number in _FORBIDDEN:
        return "make the folder writable or choose another one with --output"
    return "check the folder and its file system"


@contextmanager
def temporary_file(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    """A path in `folder` that no other attempt uses; a file left there at the end is removed."""
    path = folder / f"{stem}.{uuid4().hex}{suffix}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its final name, durably and without overwriting.

    After a death at any point the final name is absent or holds the whole file.

    Args:
        temporary: a closed file on the file system of `final`; it is gone afterwards.
        final: the name that is the commit.

    Raises:
        SupersededError: the final name is taken.
        OutputError: the operating system refuses.
    """
    with output_errors(final.parent):
        _sync_file(temporary)
        _link(temporary, final)
        temporary.unlink(missing_ok=True)
        sync_folder(final.parent)


def replace(temporary: Path, final: Path) -> None:
    """Put a finished file in the place of another, durably.

    Readers, and whoever comes after a death at any point, find the old file or the new one, whole.

    Args:
        temporary: a closed file on the file system of `final`; it is gone afterwards.
        final: is replaced whatever it holds, so only the holder of the run's lock may call this.

    Raises:
        OutputError: the operating system refuses.
    """
    with output_errors(final.parent):
        _sync_file(temporary)
        os.replace(temporary, final)
        sync_folder(final.parent)


def _link(temporary: Path, final: Path) -> None:
    try:
        os.link(temporary, final)
    except FileExistsError as error:
        if not _is_linked(temporary, final):
            raise SupersededError(f"'{final}' exists") from error
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _rename_without_overwriting(temporary, final)


def _is_linked(temporary: Path, final: Path) -> bool:
    # A network file system that repeats a request may refuse a link that it has made; and the
    # winner's file may be in a part, and gone, by the time we look.
    with suppress(FileNotFoundError):
        return os.path.samefile(temporary, final)
    return False


def _rename_without_overwriting(temporary: Path, final: Path) -> None:
    # FAT, SMB and some FUSE file systems know no hard links. A lock or marker file in their place
    # would not stop a process that sleeps between looking and renaming, so where the kernel
    # cannot do it in one step the folder is refused.
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    old, new = os.fsencode(temporary), os.fsencode(final)
    if rename is not None and rename(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) == 0:
        return
    number = errno.ENOSYS if rename is None else ctypes.get_errno()
    if number == errno.EEXIST:
        raise SupersededError(f"'{final}' exists")
    if number in (errno.EINVAL, errno.ENOSYS):
        raise OutputError(
            f"output folder '{final.parent}' is on a file system that can neither hard-link nor "
            "rename without overwriting, so commits would not be safe there; choose a folder on "
            "another file system with --output"
        )
    raise OSError(number, os.strerror(number), str(final))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folders(folders: Iterable[Path]) -> None:
    """Make folders, and those above them, that a power cut does not take.

    The names of those that are there are synced too: who made them may have died before that, or a
    cut may have taken one, which was made again.

    Raises:
        OSError: the operating system refuses.
    """
    paths = [folder.resolve() for folder in folders]  # mkdir refuses a link to what is not there
    absent = {each for path in paths for each in (path, *path.parents) if not each.exists()}
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    changed = {path.parent for path in absent}
    for parent in dict.fromkeys(parent for path in paths for parent in _parents_on_its_disk(path)):
        # A folder far above may be closed to us, and then we have made nothing in it.
        if parent in changed or os.access(parent, os.R_OK):
            sync_folder(parent)


def _parents_on_its_disk(folder: Path) -> Iterator[Path]:
    """The folders above, nearest first; where another file system begins, nothing was made."""
    device = folder.stat().st_dev
    return takewhile(lambda parent: parent.stat().st_dev == device, folder.parents)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that must not exist yet; readers see all of it or nothing.

    Raises:
        SupersededError: the file exists.
        OutputError: the operating system refuses.
    """
    with output_errors(path.parent), temporary_file(path.parent, path.name, ".tmp") as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        publish(temporary, path)
