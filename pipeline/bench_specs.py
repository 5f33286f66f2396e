"""What `bench` asks a process of its own to do; small, and known without torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pipeline.measured import Shape
from pipeline.records import Sampling, Shard
from pipeline.settings import EngineSettings, ModelSettings, PromptSettings


@dataclass(frozen=True, slots=True)
class SpeedSpec:
    """A model to be measured shape by shape; `attention` None is the one that a job gets."""

    model: ModelSettings
    attention: str | None


@dataclass(frozen=True, slots=True)
class CellQuestion:
    """One shape, and the seconds after which to go with what there is."""

    shape: Shape
    max_seconds: float


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Rows of a job to be answered.

    Attributes:
        rows: shards of one row each.
        started: what chat templates take for now, so that all models get the same prompts.
    """

    model: ModelSettings
    prompt: PromptSettings
    engine: EngineSettings
    sampling: Sampling
    seed: int
    rows: tuple[Shard, ...]
    started: datetime
