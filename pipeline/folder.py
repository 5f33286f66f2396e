"""Where things lie in a run folder. Standard library only.

    part-00000.parquet …     the output
    _SUCCESS                 only when complete
    .shardmill/              manifest.json, job.yaml, parts.jsonl, metrics.json, memory.json,
                             failed.json, lock, beacon, segments/, tmp/, logs/, input/, retries/

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
    def beacon(self) -> Path:
        """A word of the present or last run, by which nodes tell that they see this folder."""
        return self.internal / "beacon"

    @property
    def metrics(self) -> Path:
        """What the workers of the last run have done."""
        return self.internal / "metrics.json"

    @property
    def memory(self) -> Path:
        """How many tokens run together, where memory has run out."""
        return self.internal / "memory.json"

    @property
    def failed(self) -> Path:
        """How many failed rows the last run allowed, if it ended because there were more."""
        return self.internal / "failed.json"

    @property
    def tally(self) -> Path:
        """What the parts hold, for a quick look; the parts themselves are what counts."""
        return self.internal / "parts.jsonl"

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
    def retries(self) -> Path:
        """A folder for each retry, by number."""
        return self.internal / "retries"

    @property
    def success(self) -> Path:
        """The empty file that says that all parts are there."""
        return self.root / "_SUCCESS"
