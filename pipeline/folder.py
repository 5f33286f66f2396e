"""Where things lie in a run folder. Standard library only.

    part-00000.parquet …     the output
    _SUCCESS                 only when complete
    .shardmill/              manifest.json, job.yaml, lock, segments/, tmp/, logs/, input/

The inner folder starts with a dot so that readers of the output skip it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run folder; whether they exist is not known here."""

    root: Path

    @property
    def internal(self) -> Path:
        """What is Shardmill's own."""
        return self.root / ".shardmill"

    @property
    def manifest(self) -> Path:
        """What is to be done; written once."""
        return self.internal / "manifest.json"

    @property
    def job(self) -> Path:
        """The job with everything filled in, for people."""
        return self.internal / "job.yaml"

    @property
    def lock(self) -> Path:
        """Who works here; never deleted."""
        return self.internal / "lock"

    @property
    def segments(self) -> Path:
        """Committed pieces of shards that are in no part yet."""
        return self.internal / "segments"

    @property
    def tmp(self) -> Path:
        """Files being written; what a dead process left here means nothing."""
        return self.internal / "tmp"

    @property
    def logs(self) -> Path:
        """Logs of the runs."""
        return self.internal / "logs"

    @property
    def input(self) -> Path:
        """Inputs that had to be converted to Parquet."""
        return self.internal / "input"

    @property
    def success(self) -> Path:
        """The empty file that says that all parts are there."""
        return self.root / "_SUCCESS"
