"""What a worker tells of its work: counts, never prompts or completions.

Apart from `shard_runner`, so that the driver can read it without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.segments import SegmentInfo, Totals


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
    """How far a worker is; every number only grows, but for `interim`.

    Attributes:
        interim: what it has committed of shards that it has not answered for yet.
    """

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_commits: int = 0
    interim: Totals = field(default_factory=Totals)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that is ready.

    Attributes:
        devices: its `CUDA_VISIBLE_DEVICES`; empty without a GPU.
        model: one line about the loaded model: size, type, device.
        notes: what a user should know about how it was loaded.
    """

    node: str
    devices: str
    model: str
    notes: tuple[str, ...]
