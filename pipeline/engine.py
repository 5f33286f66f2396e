"""What drives a model: requests in, completions out.

The caller knows `Engine` and not which kind it has, so that an engine which refills its batch in
flight can take the place of one that does not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from pipeline.cache_support import unsupported
from pipeline.continuous_engine import ContinuousEngine
from pipeline.errors import ModelError
from pipeline.model import Model
from pipeline.padding import padding_problem
from pipeline.records import Completion, Request
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
    def num_prompt_tokens(self) -> int:
        """Prompt tokens worked through so far; it only grows, also during a step."""

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far, repeated work included; it only grows, also during a step."""

    def add(self, requests: Sequence[Request]) -> None:
        """Queues requests, in any order and at any time."""

    def step(self) -> list[Completion]:
        """Goes on with the work; returns what has finished since the last call, perhaps nothing."""


def build_engine(
    model: Model, settings: EngineSettings, on_token: TokenListener = nobody_listens
) -> Engine:
    """The engine that the settings ask for; it tells `on_token` of every token.

    A model whose answers padding would change gets one that pads nothing, whatever is asked for.

    Raises:
        ModelError: the continuous engine is asked for and cannot take the model.
    """
    reason = unsupported(model.model)
    if settings.kind == "continuous" and reason:
        raise ModelError(
            f"engine.kind is continuous, but {reason}: set engine.kind to auto or static"
        )
    problem = padding_problem(model)
    if problem:
        logger.warning(
            "taking the static engine with prompts of one length at a time, since %s", problem
        )
        return StaticEngine(model, settings.batch_size, on_token, equal_lengths=True)
    if settings.kind == "static" or reason:
        if settings.kind == "auto":
            logger.info("taking the static engine: %s", reason)
        return StaticEngine(model, settings.batch_size, on_token)
    return ContinuousEngine(model, settings.batch_size, settings.cache_bytes, on_token)
