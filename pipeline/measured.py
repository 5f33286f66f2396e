"""What `bench` measures, and which cells it need not try. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

MIN_CONTEXT = 32
"""Tokens of a row, so that there is a prompt before the steps that are measured."""


class State(str, Enum):
    """What became of an attempt to measure something."""

    MEASURED = "measured"
    MEMORY = "memory"  # it ran out, and said so
    KILLED = "killed"  # its process was, most likely by the system for want of memory
    FAILED = "failed"  # it raised something else
    SLOW = "slow"  # it was given up
    UNTRIED = "untried"  # a smaller one was any of these, or took too long


@dataclass(frozen=True, slots=True)
class Shape:
    """How much runs at a time.

    Attributes:
        batch: rows.
        context: tokens of each row, prompt and completion, when the measurement ends.
    """

    batch: int
    context: int


@dataclass(frozen=True, slots=True)
class Speed:
    """The figures of a shape.

    Attributes:
        prefill_tokens_per_second: of prompts, as many at a time as the engine would take.
        decode_tokens_per_second: of all rows together.
        step_seconds: of a decode step, the median.
        num_steps: that it is the median of, over some rounds of prompts and steps.
        cache_bytes: of the buffers for keys and values.
        peak_bytes: most memory taken meanwhile: of the GPUs what torch has allocated, on a CPU of
            the whole process.
        seconds: that the measurement took.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    step_seconds: float
    num_steps: int
    cache_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One shape, measured or not; `message` says why not, where there is more to say."""

    shape: Shape
    state: State
    speed: Speed | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as it was loaded.

    Attributes:
        device: `cpu`, or the GPU's name.
        job_cache_bytes: what a job gives keys and values, unless `engine.cache_bytes` says
            otherwise.
        loaded_bytes: memory taken once it was loaded, measured as `Speed.peak_bytes`.
    """

    architecture: str
    num_parameters: int
    dtype: str
    quantization: str
    attention: str
    device: str
    num_threads: int
    num_weight_bytes: int
    loaded_bytes: int
    load_seconds: float
    context_length: int | None
    job_cache_bytes: int


@dataclass
class Limits:
    """Shapes that were too much, and so are all that are at least as large in both ways."""

    too_large: list[Shape] = field(default_factory=list)

    def allow(self, shape: Shape) -> bool:
        """Whether it is worth trying."""
        return not any(
            shape.batch >= limit.batch and shape.context >= limit.context
            for limit in self.too_large
        )

    def learn(self, cell: Cell, max_seconds: float) -> None:
        """Takes note of a cell that was too much, or took longer than it should."""
        is_slow = cell.speed is not None and cell.speed.seconds > max_seconds
        if cell.state is not State.MEASURED or is_slow:
            self.too_large.append(cell.shape)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one row got.

    Attributes:
        prompt: decoded from the tokens that the model got; None if there was no prompt.
        text: None on an error.
        ids: of the tokens generated, the one that ended it included.
    """

    row_id: str
    prompt: str | None
    text: str | None
    ids: tuple[int, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """A sample of a job's rows, answered.

    Attributes:
        seconds: from the first request to the last answer, without loading.
        prefill_tokens_per_second, decode_tokens_per_second: of each phase by itself; None where
            the engine does not tell.
        peak_bytes: as `Speed.peak_bytes`.
    """

    answers: tuple[Answer, ...]
    num_prompt_tokens: int
    num_completion_tokens: int
    seconds: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    peak_bytes: int
