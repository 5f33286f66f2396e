"""A run folder made ready, started or continued, refused, moved aside.

Only the holder of the run's lock calls `open_or_create`.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from jobs.differences import differences
from jobs.fingerprint import file_field
from jobs.ledger import Ledger
from jobs.lock import RunLock
from jobs.manifest import Manifest, PlannedFile, read_manifest
from pipeline.errors import JobDiffersError, OutputError
from pipeline.folder import RunFolder
from pipeline.publish import make_folders, output_errors, write_json

_FOLDERS = ("segments", "tmp", "logs", "input")
_BEFORE_MANIFEST = frozenset({*_FOLDERS, "lock", "job.yaml"})


def prepare(folder: Path) -> RunFolder:
    """Make the inner folders of a run folder, in a new or empty folder or one of our own.

    Comes first in a run: the lock and converted inputs need the folders.

    Raises:
        OutputError: the folder holds something else, is a file, or cannot be written.
    """
    run = RunFolder(folder)
    with output_errors(folder):
        _refuse_what_is_there(run)
        make_folders(_inner_folders(run))
    return run


def check_output(folder: Path) -> None:
    """Refuse a folder that `prepare` would refuse; makes nothing.

    Raises:
        OutputError: see `prepare`.
    """
    run = RunFolder(folder)
    with output_errors(folder):
        _refuse_what_is_there(run)
        for path in (folder, *_inner_folders(run)):
            _check_writable(path.resolve())


def _inner_folders(run: RunFolder) -> list[Path]:
    return [run.internal / name for name in _FOLDERS]


def _check_writable(folder: Path) -> None:
    """Raise what the system would say to a file made in `folder`, or to making `folder`."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))


def _refuse_what_is_there(run: RunFolder) -> None:
    if run.root.exists() and not run.root.is_dir():
        raise OutputError(f"output folder '{run.root}' is a file; choose another with --output")
    if run.root.exists() and not run.manifest.exists():
        _refuse_strangers(run)


def _refuse_strangers(run: RunFolder) -> None:
    found = {path.name for path in run.root.iterdir()} - {run.internal.name}
    if not found and run.internal.is_dir():
        # A run that died before its manifest was written leaves these.
        found = {
            path.name
            for path in run.internal.iterdir()
            if path.name not in _BEFORE_MANIFEST and path.suffix != ".tmp"
        }
    if found:
        shown = ", ".join(f"'{name}'" for name in sorted(found)[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise OutputError(
            f"output folder '{run.root}' holds {shown}{more} and no run of Shardmill; choose a new "
            "or empty folder with --output"
        )


def open_or_create(folder: Path, manifest: Manifest) -> Ledger:
    """Start a run folder with `manifest`, or continue one that was started with an equal job.

    A continued folder keeps its own plan (shard and part sizes), which commits depend on, and
    takes the inputs' paths from `manifest`, as they may have been moved.

    Raises:
        JobDiffersError: the folder was started with another job; lists what differs.
        OutputError: see `prepare`; or the folder is a newer Shardmill's.
        DamagedOutputError: its manifest is damaged.
    """
    run = prepare(folder)
    if not run.manifest.exists():
        write_json(run.manifest, manifest.model_dump(mode="json"))
        return Ledger(run, manifest)
    ledger = Ledger(run, read_manifest(run.manifest))
    check_same_job(ledger, manifest)
    return Ledger(run, ledger.manifest.model_copy(update={"files": manifest.files}))


def check_same_job(ledger: Ledger, new: Manifest) -> None:
    """Refuse to continue a folder with a job that would give other answers.

    Raises:
        JobDiffersError: lists what differs.
    """
    lines = job_differences(ledger.manifest, new)
    if not lines:
        return
    raise JobDiffersError(
        f"output folder '{ledger.folder.root}' was started with another job; go back to that "
        "one, or start anew with --fresh or in another folder with --output. What differs "
        "(then -> now):\n  " + "\n  ".join(lines)
    )


def job_differences(old: Manifest, new: Manifest) -> list[str]:
    """What keeps the job of `new` from going on where `old` began, a line each; [] is nothing."""
    if old.fingerprint == new.fingerprint and _layout(old) == _layout(new):
        return []
    limit = differences(_limit(old), _limit(new))
    explained = _cut_by_limit(old, new) if limit else frozenset()
    kept = [
        {name: value for name, value in each.fingerprint_fields.items() if name not in explained}
        for each in (old, new)
    ]
    return (
        [*(limit if explained else ()), *differences(*kept)]
        or differences(_layout(old), _layout(new))
        or [f"fingerprint: {old.fingerprint} -> {new.fingerprint}"]
    )


def _limit(manifest: Manifest) -> dict[str, object]:
    settings = manifest.job.get("input")
    return {"input.limit": settings.get("limit")} if isinstance(settings, dict) else {}


def _cut_by_limit(old: Manifest, new: Manifest) -> frozenset[str]:
    """Fields of files that differ because another limit takes other rows: nobody needs to hear.

    None if neither limit is reached: then it changes nothing, and files differ by themselves.
    """
    if not any(manifest.num_rows in _limit(manifest).values() for manifest in (old, new)):
        return frozenset()
    then, now = ({file.name: file for file in each.files} for each in (old, new))
    names = {
        name
        for name in {**then, **now}
        if name not in then or name not in now or _content(then[name]) == _content(now[name])
    }
    return frozenset(
        field
        for field in map(file_field, names)
        if old.fingerprint_fields.get(field) != new.fingerprint_fields.get(field)
    )


def _content(file: PlannedFile) -> tuple[int, str]:
    return file.size, file.digest


def _layout(manifest: Manifest) -> dict[str, object]:
    # What the commits' positions mean; files in another order have an equal fingerprint.
    files = [f"{file.name} ({file.num_rows} rows)" for file in manifest.files]
    return {"num_samples": manifest.num_samples, "input files, in order": files}


def set_aside(folder: Path) -> Path | None:
    """Move a run folder to `<folder>.old-<time>`, for `--fresh`; nothing is ever deleted.

    Returns:
        Where it is now, or None if there was none.

    Raises:
        LockedError: a run works in it.
        OutputError: it is something else's, or cannot be moved.
    """
    with output_errors(folder):
        source = folder.resolve()
        if not source.exists() or not RunFolder(source).internal.is_dir():
            return None
        target = _free_name(source)
        with RunLock(source):
            source.rename(target)
    return target


def _free_name(source: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target, number = source.with_name(f"{source.name}.old-{stamp}"), 1
    while target.exists():
        number += 1
        target = source.with_name(f"{source.name}.old-{stamp}-{number}")
    return target
