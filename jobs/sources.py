"""`input.path` -> the files it means, each with the name that `row_id` will use.

Looks at names only; opens nothing.
"""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipeline.errors import InputError

PARQUET_SUFFIXES = (".parquet",)
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_SUFFIXES = PARQUET_SUFFIXES + JSONL_SUFFIXES


@dataclass(frozen=True, slots=True)
class Source:
    """A file as the user has it.

    Attributes:
        name: its path relative to the folder that all of the input's files share.
        path: absolute.
    """

    name: str
    path: Path

    @property
    def is_jsonl(self) -> bool:
        """Whether it is JSON lines and not Parquet."""
        return self.path.name.lower().endswith(JSONL_SUFFIXES)


def find_sources(entries: Sequence[str], base: Path) -> list[Source]:
    """The files that the entries mean, in the order of the entries.

    The files of a folder, or of a glob, come in the order of their relative POSIX paths, character
    by character (`part-10` before `part-2`). Folders are searched to their depths; names that
    begin with `.` or `_`, and files that are neither Parquet nor JSONL, are passed over.

    Args:
        entries: files, folders and globs.
        base: the folder that relative entries start from.

    Raises:
        InputError: an entry means no file or may not be looked at, a file is named twice, or
            Parquet and JSONL mix.
    """
    paths = [path for entry in entries for path in _found(entry, base)]
    _check_distinct(paths)
    parent = os.path.commonpath([path.parent for path in paths])
    sources = [Source(_name(path, parent), path) for path in paths]
    _check_one_kind(sources)
    return sources


def _found(entry: str, base: Path) -> list[Path]:
    try:
        return _expand(entry, base)
    except OSError as error:
        raise InputError(
            f"input.path '{entry}' cannot be read ({error.strerror}): allow it and the folders "
            "above it to be read, or correct the path."
        ) from error


def _expand(entry: str, base: Path) -> list[Path]:
    if "://" in entry:
        raise InputError(
            f"input.path '{entry}' is a URL, and only local files are read: mount or copy it first."
        )
    path = Path(os.path.abspath(base / Path(entry).expanduser()))
    if path.is_file():
        return [_with_known_suffix(path)]
    if path.is_dir():
        found = list(_files_below(path))
    elif glob.has_magic(entry):
        _check_open(path)
        found = [
            path for match in glob.glob(str(path), recursive=True) for path in _of_match(match)
        ]
    else:
        raise InputError(f"input.path '{path}' does not exist: correct the path.")
    if not found:
        raise InputError(
            f"input.path '{path}' has no file that ends with {', '.join(_SUFFIXES)}: correct the "
            "path, or rename the files."
        )
    return sorted(set(found), key=Path.as_posix)


def _with_known_suffix(path: Path) -> Path:
    if not path.name.lower().endswith(_SUFFIXES):
        raise InputError(
            f"input.path '{path}' ends with none of {', '.join(_SUFFIXES)}: rename it to what it "
            "is, or convert it."
        )
    return path


def _check_open(pattern: Path) -> None:
    """Refuses a glob that would look into closed folders: it passes over them without a word."""
    for part, above in zip((pattern, *pattern.parents), pattern.parents, strict=False):
        if not glob.has_magic(str(part)):
            return
        is_listed = glob.has_magic(part.name) or "**" in above.parts
        needed = os.X_OK | (os.R_OK if is_listed else 0)
        for folder in filter(os.path.isdir, glob.glob(str(above), recursive=True)):
            if not os.access(folder, needed):
                reason = os.strerror(errno.EACCES)
                _raise_unreadable(PermissionError(errno.EACCES, reason, folder))


def _of_match(match: str) -> Iterator[Path]:
    path = Path(match)
    if path.is_dir():
        if not _is_hidden(path.name):
            yield from _files_below(path)
    elif _is_input(path.name):
        yield path


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in folders:
            _refuse_link(Path(parent, name))
        yield from (Path(parent, name) for name in files if _is_input(name))


def _raise_unreadable(error: OSError) -> NoReturn:
    raise InputError(
        f"input folder '{error.filename}' cannot be read ({error.strerror}): allow it, or name the "
        "files in input.path."
    ) from error


def _refuse_link(folder: Path) -> None:
    # Following it could go round in circles; passing over it would lose rows without a word.
    if folder.is_symlink():
        raise InputError(
            f"input folder '{folder}' is a link, and links inside a folder are not followed: add "
            "it to input.path, or rename it to begin with '_'."
        )


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_input(name: str) -> bool:
    return not _is_hidden(name) and name.lower().endswith(_SUFFIXES)


def _check_distinct(paths: list[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise InputError(f"input.path names '{path}' twice: name each file once.")
        seen.add(path)


def _name(path: Path, parent: str) -> str:
    name = path.relative_to(parent).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"input file {str(path)!r} has a name that is not UTF-8: rename it, as row_id holds it."
        ) from error
    return name


def _check_one_kind(sources: list[Source]) -> None:
    kinds = {source.is_jsonl: source.path for source in reversed(sources)}
    if len(kinds) > 1:
        raise InputError(
            f"the input mixes Parquet ('{kinds[False]}') and JSONL ('{kinds[True]}'): name only "
            "one kind in input.path, for example with a glob."
        )
