"""What a worker tells of its work: counts, never prompts or completions.

Apart from `shard_runner`, so that the driver can read it without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.segments import SegmentInfo


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """What one attempt at a shard came to.

    Attributes:
        commits: the segments this attempt published.
        is_complete: no row of the shard is missing any more.
    """

    shard: int
    commits: tuple[SegmentInfo, ...]
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a worker is; every count only grows."""

    num_prompt_tokens: int
    num_generated_tokens: int
    num_commits: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that is ready.

    Attributes:
        model: one line about the loaded model: size, type, device.
        notes: what a user should know about how it was loaded.
    """

    node: str
    pid: int
    devices: str
    load_seconds: float
    model: str
    notes: tuple[str, ...]
