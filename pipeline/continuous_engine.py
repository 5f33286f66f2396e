"""Continuous left-padded batching: a row that ends leaves its slot to the next prompt.

A step admits waiting rows into free slots (prefill), gives every live row one token (decode), and
retires the rows that have ended. What does not fit into memory is put back and continued later,
from the tokens it has.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import torch

from pipeline.admission import failed, refusal
from pipeline.batch import Batch, pick_first
from pipeline.decoder import Decoder
from pipeline.errors import describe
from pipeline.forward import Forward
from pipeline.intake import Intake
from pipeline.memory_limit import MemoryLimit
from pipeline.metrics import EngineMetrics
from pipeline.model import Model
from pipeline.prefill import Part, Prefilled, Prefiller
from pipeline.records import Completion, Request, RequestId
from pipeline.room import Room, default_cache_bytes, is_out_of_memory
from pipeline.sampling import BROKEN
from pipeline.stepping import Stepping, stepping_for
from pipeline.stopping import TokenListener, nobody_listens
from pipeline.waiting import Row, Waiting

logger = logging.getLogger(__name__)

REFILL_SHARE = 10
"""Free slots are refilled when they are a tenth of all, so that prefill is a batch."""
LOOKAHEAD = 8
"""Rows that are sorted by length at a time, per slot."""


class ContinuousEngine:
    """An `Engine` whose step is one token of every live row.

    Args:
        num_slots: most rows at a time.
        cache_bytes: memory for keys and values; None takes what a GPU has left, or a default.
        on_token: told of each row after each of its tokens.
        limit: what running out of memory has taught others.
        stepping: how decode steps are launched and read; None is what suits the model's device.
    """

    def __init__(
        self,
        model: Model,
        num_slots: int,
        cache_bytes: int | None = None,
        on_token: TokenListener = nobody_listens,
        limit: MemoryLimit | None = None,
        stepping: Stepping | None = None,
    ) -> None:
        self._on_token = on_token
        self.num_running = 0
        self._metrics = EngineMetrics()
        self._model = model
        self._forward = Forward(model)
        self._prefiller = Prefiller(self._forward)
        self._stepping = stepping or stepping_for(model)
        self._decoder = Decoder(self._forward, self._stepping.make_capture)
        self._batch = self._new_batch()
        self._intake = Intake(model.vocabulary)
        self._waiting = Waiting(num_lookahead=LOOKAHEAD * num_slots)
        num_bytes = cache_bytes or default_cache_bytes(model.devices)
        self._room = Room(num_slots, num_bytes, limit or MemoryLimit())
        self._admitting: list[Row] = []
        self._finished: list[Completion] = []
        self._num_open = 0

    @property
    def num_waiting(self) -> int:
        """Requests not started or put back, and error completions not yet returned."""
        return self._num_open - self.num_running

    @property
    def metrics(self) -> EngineMetrics:
        """What has been done so far."""
        return replace(self._metrics, num_window_moves=self._room.num_moves)

    def add(self, requests: Sequence[Request]) -> None:
        """Queues requests; those that cannot be done come back from the next step."""
        self._num_open += len(requests)
        for request in requests:
            error = refusal(request, self._model.context_length, self._model.num_embeddings)
            if error is not None:
                self._finished.append(failed(request, error))
            elif (row := self._intake.row_for(request)) is not None:
                self._waiting.add(row)

    def unstarted(self) -> list[RequestId]:
        """Requests that have no token yet."""
        return self._waiting.unstarted()

    def withdraw(self, ids: AbstractSet[RequestId]) -> list[RequestId]:
        """Forgets those of these requests that have no token yet, and tells which they were."""
        rows = self._waiting.withdraw(ids)
        for row in rows:
            self._intake.forget(row)
        withdrawn = [request.id for row in rows for request in row.requests]
        self._num_open -= len(withdrawn)
        return withdrawn

    def step(self) -> list[Completion]:
        """Admits what can be admitted, and gives each live row a token.

        Out of memory, it puts the rows back instead, and the next step has fewer.
        """
        try:
            with torch.no_grad():
                self._refill()
                self._decode()
            message = None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error) or type(error).__name__
        # Only here, where the exception and the tensors its frames hold are gone.
        if message is not None:
            self._make_smaller(message)
        self.num_running = sum(len(row.requests) for row in self._batch.rows)
        finished, self._finished = self._finished, []
        self._num_open -= len(finished)
        return finished

    def _refill(self) -> None:
        """Admits waiting rows, if enough slots are free to make it worth while."""
        num_free = self._num_free()
        num_live = len(self._batch)
        if num_live and num_free * REFILL_SHARE < num_live + num_free:
            return
        while num_free > 0 and (rows := self._waiting.head(num_free)):
            if not self._room.is_for_one:  # a prefix that is kept would take what the row needs
                self._prefiller.share(self._waiting.prefix, self._waiting.prefix_adapter)
            part = self._prefiller.next_part(rows, self._room.max_prefill_tokens)
            self._admitting = self._waiting.take(len(part.rows))
            self._room.make_way(self._batch.cache, part.rows[0].length)
            self._admit(part)
            self._admitting = []
            num_free = min(num_free - len(part.rows), self._num_free())

    def _num_free(self) -> int:
        """Slots that the next waiting rows may take."""
        head = self._waiting.head(1)
        if not head:
            return 0
        length = max(self._batch.cache.window.length, head[0].length)
        num_rows = self._room.num_rows(length, num_beside=head[0].length)
        return max(0, num_rows - len(self._batch))

    def _admit(self, part: Part) -> None:
        """Prefills rows and takes them into the batch; one that raises is an error row."""
        started = time.perf_counter()
        try:
            prefilled = self._prefiller.run(part)
        except Exception as error:
            # After a failure of the device itself, nothing works in this process.
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            message = describe(error)
        else:
            self._welcome(part.rows, prefilled)
            seconds = time.perf_counter() - started
            self._metrics = self._metrics.after_prefill(len(part.rows), prefilled.counts, seconds)
            return
        if len(part.rows) == 1 and part.num_shared == 0:
            self._fail(part.rows[0], f"generate: {message}")
            return
        logger.warning("%d prompts failed together (%s); they run alone", len(part.rows), message)
        for row in part.rows:
            self._admit(Part([row], num_shared=0))

    def _welcome(self, rows: Sequence[Row], prefilled: Prefilled) -> None:
        """Gives prefilled rows their next token, and slots to those that it does not end."""
        self._room.set_token_bytes(prefilled.cache.token_bytes)
        tokens = pick_first(rows, self._model.vocabulary, prefilled.logits)
        self._accept(zip(rows, tokens, strict=True))
        self._take_in(rows, prefilled, [n for n, row in enumerate(rows) if not row.has_ended])

    def _take_in(self, rows: Sequence[Row], prefilled: Prefilled, places: list[int]) -> None:
        """Gives slots to the rows at these places."""
        length = max(self._batch.cache.window.length, prefilled.cache.window.length)
        num_beside = prefilled.cache.num_slots * prefilled.cache.capacity
        num_free = max(0, self._room.num_rows(length, num_beside) - len(self._batch))
        # More rows than slots, if the memory they take was not known before.
        places, left_over = places[:num_free], places[num_free:]
        if places and self._room.is_for_one:
            self._batch.begin_with(rows, prefilled.cache)  # a copy would take as much again
        elif places:
            num_rows = len(self._batch) + len(places)
            self._room.make_for(self._batch.cache, num_rows, length, num_beside)
            sources = [prefilled.sources[place] for place in places]
            self._batch.append([rows[place] for place in places], prefilled.cache, sources)
        # Last: where memory runs out above, all that are being admitted are put back.
        self._put_back([rows[place] for place in left_over])

    def _decode(self) -> None:
        """Gives each live row a token and retires the rows that have ended."""
        if not self._batch.rows:
            return
        started = time.perf_counter()
        self._make_column()
        num_slots = self._batch.cache.num_slots
        tokens = self._batch.decode()
        num_finished = len(self._finished)
        self._accept(tokens)
        if len(self._finished) > num_finished:
            ended = {slot for slot, row in enumerate(self._batch.rows) if row.has_ended}
            self._batch.remove(ended)
        seconds = time.perf_counter() - started
        self._metrics = self._metrics.after_decode(num_slots, len(tokens), seconds)

    def _accept(self, tokens: Iterable[tuple[Row, int]]) -> None:
        """Takes each row's token to it; some of them end by it."""
        for row, token in tokens:
            if token == BROKEN:
                self._fail(row, "nan: the model's output is not a number")
                continue
            if row.generated.add(token):
                self._close(row)
            self._on_token(row.generated)

    def _make_column(self) -> None:
        """Sees to it that the next tokens have a column; the youngest rows may have to go."""
        cache = self._batch.cache
        if self._room.make_column(cache, in_buckets=self._decoder.replays):
            return
        length = cache.window.length + 1
        youngest = self._batch.by_age()[self._room.num_rows(length) :]
        if youngest:
            self._batch.remove({self._batch.rows.index(row) for row in youngest})
            self._put_back(youngest)
        self._room.resize(cache, length)

    def _put_back(self, rows: Sequence[Row]) -> None:
        self._waiting.put_back(rows)
        self._metrics = self._metrics.plus(put_back=len(rows))

    def _make_smaller(self, message: str) -> None:
        """Frees all memory and puts the rows back, to run half as many at a time.

        A row that was alone may have had more than it needs; when it has not, it does not fit.
        """
        rows = list(dict.fromkeys([*self._batch.by_age(), *self._admitting]))
        num_allocated = self._batch.cache.num_slots * self._batch.cache.capacity
        self._decoder.forget()
        self._batch = self._new_batch()
        self._prefiller.forget()
        self._admitting = []
        gc.collect()
        torch.cuda.empty_cache()
        self._metrics = self._metrics.plus(out_of_memory=1)
        if len(rows) > 1:
            self._room.halve(len(rows), max(row.length for row in rows), num_allocated)
            self._waiting.put_back([row for row in rows if not row.has_ended])
            logger.warning(
                "out of memory with %d rows (%s): going on with less", len(rows), message
            )
        elif not rows[0].has_ended and not self._room.is_for_one:
            self._room.is_for_one = True  # until it has ended
            self._waiting.put_back(rows)
        elif not rows[0].has_ended:
            self._fail(rows[0], f"out_of_memory: {rows[0].length} tokens do not fit, even alone")

    def _new_batch(self) -> Batch:
        return Batch(self._decoder, self._model.vocabulary, self._stepping.reads_behind)

    def _fail(self, row: Row, error: str) -> None:
        """Ends a row as an error; `error` is `kind: message`."""
        row.generated.fail(error)
        self._close(row)

    def _close(self, row: Row) -> None:
        """Hands out the answer of a row that has ended."""
        self._room.is_for_one = False
        self._intake.forget(row)
        self._finished.extend(row.completions())
