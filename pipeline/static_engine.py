"""`model.generate` on left-padded batches of similar length: the reference for other engines.

A batch runs until its slowest row has ended, so the waiting requests are sorted by length first.
What is waiting when a sorted run is used up makes the next one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pipeline.admission import failed, refusal
from pipeline.cache_support import mixed_columns
from pipeline.errors import describe
from pipeline.memory_limit import MemoryLimit
from pipeline.metrics import EngineMetrics, PrefillCounts
from pipeline.model import Model
from pipeline.padding import pad_left
from pipeline.records import Completion, Request, RequestId
from pipeline.room import is_out_of_memory
from pipeline.sampling import Sampler
from pipeline.stopping import Generated, StopStrings, TokenListener, nobody_listens

logger = logging.getLogger(__name__)


class StaticEngine:
    """An `Engine` whose step is one batch from its first token to its last.

    Args:
        model: the loaded model.
        batch_size: most rows of a batch.
        on_token: told of each row after each of its tokens.
        equal_lengths: batches only prompts of one length, for models that padding confuses.
        limit: what running out of memory has taught others; it counts `max_new_tokens` too.

    Attributes:
        metrics: what has been done so far; a row that has ended keeps its slot until the batch is
            done.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int,
        on_token: TokenListener = nobody_listens,
        equal_lengths: bool = False,
        limit: MemoryLimit | None = None,
    ) -> None:
        self.on_token = on_token
        self.num_running = 0
        self.metrics = EngineMetrics()
        self._limit = limit or MemoryLimit()
        self._batch_size = batch_size
        self._equal_lengths = equal_lengths
        self._model = model
        self._mixed_columns = mixed_columns(model.model.config)
        self._vocabulary = model.vocabulary
        self._arrived: list[Request] = []
        self._run: deque[Request] = deque()
        self._refused: list[Completion] = []
        self._stops: dict[tuple[str, ...], StopStrings] = {}

    @property
    def num_waiting(self) -> int:
        """Requests not started, and error completions not yet returned."""
        return len(self._arrived) + len(self._run) + len(self._refused)

    def add(self, requests: Sequence[Request]) -> None:
        """Queues requests; those that cannot be done come back from the next step."""
        for request in requests:
            error = refusal(request, self._model.context_length, self._model.num_embeddings)
            if error is None:
                self._arrived.append(request)
            else:
                self._refused.append(failed(request, error))

    def unstarted(self) -> list[RequestId]:
        """Requests that have no token yet."""
        return [request.id for request in (*self._run, *self._arrived)]

    def withdraw(self, ids: AbstractSet[RequestId]) -> list[RequestId]:
        """Forgets those of these requests that have no token yet, and tells which they were."""
        withdrawn = [identity for identity in self.unstarted() if identity in ids]
        self._run = deque(request for request in self._run if request.id not in ids)
        self._arrived = [request for request in self._arrived if request.id not in ids]
        return withdrawn

    def step(self) -> list[Completion]:
        """Generates one batch, or finds that it must be a smaller one and returns nothing."""
        refused, self._refused = self._refused, []
        if not self._run:
            # Longest first: a batch that is too big shows at once.
            self._run.extend(sorted(self._arrived, key=_order))
            self._arrived.clear()
        batch = self._next_batch()
        if not batch:
            return refused
        self.num_running = len(batch)
        try:
            return refused + self._generate(batch)
        finally:
            self.num_running = 0

    def _next_batch(self) -> list[Request]:
        """The next rows of one `max_new_tokens`, and where need be of one length.

        A row that had to go on beyond its own might leave the model's table of positions.
        """
        batch: list[Request] = []
        max_rows = self._batch_size
        max_tokens = self._limit.max_tokens
        if self._run and max_tokens is not None:
            max_rows = min(max_rows, max(1, max_tokens // _num_tokens(self._run[0])))
        while self._run and len(batch) < max_rows:
            if batch and not self._go_together(batch[0], self._run[0]):
                break
            batch.append(self._run.popleft())
        return batch

    def _go_together(self, one: Request, other: Request) -> bool:
        if one.sampling.max_new_tokens != other.sampling.max_new_tokens:
            return False
        if len(one.prompt_ids) == len(other.prompt_ids):
            return True
        return not (self._equal_lengths or self._is_too_long_to_mix(one))

    def _is_too_long_to_mix(self, longest: Request) -> bool:
        return self._mixed_columns is not None and _num_tokens(longest) > self._mixed_columns

    def _generate(self, batch: list[Request]) -> list[Completion]:
        try:
            return self._attempt(batch)
        except _ListenerError as error:
            raise error.cause from None
        except Exception as error:
            # Models raise anything over an odd row, and it costs that row.
            no_memory = is_out_of_memory(error)
            # After any other failure of the device itself, nothing works in this process.
            if isinstance(error, torch.AcceleratorError) and not no_memory:
                raise
            message = describe(error)
        # Only here, where the exception and the tensors its frames hold are gone.
        if no_memory:
            return self._shrink(batch)
        if len(batch) == 1:
            return [failed(batch[0], f"generate: {message}")]
        logger.warning("a batch of %d failed (%s); its rows run alone", len(batch), message)
        return [completion for request in batch for completion in self._generate([request])]

    def _shrink(self, batch: list[Request]) -> list[Completion]:
        """Puts a batch back that was too big, to be halved; gives up on a single row."""
        torch.cuda.empty_cache()
        length = _num_tokens(batch[0])
        if len(batch) == 1:
            return [failed(batch[0], f"out_of_memory: {length} tokens do not fit, even alone")]
        self._limit.lower(len(batch) // 2 * length)
        self._run.extendleft(reversed(batch))
        logger.warning(
            "out of memory with %d rows of %d tokens: from now on at most %d tokens in a batch",
            len(batch),
            length,
            self._limit.max_tokens,
        )
        return []

    def _attempt(self, batch: list[Request]) -> list[Completion]:
        rows = [Generated(request, self._stops_of(request), self._vocabulary) for request in batch]
        prompts = [request.prompt_ids for request in batch]
        input_ids, attention_mask = pad_left(prompts, self._model.pad_id, self._model.device)
        sampler = Sampler(batch, self._vocabulary, input_ids.device)
        picker = _Picker(sampler, attention_mask)
        if self._is_too_long_to_mix(batch[0]):
            self._forget_lengths(input_ids)
        generate: Any = self._model.caller.generate
        generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=self._config(batch[0].sampling.max_new_tokens),
            logits_processor=LogitsProcessorList([picker]),
            stopping_criteria=StoppingCriteriaList([_Watcher(self, rows, picker)]),
            **self._model.adapter_options([request.adapter for request in batch]),
        )
        return [row.completion for row in rows if row.completion is not None]

    def _forget_lengths(self, input_ids: Tensor) -> None:
        """Has rotary frequencies that follow the longest row so far begin anew, by a short one."""
        with torch.no_grad():
            self._model.model(input_ids=input_ids[:1, -1:], use_cache=False)

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        """Greedy and without an end-of-sequence token: picker and watcher see to both."""
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self._model.pad_id
        )

    def _stops_of(self, request: Request) -> StopStrings:
        stop = request.sampling.stop
        if stop not in self._stops:
            self._stops[stop] = StopStrings(stop, self._vocabulary)
        return self._stops[stop]


class _Picker(LogitsProcessor):
    """Chooses the tokens: of a sampled row it leaves only the drawn one to `generate`'s argmax.

    Attributes:
        is_broken: (rows,) bool, whether the row's logits have ever been anything but numbers.
    """

    def __init__(self, sampler: Sampler, attention_mask: Tensor) -> None:
        self.is_broken = torch.zeros_like(attention_mask[:, 0], dtype=torch.bool)
        self._sampler = sampler
        self._attention_mask = attention_mask
        self._seen: Tensor | None = None
        self._num_steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.is_broken |= ~scores.amax(dim=-1).isfinite()
        if self._sampler.has_penalty:
            self._see(input_ids, scores.shape[-1])
        scores = self._sampler.process(scores, self._num_steps, self._seen)
        tokens = None if self._sampler.is_greedy else self._sampler.pick(scores, self._num_steps)
        self._num_steps += 1
        if tokens is None:
            return scores
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def _see(self, input_ids: Tensor, num_logits: int) -> None:
        if self._seen is not None:
            self._seen.scatter_(1, input_ids[:, -1:], True)
            return
        # A column more, for padding and for prompt tokens that cannot be generated.
        spare = input_ids.masked_fill(self._attention_mask == 0, num_logits).clamp(max=num_logits)
        seen = torch.zeros(
            len(input_ids), num_logits + 1, dtype=torch.bool, device=input_ids.device
        )
        self._seen = seen.scatter_(1, spare, True)[:, :num_logits]


class _Watcher(StoppingCriteria):
    """Takes each new token to its row, and tells `generate` which rows have ended."""

    def __init__(self, engine: StaticEngine, rows: Sequence[Generated], picker: _Picker) -> None:
        self._engine = engine
        self._rows = rows
        self._picker = picker
        self._is_prefill = True
        self._before = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # One transfer for both.
        last = torch.stack([input_ids[:, -1], self._picker.is_broken.long()]).tolist()
        live = [row.completion is None for row in self._rows]
        self._measure(sum(live))
        for row, token, is_broken, is_live in zip(self._rows, *last, live, strict=True):
            if not is_live:
                continue
            if is_broken:
                row.fail("nan: the model's output is not a number")
            else:
                row.add(token)
            self._tell(row)
        has_ended = [row.completion is not None for row in self._rows]
        return torch.tensor(has_ended, device=input_ids.device)

    def _measure(self, num_live: int) -> None:
        """Counts what `generate` has done since the last call."""
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        engine, num_rows = self._engine, len(self._rows)
        if self._is_prefill:
            lengths = [len(row.request.prompt_ids) for row in self._rows]
            padding = num_rows * max(lengths) - sum(lengths)
            counts = PrefillCounts(worked=sum(lengths), padding=padding, saved=0)
            engine.metrics = engine.metrics.after_prefill(num_rows, counts, seconds)
            self._is_prefill = False
        else:
            engine.metrics = engine.metrics.after_decode(num_rows, num_live, seconds)

    def _tell(self, row: Generated) -> None:
        try:
            self._engine.on_token(row)
        except Exception as error:
            raise _ListenerError(error) from error


class _ListenerError(Exception):
    """What `on_token` raised: no row is to blame, so it must not become a row's error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


def _num_tokens(request: Request) -> int:
    """The length of a row at its end."""
    return len(request.prompt_ids) + request.sampling.max_new_tokens


def _order(request: Request) -> tuple[int, int]:
    return -request.sampling.max_new_tokens, -len(request.prompt_ids)
