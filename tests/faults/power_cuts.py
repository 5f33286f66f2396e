"""A folder on a disk that forgets at a power cut what was not synced.

The real folder is what processes see. Beside it is kept what a power cut may leave of it, by the
rules of POSIX alone: a file's content is safe once the file was synced, a name once its folder
was. Of what happened since, any part may be lost, in any order: each name goes back to one it had
since the last sync of its folder, each content to the synced one, a piece of the new one, or zeros.
"""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest

Value = TypeVar("Value")
Choose = Callable[[Sequence[Value]], Value]

CALLS = ("fsync", "link", "unlink", "rename", "replace", "mkdir", "rmdir")
_FOLDER, _ABSENT = -1, -2  # what a name may stand for, beside an inode


class PowerCut(BaseException):
    """The power is gone: from here on no call has an effect, cleaning up included."""


class Disk:
    """Watches `root`, whose present content counts as safe.

    Args:
        root: the folder; nothing above it can be lost.
        graveyard: a folder on the same file system, where deleted files can be had again.
    """

    def __init__(self, root: Path, graveyard: Path) -> None:
        self._root = root
        self._graveyard = graveyard
        self._is_off = False
        self._calls_left: int | None = None
        self._numbers = itertools.count()
        self.settle()

    @contextmanager
    def plugged_in(self) -> Iterator[None]:
        """Within the block `os` works on this disk."""
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            # Else the order in which names are lost would differ from run to run.
            patch.setattr("pipeline.publish.uuid4", lambda: UUID(int=next(self._numbers)))
            yield

    def cut_power_after(self, num_calls: int | None) -> None:
        """Raises `PowerCut` in place of a later call; None is never."""
        self._calls_left = num_calls

    def go_on(self) -> None:
        """Only the process is gone that made the calls; what it did is there for the others."""
        self._is_off, self._calls_left = False, None

    def settle(self) -> None:
        """Makes all that is there safe, as after a start of the machine."""
        self._names: dict[Path, dict[str, list[int]]] = {}
        self._synced: dict[int, bytes] = {}
        self._observe()
        for path in self._names:
            self._sync_folder(path)
        for inode in os.listdir(self._graveyard):
            self._synced[int(inode)] = self._content(int(inode))

    def restart(self, choose: Choose[Any]) -> None:
        """Leaves in the folder what a power cut now might leave, and makes that safe."""
        self._observe()
        tree = list(self._survivors(self._root, choose))
        for entry in self._root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._restore(tree)
        shutil.rmtree(self._graveyard)
        self._graveyard.mkdir()
        self.go_on()
        self.settle()

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._spend_a_call()
            self._observe()
            if name == "fsync":
                self._sync(Path(os.readlink(f"/proc/self/fd/{args[0]}")))
                return None
            result = call(*args, **kwargs)
            self._observe()
            return result

        return watched

    def _spend_a_call(self) -> None:
        if self._calls_left is not None:
            self._calls_left -= 1
            self._is_off = self._is_off or self._calls_left < 0
        if self._is_off:
            raise PowerCut

    def _observe(self) -> None:
        """Notes what each name has come to stand for."""
        for folder, _, _ in os.walk(self._root):
            self._names.setdefault(Path(folder), {})
        for folder, names in self._names.items():
            found = dict(self._entries(folder))
            for name in {*names, *found}:
                values = names.setdefault(name, [_ABSENT])
                if values[-1] != found.get(name, _ABSENT):
                    values.append(found.get(name, _ABSENT))

    def _entries(self, folder: Path) -> Iterator[tuple[str, int]]:
        if not folder.is_dir():
            return
        for entry in os.scandir(folder):
            if entry.is_dir():
                yield entry.name, _FOLDER
                continue
            # A link of our own keeps the number from being given to another file.
            kept = self._graveyard / str(entry.inode())
            if not kept.exists():
                _REAL_LINK(entry.path, kept)
            yield entry.name, entry.inode()

    def _content(self, inode: int) -> bytes:
        return (self._graveyard / str(inode)).read_bytes()

    def _sync(self, path: Path) -> None:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            self._sync_folder(path)
        else:
            self._synced[status.st_ino] = path.read_bytes()

    def _sync_folder(self, path: Path) -> None:
        if path in self._names:
            now = {name: values[-1] for name, values in self._names[path].items()}
            self._names[path] = {name: [value] for name, value in now.items() if value != _ABSENT}

    def _survivors(self, folder: Path, choose: Choose[Any]) -> Iterator[tuple[Path, int, bytes]]:
        """Each name that is left, as path, what it stands for, and content."""
        contents: dict[int, bytes] = {}
        for name, values in sorted(self._names.get(folder, {}).items()):
            value = _one_of(values, choose)
            if value == _FOLDER:
                yield folder / name, value, b""
                yield from self._survivors(folder / name, choose)
            elif value != _ABSENT:
                if value not in contents:
                    contents[value] = _one_of(self._possible_contents(value), choose)
                yield folder / name, value, contents[value]

    def _possible_contents(self, inode: int) -> list[bytes]:
        now, synced = self._content(inode), self._synced.get(inode)
        if now == synced:
            return [now]
        return [b"" if synced is None else synced, now, now[: len(now) // 2], bytes(len(now))]

    def _restore(self, tree: Iterable[tuple[Path, int, bytes]]) -> None:
        for path, value, content in tree:
            if value == _FOLDER:
                path.mkdir()
            else:
                path.write_bytes(content)


_REAL_LINK = os.link


def _one_of(values: Sequence[Value], choose: Choose[Value]) -> Value:
    return values[0] if len(values) == 1 else choose(values)
