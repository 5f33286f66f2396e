"""One driver per run folder, and who it is.

The kernel's lock on `.shardmill/lock` keeps out others on this machine and goes with its process,
however that dies. Where the file system does not carry it to other machines, a heartbeat in the
file does, if their clocks agree within half a minute. Where it may not, and where there are no
locks at all, of drivers that start at once the one stays whose record is in the file a moment
later.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import LockedError
from pipeline.folder import RunFolder
from pipeline.publish import output_errors, read_errors

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 60.0
SETTLE_SECONDS = 2.0
"""Longer than a driver takes from reading the record to writing its own."""

_RECORD_BYTES = 1024
_NETWORKED = frozenset(
    {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "virtiofs", "afs"}
)
_NO_FLOCK = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds, or held, a run folder. Times are seconds since the epoch."""

    host: str
    pid: int
    boot_id: str
    started: float
    heartbeat: float
    released: bool = False

    @classmethod
    def this_process(cls) -> Owner:
        """An owner that starts now."""
        now = time.time()
        return cls(socket.gethostname(), os.getpid(), _boot_id(), now, now)

    def on_machine_of(self, other: Owner) -> bool:
        """Whether both run under one kernel; containers on it have host names of their own."""
        if self.boot_id and other.boot_id:
            return self.boot_id == other.boot_id
        return self.host == other.host

    @property
    def beats(self) -> bool:
        """Whether it has shown a sign of life lately."""
        return not self.released and time.time() - self.heartbeat < DEAD_AFTER_SECONDS

    def is_alive(self) -> bool:
        """Whether it seems to be at work, judged without touching the lock."""
        me = Owner.this_process()
        # Another host name may be another container, whose processes have other numbers here.
        visible = self.on_machine_of(me) and self.host == me.host
        return self.beats and not (visible and not _process_exists(self.pid))

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host} since {started}"


_OWNER = TypeAdapter(Owner)


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _is_networked(folder: Path) -> bool:
    """Whether other machines may see the folder, whom a lock of this one's kernel may not reach."""
    kinds = {each.mountpoint: each.fstype for each in psutil.disk_partitions(all=True)}
    mount = next((str(each) for each in (folder, *folder.parents) if str(each) in kinds), "/")
    kind = kinds.get(mount, "")
    return kind in _NETWORKED or kind.startswith("fuse.")


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_owner(folder: Path) -> Owner | None:
    """The last owner of a run folder, or None if there is none on record."""
    path = RunFolder(folder).lock
    with read_errors(path):
        return _parse(path.read_bytes()) if path.exists() else None


def _parse(record: bytes) -> Owner | None:
    # A process that dies between creating the file and writing it leaves no record.
    try:
        return _OWNER.validate_json(record)
    except ValidationError:
        return None


class RunLock:
    """Holds a run folder while the `with` block runs.

    Not inherited by programs that are started, but by a bare fork: start none.

    Raises:
        LockedError: another driver works there.
        OutputError: the lock file cannot be written, or the folder was not prepared.
    """

    def __init__(self, folder: Path, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self._folder = folder
        self._path = RunFolder(folder).lock
        self._interval = heartbeat_seconds
        self._owner = Owner.this_process()
        self._descriptor = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> RunLock:
        with output_errors(self._folder):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                kernel_knows = self._take()
                self._write()
                if not kernel_knows or _is_networked(self._folder.resolve()):
                    self._outlast()
            except BaseException:
                os.close(self._descriptor)
                raise
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._owner = replace(self._owner, released=True)
        try:
            with output_errors(self._folder):
                self._write()
        finally:
            os.close(self._descriptor)

    def _take(self) -> bool:
        """Whether the kernel keeps others out from now on."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kernel_knows = True
        except BlockingIOError:
            raise self._locked(self._recorded()) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            logger.warning("'%s' cannot be locked (%s); its heartbeat decides", self._path, error)
            kernel_knows = False
        self._check_record(kernel_knows)
        return kernel_knows

    def _outlast(self) -> None:
        """Gives way to who has read the record when we did, and written after us."""
        time.sleep(SETTLE_SECONDS)
        # By a new opening, as a network file system may answer an old one from its memory.
        owner = read_owner(self._folder)
        if owner is None or replace(owner, heartbeat=self._owner.heartbeat) != self._owner:
            raise self._locked(owner)

    def _check_record(self, kernel_knows: bool) -> None:
        owner = self._recorded()
        # On this machine the kernel's answer is exact: whoever held the lock is dead.
        dead = owner is not None and kernel_knows and owner.on_machine_of(self._owner)
        if owner is not None and owner.beats and not dead:
            raise self._locked(owner)
        if self._was_moved():
            raise self._locked(None)

    def _was_moved(self) -> bool:
        # `--fresh` may have moved the file aside with its folder between our open and flock.
        try:
            return not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return True

    def _locked(self, owner: Owner | None) -> LockedError:
        who = "another run" if owner is None else f"another run, {owner}"
        return LockedError(
            f"output folder '{self._folder}' is in use by {who}; wait for it or stop it, then run "
            "the same command again, or choose another folder with --output"
        )

    def _recorded(self) -> Owner | None:
        return _parse(os.pread(self._descriptor, _RECORD_BYTES, 0))

    def _write(self) -> None:
        self._owner = replace(self._owner, heartbeat=time.time())
        # One write of one size, so that a reader never sees half a record.
        os.pwrite(
            self._descriptor, json.dumps(asdict(self._owner)).encode().ljust(_RECORD_BYTES), 0
        )
        os.fsync(self._descriptor)  # a network file system may keep it to itself for half a minute

    def _beat(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._write()
            except OSError as error:
                logger.warning("the heartbeat in '%s' cannot be written: %s", self._path, error)
