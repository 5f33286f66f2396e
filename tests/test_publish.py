"""Tests of `pipeline.publish`."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from pipeline import publish as module
from pipeline.errors import OutputError, SupersededError
from pipeline.publish import publish, replace, temporary_file, write_json


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Path]:
    """A finished temporary file, and a final name that is free."""
    (tmp_path / "tmp").mkdir()
    temporary = tmp_path / "tmp" / "t"
    temporary.write_text("new")
    return temporary, tmp_path / "final"


def _failing(number: int):
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_moves_the_file(written: tuple[Path, Path]) -> None:
    """The final name holds the file and the temporary one is gone."""
    temporary, final = written
    publish(temporary, final)
    assert final.read_text() == "new"
    assert not temporary.exists()


def test_never_overwrites(written: tuple[Path, Path]) -> None:
    """A taken name is left as it is and the loser is told."""
    temporary, final = written
    final.write_text("first")
    with pytest.raises(SupersededError):
        publish(temporary, final)
    assert final.read_text() == "first"


def test_syncs_content_before_name_and_name_before_return(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut finds no name without content, and no commit is reported that it could undo."""
    temporary, final = written
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def recorded_fsync(descriptor: int) -> None:
        steps.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_link(source: Path, target: Path) -> None:
        steps.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_link)
    publish(temporary, final)
    assert steps == ["sync t", "link", f"sync {final.parent.name}"]


def test_replaces_a_file_in_one_step(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content is on the disk before it takes the name, and the name before the call returns."""
    temporary, final = written
    final.write_text("old")
    steps: list[str] = []
    fsync, rename = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        steps.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        steps.append(f"replace {final.read_text()}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    replace(temporary, final)
    assert steps == ["sync t", "replace old", f"sync {final.parent.name}"]
    assert final.read_text() == "new"
    assert not temporary.exists()


def test_repeated_link_request_is_success(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS may answer `exists` to a link that the first, lost answer had made."""
    temporary, final = written
    os.link(temporary, final)
    monkeypatch.setattr(os, "link", _failing(errno.EEXIST))
    publish(temporary, final)
    assert final.read_text() == "new"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_system_without_hard_links(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The kernel's rename without overwriting takes the link's place, with the same outcomes."""
    temporary, final = written
    monkeypatch.setattr(os, "link", _failing(number))
    publish(temporary, final)
    assert final.read_text() == "new"
    temporary.write_text("second")
    with pytest.raises(SupersededError):
        publish(temporary, final)
    assert final.read_text() == "new"


def test_file_system_without_either_is_refused(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a commit could overwrite another, nothing is published and the user is told why."""
    temporary, final = written
    monkeypatch.setattr(os, "link", _failing(errno.EPERM))
    monkeypatch.setattr(module.ctypes, "CDLL", lambda *_args, **_kwargs: object())
    with pytest.raises(OutputError, match=r"hard-link.*--output"):
        publish(temporary, final)
    assert not final.exists()


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "writable"), (errno.EIO, "file system")],
)
def test_failing_sync_publishes_nothing(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    """The name appears only if the content is safe; the sentence names folder, cause and remedy."""
    temporary, final = written
    monkeypatch.setattr(os, "fsync", _failing(number))
    with pytest.raises(OutputError) as caught:
        publish(temporary, final)
    assert not final.exists()
    for part in (str(final.parent), os.strerror(number), advice):
        assert part in str(caught.value)


def test_folder_that_cannot_be_synced(
    written: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse to sync folders; that is no failure."""
    temporary, final = written
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    publish(temporary, final)
    assert final.exists()


def test_temporary_file_is_removed(tmp_path: Path) -> None:
    """Whatever ends the block, nothing stays, and two attempts never share a name."""

    def interrupted() -> None:
        with temporary_file(tmp_path, "a", ".x") as one, temporary_file(tmp_path, "a", ".x") as two:
            assert one != two
            one.write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_json_files(tmp_path: Path) -> None:
    """Written once, whatever the text, and no temporary file is left."""
    path = tmp_path / "a.json"
    write_json(path, {"a": "\udc80é"})
    with pytest.raises(SupersededError):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": "\udc80é"}
    assert list(tmp_path.iterdir()) == [path]
