"""What drives a model: requests in, completions out.

The caller knows `Engine` and not which kind it has, so that an engine which refills its batch in
flight can take the place of one that does not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from pipeline.cache_support import unsupported
from pipeline.continuous_engine import ContinuousEngine
from pipeline.errors import ModelError
from pipeline.memory_limit import MemoryLimit
from pipeline.metrics import EngineMetrics
from pipeline.model import Model
from pipeline.records import Completion, Request, RequestId
from pipeline.self_check import Batches, SelfCheck
from pipeline.settings import EngineSettings
from pipeline.static_engine import StaticEngine
from pipeline.stopping import TokenListener, nobody_listens

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Generates completions. All methods belong to one thread; the counts may be read from any.

    A request that cannot be done comes back as an error completion. Exceptions are for what no
    request is to blame for, and end the engine.
    """

    @property
    def num_waiting(self) -> int:
        """Requests not started, and error completions not yet returned."""

    @property
    def num_running(self) -> int:
        """Requests in the batch; 0 between two steps of an engine that finishes its batches."""

    @property
    def metrics(self) -> EngineMetrics:
        """What has been done so far; new figures come also during a step."""

    def add(self, requests: Sequence[Request]) -> None:
        """Queues requests, in any order and at any time."""

    def unstarted(self) -> list[RequestId]:
        """Requests that have no token yet."""

    def withdraw(self, ids: AbstractSet[RequestId]) -> list[RequestId]:
        """Forgets those of these requests that have no token yet, and tells which they were.

        Some may stay: those that share their row with others.
        """

    def step(self) -> list[Completion]:
        """Goes on with the work; returns what has finished since the last call, perhaps nothing."""


def build_engine(
    model: Model,
    settings: EngineSettings,
    on_token: TokenListener = nobody_listens,
    limit: MemoryLimit | None = None,
    check: SelfCheck | None = None,
) -> Engine:
    """The engine that the settings ask for, or one that asks less of the model.

    Args:
        on_token: told of each row after each of its tokens.
        limit: what running out of memory has taught others.
        check: the batches in which the model's answers are right; None takes any for right.

    Raises:
        ModelError: the continuous engine is asked for and cannot take the model.
    """
    reason = unsupported(model.model)
    if settings.kind == "continuous" and reason:
        raise ModelError(
            f"engine.kind is continuous, but {reason}: set engine.kind to auto or static"
        )
    batches = Batches.SLOTS if check is None else check.batches
    if batches is Batches.EQUAL_LENGTHS:
        logger.warning("taking the static engine with prompts of one length at a time")
        return StaticEngine(model, settings.batch_size, on_token, equal_lengths=True, limit=limit)
    if settings.kind == "static" or reason or batches is Batches.PADDED:
        if settings.kind != "static":
            logger.info("taking the static engine: %s", reason or "slots change answers")
        return StaticEngine(model, settings.batch_size, on_token, limit=limit)
    return ContinuousEngine(model, settings.batch_size, settings.cache_bytes, on_token, limit)
