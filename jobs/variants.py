"""One model in several quantizations, each on the devices that one worker of a job would have."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jobs.config import WorkersSettings
from jobs.isolated import LostError
from pipeline.checkpoint import fetch
from pipeline.errors import ResourceError, ShardmillError, WorkerError
from pipeline.measured import State
from pipeline.settings import ModelSettings

LOAD_SECONDS = 2 * 3600.0
"""For a model to be read from a slow disk."""


def variant(model: ModelSettings, word: str | None) -> ModelSettings:
    """The model in another quantization, found and checked, its revision a commit.

    Args:
        word: as in `model.quantization`; None is the model block's own, and so is its word, with
            its options.

    Raises:
        ModelError: as `run` would.
    """
    if word not in (None, model.quantization.method):
        model = ModelSettings.model_validate(model.model_dump() | {"quantization": word})
    return model.model_copy(update={"revision": fetch(model).revision})


def labels(words: Sequence[str]) -> list[str]:
    """The words, numbered where one comes again."""
    counts = [words[: place + 1].count(word) for place, word in enumerate(words)]
    return [
        word if count == 1 else f"{word} ({count})"
        for word, count in zip(words, counts, strict=True)
    ]


def device_environment(workers: WorkersSettings) -> dict[str, str]:
    """Shows a process as many GPUs as one worker gets, the first ones."""
    count = 1 if workers.gpus_per_worker == "auto" else workers.gpus_per_worker
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(count))) if visible is None else visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[:count])}


def state_of(error: LostError | ShardmillError) -> State:
    """What an error of such a process comes to."""
    if isinstance(error, ResourceError):
        return State.MEMORY
    if isinstance(error, LostError) and (error.signal or error.is_late):
        return State.SLOW if error.is_late else State.KILLED
    return State.FAILED


def as_sentence(what: str, error: LostError | ShardmillError) -> ShardmillError:
    """The error that ends a command for which nothing is left to measure."""
    if isinstance(error, ShardmillError):
        return error
    state = state_of(error)
    if state is State.KILLED:
        return ResourceError(
            f"the process that has {what} {error}, most likely for want of memory: free some, or "
            "take a smaller model or quantization"
        )
    if state is State.SLOW:
        return ResourceError(f"the process that has {what} {error}: see what its disk or GPU does")
    return WorkerError(f"the process that has {what} {error}")
