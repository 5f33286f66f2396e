"""How fast a loaded model is at a shape, driven as the continuous engine drives it.

It knows neither jobs nor prompts: its rows are made-up tokens, all of the same length.
"""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import NamedTuple

import torch

from pipeline.batch import Batch, pick_first
from pipeline.cache_support import unsupported
from pipeline.decoder import Decoder
from pipeline.errors import ModelError, describe
from pipeline.forward import Forward
from pipeline.measured import MIN_CONTEXT, Cell, Shape, Speed, State
from pipeline.model import Model
from pipeline.peak_memory import peak_bytes, reset_peak
from pipeline.prefill import MAX_PREFILL_TOKENS
from pipeline.probes import probes_for
from pipeline.records import Request, RequestId, Sampling
from pipeline.room import is_out_of_memory, num_columns
from pipeline.self_check import Batches, SelfCheck
from pipeline.stepping import stepping_for
from pipeline.stopping import Generated, StopStrings
from pipeline.waiting import Row

NUM_ROUNDS = 3
"""Beside a first one, whose figures count only if there is no time for others."""
NUM_STEPS = 16
"""Of a round, beside the first ones."""
NUM_WARM_STEPS = 2
"""The first records a step, or has a library choose its kernels."""
_ENDLESS = Sampling(max_new_tokens=2**31, ignore_eos=True)


def set_attention(model: Model, name: str) -> None:
    """Makes a loaded model attend by another implementation.

    Raises:
        ModelError: it has no such one, or a package is missing.
    """
    try:
        model.model.set_attn_implementation(name)
    except (ImportError, ValueError, OSError) as error:
        raise ModelError(f"attention {name} cannot be used: {describe(error)}") from error
    if model.model.config._attn_implementation != name:
        raise ModelError(
            f"attention {name} cannot be used: {type(model.model).__name__} has its own, "
            f"{model.model.config._attn_implementation}"
        )


class _Round(NamedTuple):
    prefill_tokens_per_second: float
    steps: list[float]
    cache_bytes: int


class SpeedMeter:
    """Measures a model shape by shape.

    Args:
        check: the batches in which the model's answers are right; None takes any for right.

    Raises:
        ModelError: the model takes the static engine, which has no step to measure.
    """

    def __init__(self, model: Model, check: SelfCheck | None = None) -> None:
        reason = unsupported(model.model)
        if check is not None and check.batches is not Batches.SLOTS:
            reason = reason or "; ".join(check.rejected)
        if reason:
            raise ModelError(
                f"the model takes the static engine ({reason}), and bench measures the steps of "
                "the continuous one: use `shardmill bench --compare none JOB.yaml`, which runs "
                "either"
            )
        stepping = stepping_for(model)
        self._model = model
        self._forward = Forward(model)
        self._decoder = Decoder(self._forward, stepping.make_capture)
        self._reads_behind = stepping.reads_behind
        self._tokens = probes_for(model)[0]
        # What is done once in a process must not make the first shape look too slow.
        self.measure(Shape(1, MIN_CONTEXT), max_seconds=0)

    def measure(self, shape: Shape, max_seconds: float) -> Cell:
        """Prefill and decode of one shape.

        Args:
            max_seconds: after which it goes with the steps it has, one at least.

        Raises:
            torch.AcceleratorError: the device has failed; nothing works in this process any more.
        """
        try:
            with torch.no_grad():
                return Cell(shape, State.MEASURED, self._speed(shape, max_seconds))
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise
            state = State.MEMORY if is_out_of_memory(error) else State.FAILED
            message = describe(error)
        finally:
            self._decoder.forget()
        # Only here, where the exception and the tensors its frames hold are gone.
        gc.collect()
        torch.cuda.empty_cache()
        return Cell(shape, state, message=message)

    def _speed(self, shape: Shape, max_seconds: float) -> Speed:
        reset_peak(self._model.device)
        started = time.perf_counter()
        deadline = started + max_seconds
        rounds: list[_Round] = []
        while True:
            began = time.perf_counter()
            rounds.append(self._round(shape, deadline))
            now = time.perf_counter()
            if len(rounds) > NUM_ROUNDS or now + (now - began) > deadline:
                break
        counted = rounds[1:] or rounds  # the first has libraries make themselves ready
        steps = [seconds for one in counted for seconds in one.steps]
        return Speed(
            prefill_tokens_per_second=median(one.prefill_tokens_per_second for one in counted),
            decode_tokens_per_second=shape.batch / median(steps),
            step_seconds=median(steps),
            num_steps=len(steps),
            cache_bytes=rounds[0].cache_bytes,
            peak_bytes=peak_bytes(self._model.device),
            seconds=time.perf_counter() - started,
        )

    def _round(self, shape: Shape, deadline: float) -> _Round:
        """Prompts of as many rows as the engine would take at a time, and steps of all rows."""
        num_prompt = shape.context - NUM_STEPS - NUM_WARM_STEPS
        rows = [self._row(number, num_prompt) for number in range(shape.batch)]
        part = rows[: max(1, MAX_PREFILL_TOKENS // num_prompt)]
        started = time.perf_counter()
        prefilled, logits = self._forward.prefill([row.requests[0].prompt_ids for row in part])
        pick_first(part, self._model.vocabulary, logits)  # waits for a GPU
        prefill_seconds = time.perf_counter() - started
        batch = Batch(self._decoder, self._model.vocabulary, self._reads_behind)
        batch.cache.resize(shape.batch, num_columns(shape.context))
        for first in range(0, shape.batch, len(part)):
            # The same keys and values again and again: what they are does not change the work.
            some = rows[first : first + len(part)]
            batch.append(some, prefilled, range(len(some)))
        del prefilled, logits
        return _Round(
            prefill_tokens_per_second=len(part) * num_prompt / prefill_seconds,
            steps=self._steps(batch, deadline),
            cache_bytes=batch.cache.num_token_bytes * shape.batch * batch.cache.capacity,
        )

    def _row(self, number: int, num_prompt: int) -> Row:
        """A row of ordinary tokens that has its first token, which differs from row to row."""
        ids = [self._tokens[(number + place) % len(self._tokens)] for place in range(num_prompt)]
        vocabulary = self._model.vocabulary
        request = Request(RequestId(0, number, 0), tuple(ids), _ENDLESS)
        row = Row(request, Generated(request, StopStrings((), vocabulary), vocabulary))
        row.generated.add(self._tokens[number % len(self._tokens)])
        return row

    def _steps(self, batch: Batch, deadline: float) -> list[float]:
        """Seconds of steps, without the first ones unless there is no time for more."""
        # What is read a step behind has not been waited for at first.
        least = 1 + NUM_WARM_STEPS if self._reads_behind else 1
        seconds: list[float] = []
        while len(seconds) < NUM_WARM_STEPS + NUM_STEPS:
            if len(seconds) >= least and time.perf_counter() > deadline:
                break
            started = time.perf_counter()
            batch.decode()
            seconds.append(time.perf_counter() - started)
        if self._reads_behind:
            torch.cuda.synchronize(self._model.device)
        return seconds[NUM_WARM_STEPS:] or seconds[-1:]
