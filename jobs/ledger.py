"""A run folder as a whole: started or continued, looked through, swept, moved aside.

The files are the truth; nothing here is kept anywhere else. Only the holder of the run's lock
calls `open_or_create` and `Ledger.sweep`.
"""

from __future__ import annotations

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jobs.differences import differences
from jobs.lock import RunLock
from jobs.manifest import FORMAT_VERSION, Manifest
from jobs.parts import PartInfo, read_part, roll_up
from jobs.state import JobState
from jobs.tally import note, read_notes, stamp_of
from pipeline.errors import DamagedOutputError, InputError, JobDiffersError, OutputError
from pipeline.folder import RunFolder
from pipeline.publish import output_errors, sync_folder, write_json
from pipeline.segments import (
    SegmentInfo,
    Totals,
    count_commits,
    list_segments,
    read_info,
    segment_name,
)

_FOOTER_THREADS = 8
_FOLDERS = ("segments", "tmp", "logs", "input")
_BEFORE_MANIFEST = frozenset({*_FOLDERS, "lock", "job.yaml"})


@dataclass(frozen=True, slots=True)
class Ledger:
    """A run folder and what it was started with."""

    folder: RunFolder
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Ledger:
        """Read an existing run folder.

        Raises:
            InputError: it is none.
            OutputError: it is a newer Shardmill's.
            DamagedOutputError: its manifest is damaged.
        """
        run = RunFolder(folder)
        if not run.manifest.is_file():
            raise InputError(
                f"'{folder}' is no output folder of Shardmill: it has no "
                f"'{run.manifest.relative_to(folder)}'; give the folder that a run wrote to"
            )
        return cls(run, _read_manifest(run.manifest))

    @property
    def is_complete(self) -> bool:
        """Whether `_SUCCESS` and all parts are there; no file is opened."""
        parts = range(self.manifest.num_parts)
        return self.folder.success.exists() and all(self.has_part(part) for part in parts)

    def has_part(self, part: int) -> bool:
        """Whether the part is published."""
        return (self.folder.root / self.manifest.part_name(part)).exists()

    def is_rolled_up(self, shard: int) -> bool:
        """Whether the shard is of this job and in a published part: its segments mean nothing."""
        manifest = self.manifest
        return shard < manifest.num_shards and self.has_part(manifest.part_of(shard))

    def scan(self) -> JobState:
        """Which shards and parts are done; the segments of published parts are not opened.

        Neither are parts that the tally knows.

        Raises:
            DamagedOutputError: a part or segment is torn, another job's, or missing in a sequence.
            FileNotFoundError: a driver rolled up a part meanwhile; impossible under the lock.
        """
        state = JobState(self.manifest)
        # Segments before parts: what moves from one to the other meanwhile is seen at least once.
        segments = list_segments(self.folder)
        for part, totals in self._published().items():
            state.add_part(part, totals)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            names = [
                segment_name(shard, commit)
                for shard, commits in segments.items()
                if not state.has_part(self._part_of(shard))
                for commit in self._without_gaps(shard, commits)
            ]
            state.add(pool.map(self._read_segment, names))
        return state

    def parts(self) -> list[PartInfo]:
        """What the parts of a complete folder say about themselves.

        Raises:
            DamagedOutputError: one is torn, or another job's.
        """
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            return list(pool.map(self._read_part, range(self.manifest.num_parts)))

    def roll_up(self, part: int) -> PartInfo:
        """Publish a part whose shards are complete; see `jobs.parts.roll_up`."""
        info = roll_up(self.folder, self.manifest, part)
        self.note(info)
        return info

    def note(self, info: PartInfo) -> None:
        """Put in the tally what a part holds that has just been published.

        Raises:
            OutputError: the operating system refuses.
        """
        note(self.folder, self.manifest.part_name(info.part), info.part, info.totals)

    def sweep(self) -> None:
        """Remove what dead processes left in `tmp`, and the segments of published parts.

        Raises:
            OutputError: the operating system refuses.
        """
        with output_errors(self.folder.root):
            for leftover in (*self.folder.tmp.iterdir(), *self.folder.internal.glob("*.tmp")):
                leftover.unlink()
            # A part's name may not be durable yet if its writer died right after linking it.
            sync_folder(self.folder.root)
            for shard, commits in list_segments(self.folder).items():
                if self.is_rolled_up(shard):
                    for commit in commits:
                        (self.folder.segments / segment_name(shard, commit)).unlink()

    def _published(self) -> dict[int, Totals]:
        """What the published parts hold."""
        notes, root = read_notes(self.folder), self.folder.root
        totals: dict[int, Totals] = {}
        unknown: list[int] = []
        for part in range(self.manifest.num_parts):
            stamp = stamp_of(root / self.manifest.part_name(part))
            if stamp is not None and (part, stamp) in notes:
                totals[part] = notes[part, stamp]
            elif stamp is not None:
                unknown.append(part)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            totals |= {info.part: info.totals for info in pool.map(self._read_part, unknown)}
        return totals

    def _read_part(self, part: int) -> PartInfo:
        return read_part(self.folder, self.manifest, part)

    def _part_of(self, shard: int) -> int:
        if shard >= self.manifest.num_shards:
            raise DamagedOutputError(
                f"'{self.folder.segments / segment_name(shard, 0)}' is of a shard that this job "
                "does not have; move it away and run the same command again"
            )
        return self.manifest.part_of(shard)

    def _without_gaps(self, shard: int, commits: list[int]) -> range:
        # A listing made while files come and go may show a later commit and not an earlier one.
        count = len(commits)
        if commits[-1] >= count:
            count = count_commits(self.folder, shard)
        if commits[-1] < count:
            return range(count)
        path = self.folder.segments / segment_name(shard, count)
        if self.is_rolled_up(shard):
            raise FileNotFoundError(path)
        raise DamagedOutputError(
            f"'{path}' is gone though a later commit of shard {shard} is there; move that away "
            "and run the same command again"
        )

    def _read_segment(self, name: str) -> SegmentInfo:
        return read_info(self.folder.segments / name, self.manifest.fingerprint)


def prepare(folder: Path) -> RunFolder:
    """Make the inner folders of a run folder, in a new or empty folder or one of our own.

    Comes first in a run: the lock and converted inputs need the folders.

    Raises:
        OutputError: the folder holds something else, is a file, or cannot be written.
    """
    run = RunFolder(folder)
    with output_errors(folder):
        _refuse_what_is_there(run)
        # A link to a folder that does not exist yet is made good; mkdir would refuse it.
        root = folder.resolve()
        inner = _inner_folders(run)
        made = [path for path in (*inner, run.internal, root, *root.parents) if not path.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for path in inner:
            path.mkdir(parents=True, exist_ok=True)
        # Or a power cut may take a folder with all its commits; also one that an earlier cut took
        # and that has been made again.
        for parent in dict.fromkeys(path.parent for path in made):
            sync_folder(parent)
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
    ledger = Ledger(run, _read_manifest(run.manifest))
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
    return (
        differences(old.fingerprint_fields, new.fingerprint_fields)
        or differences(_layout(old), _layout(new))
        or [f"fingerprint: {old.fingerprint} -> {new.fingerprint}"]
    )


def _layout(manifest: Manifest) -> dict[str, object]:
    # What the commits' positions mean; files in another order have an equal fingerprint.
    files = [f"{file.name} ({file.num_rows} rows)" for file in manifest.files]
    return {"num_samples": manifest.num_samples, "input files, in order": files}


def _read_manifest(path: Path) -> Manifest:
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text)["format_version"]
        if version == FORMAT_VERSION:
            return Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError) as error:  # ValidationError is a ValueError
        raise DamagedOutputError(
            f"manifest '{path}' is damaged ({str(error).splitlines()[0]}); put it back from a "
            "copy, or start anew with --fresh"
        ) from error
    raise OutputError(
        f"output folder '{path.parent.parent}' has layout {version!r} and this Shardmill knows "
        f"{FORMAT_VERSION}; continue with the version of Shardmill that started it"
    )


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
