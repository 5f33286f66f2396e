"""Which files `input.path` means."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from jobs.sources import find_sources
from pipeline.errors import InputError
from tests.closed import close


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def _names(folder: Path, *entries: str) -> list[str]:
    return [source.name for source in find_sources(entries, folder)]


def test_folder_in_order_of_relative_paths(tmp_path: Path) -> None:
    """Nested files are found, in character order; hidden and other files are passed over."""
    _touch(tmp_path, "d/b.parquet", "d/a/z.PARQUET", "d/a-1.parquet", "d/part-2.parquet")
    _touch(tmp_path, "d/part-10.parquet", "d/_SUCCESS", "d/_x.parquet", "d/.y.parquet")
    _touch(tmp_path, "d/.shardmill/s.parquet", "d/_tmp/t.parquet", "d/notes.txt")
    assert _names(tmp_path, "d") == [
        "a-1.parquet",
        "a/z.PARQUET",
        "b.parquet",
        "part-10.parquet",
        "part-2.parquet",
    ]


def test_one_file_is_named_by_its_file_name(tmp_path: Path) -> None:
    """A single file needs no folder in its name, relative or absolute."""
    _touch(tmp_path, "d/a.parquet")
    assert _names(tmp_path, "d/a.parquet") == ["a.parquet"]
    assert _names(Path("/"), str(tmp_path / "d/a.parquet")) == ["a.parquet"]


def test_list_keeps_its_order_and_distinct_names(tmp_path: Path) -> None:
    """Files of the same name in two folders get different names, in the order of the list."""
    _touch(tmp_path, "x/a.jsonl", "y/a.jsonl.gz")
    assert _names(tmp_path, "y", "x/a.jsonl") == ["y/a.jsonl.gz", "x/a.jsonl"]


def test_glob_goes_deep_and_into_folders(tmp_path: Path) -> None:
    """`**` and matched folders are searched, and what is no input is passed over."""
    _touch(tmp_path, "d/a/1.parquet", "d/b/2.parquet", "d/b/_SUCCESS", "d/_c/3.parquet")
    assert _names(tmp_path, "d/**/*.parquet") == ["_c/3.parquet", "a/1.parquet", "b/2.parquet"]
    assert _names(tmp_path, "d/*") == ["a/1.parquet", "b/2.parquet"]


def test_existing_path_with_glob_characters_is_that_file(tmp_path: Path) -> None:
    """A file called `a[1].parquet` is found by its name."""
    _touch(tmp_path, "a[1].parquet")
    assert _names(tmp_path, "a[1].parquet") == ["a[1].parquet"]


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (["none.parquet"], r"none\.parquet' does not exist"),
        (["*.parquet"], "has no file that ends with"),
        (["empty"], "has no file that ends with"),
        (["table.csv"], "ends with none of"),
        (["s3://bucket/a.parquet"], "is a URL"),
        (["d/a.parquet", "d/*.parquet"], r"names '.*a\.parquet' twice"),
        (["mixed"], r"mixes Parquet \('.*b\.parquet'\) and JSONL \('.*a\.jsonl'\)"),
    ],
)
def test_unusable_path_is_one_sentence(tmp_path: Path, entries: list[str], sentence: str) -> None:
    """Each mistake names the entry and what to do."""
    (tmp_path / "empty").mkdir()
    _touch(tmp_path, "table.csv", "d/a.parquet", "mixed/a.jsonl", "mixed/b.parquet")
    with pytest.raises(InputError, match=sentence) as caught:
        find_sources(entries, tmp_path)
    assert "\n" not in str(caught.value)


def test_linked_folder_is_refused(tmp_path: Path) -> None:
    """A link inside a folder neither loses rows silently nor goes round in circles."""
    _touch(tmp_path, "d/a.parquet", "other/b.parquet")
    (tmp_path / "d/more").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match=r"more' is a link"):
        find_sources(["d"], tmp_path)
    assert _names(tmp_path, "d/more") == ["b.parquet"]


def test_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """A file name that `row_id` could not hold is refused before anything runs."""
    (tmp_path / os.fsdecode(b"\xff.parquet")).write_bytes(b"")
    with pytest.raises(InputError, match="not UTF-8"):
        find_sources(["."], tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_refused(tmp_path: Path) -> None:
    """A folder that may not be listed is an error, not an empty folder."""
    _touch(tmp_path, "d/a.parquet", "d/closed/b.parquet")
    (tmp_path / "d/closed").chmod(0)
    try:
        with pytest.raises(InputError, match="closed' cannot be read"):
            find_sources(["d"], tmp_path)
    finally:
        (tmp_path / "d/closed").chmod(0o700)


@pytest.mark.parametrize("entry", ["closed/d/a.parquet", "closed/d", "closed/*.parquet"])
def test_path_below_a_closed_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    """What may not be looked at is told apart from what is not there."""
    _touch(tmp_path, "closed/d/a.parquet")
    close(tmp_path / "closed", monkeypatch)
    with pytest.raises(InputError, match=r"closed/.*' cannot be read \(Permission denied\)"):
        find_sources([entry], tmp_path)


@pytest.mark.parametrize("pattern", ["d/*/x.parquet", "d/**/x.parquet", "d/b/*.parquet"])
def test_a_glob_does_not_pass_over_a_closed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """Its rows would be missing, and nothing would say so. What does not match may be closed."""
    _touch(tmp_path, "d/a/x.parquet", "d/b/x.parquet", "e/x.parquet")
    closed = [tmp_path / "e"]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed)
    assert _names(tmp_path, pattern)
    closed.append(tmp_path / "d/b")
    with pytest.raises(InputError, match=r"d/b/?' cannot be read \(Permission denied\)"):
        _names(tmp_path, pattern)


def test_a_glob_does_not_pass_over_a_folder_that_may_not_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`**` lists every folder; one that may only be entered hides those below it."""
    _touch(tmp_path, "d/x.parquet", "d/a/x.parquet", "d/a/b/x.parquet")
    hidden = tmp_path / "d/a"
    listed = os.scandir
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != hidden or not mode & os.R_OK)
    monkeypatch.setattr(os, "scandir", lambda path: listed(path) if Path(path) != hidden else _no())
    with pytest.raises(InputError, match=r"d/a/?' cannot be read \(Permission denied\)"):
        _names(tmp_path, "d/**/x.parquet")


def _no() -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
