from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from pipeline import continuous_engine, room
from pipeline.batch import Batch
from pipeline.continuous_engine import ContinuousEngine
from pipeline.forward import Forward
from pipeline.memory_limit import MemoryLimit
from pipeline.model import Model
from pipeline.prefill import Prefiller
from pipeline.records import Request
from pipeline.room import num_columns
from pipeline.slot_layer import SlotLayer
from pipeline.slots import SlotCache
from pipeline.stepping import Stepping
from tests.bare_models import (
    NUM_TOKENS,
    alone,
    answers,
    bare_llama,
    drain,
    random_prompt,
    reference,
    request,
    spell,
    texts,
    varied,
)
from tests.recorded import STEPPINGS


@pytest.fixture(scope="module")
def model() -> Model:
    """A Llama whose answers vary; not to be changed."""
    torch.set_num_threads(1)
    return bare_llama()


@pytest.fixture(autouse=True)
def _tight_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "COLUMN_STEP", 1)
    monkeypatch.setattr(room, "GROWTH", 1)
    monkeypatch.setattr(room, "BUCKET_STEP", 8)


@pytest.fixture(autouse=True, params=STEPPINGS)
def stepping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stepping:
    """Every fault meets each way in which an engine may launch and read its steps."""
    chosen = STEPPINGS[request.param]
    monkeypatch.setattr(continuous_engine, "stepping_for", lambda model: chosen)
    return chosen


@cache
def poisoned(token: int | None) -> Model:
    """A Llama that gives nothing but NaN to a row with this token."""
    network = bare_llama(tie_word_embeddings=False)
    if token is not None:
        with torch.no_grad():
            network.model.get_input_embeddings().weight[token] = torch.nan
    return network


@cache
def alone_at(token: int | None, one: Request) -> list[int]:
    """What that model answers; asked again for every way of stepping."""
    return alone(poisoned(token), one)


def healthy(one: Request) -> list[int]:
    """The same of the model without poison."""
    return alone_at(None, one)


def test_a_row_of_nan_costs_one_row() -> None:
    """In a prompt or in flight; rows beside it, and those that get its slot, are unharmed."""
    requests = varied(12)
    counts = [set(healthy(one)) | set(one.prompt_ids) for one in requests]
    # A token that some rows never meet, some find in their prompt, and some generate.
    token = max(
        range(3, NUM_TOKENS),
        key=lambda one: sum(
            one in met and one not in row.prompt_ids
            for met, row in zip(counts, requests, strict=True)
        ),
    )
    model = poisoned(token)
    completions = answers(ContinuousEngine(model, num_slots=2), requests)
    num_broken = 0
    for one, completion, expected in zip(
        requests, completions, reference(model, requests), strict=True
    ):
        assert (completion.error, completion.text) == (expected.error, expected.text)
        if completion.error is not None:
            assert completion.error.startswith("nan: ")
            num_broken += token not in one.prompt_ids
    assert num_broken > 0
    assert sum(completion.error is None for completion in completions) >= 4


def test_nothing_of_nan_is_left_in_a_slot(
    monkeypatch: pytest.MonkeyPatch, stepping: Stepping
) -> None:
    """A row that comes to the slot later, and is too short to cover it, has its own answer."""
    monkeypatch.setattr(room, "COLUMN_STEP", 64)  # new buffers would have nothing left in them
    token, prompt = 50, (7, 8, 9)
    model = poisoned(token)
    long = next(
        one
        for row in range(99)
        if token not in (one := request(0, random_prompt(random.Random(row), 3), 90)).prompt_ids
        and len(alone_at(token, one)) > 40
    )
    late = request(2, prompt, 8)
    expected = texts(reference(model, [long, late]))
    engine = ContinuousEngine(model, num_slots=2)
    engine.add([long, request(1, prompt, 30, temperature=1.0)])
    engine.step()
    slot = engine._batch.rows.index(
        next(row for row in engine._batch.rows if row.requests[0].id.row)
    )
    engine._batch._last_tokens[slot] = token
    completions = [one for _ in range(1 + stepping.reads_behind) for one in engine.step()]
    assert [one.error for one in completions] == ["nan: the model's output is not a number"]
    for _ in range(12):
        completions += engine.step()
    engine.add([late])
    completions += drain(engine)
    assert texts(sorted(completions, key=lambda one: one.id))[::2] == expected


def test_nothing_of_nan_is_left_by_a_row_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last token may be computed once more, for nothing, and what comes of that be NaN."""
    monkeypatch.setattr(room, "COLUMN_STEP", 64)
    late = request(2, [7, 8, 9], 8)
    ending, long, token = next(
        (ending, long, healthy(ending)[3])
        for row in range(99)
        for ending in [request(1, [5 + row % 90, 6, 7], 4)]
        for long in [request(0, random_prompt(random.Random(row), 3), 60)]
        if len(healthy(ending)) == 4
        and len(healthy(long)) > 40
        and healthy(ending)[3]
        not in {*healthy(ending)[:3], *healthy(long), *healthy(late)}
        | {*ending.prompt_ids, *long.prompt_ids, *late.prompt_ids}
    )
    engine = ContinuousEngine(poisoned(token), num_slots=2)
    engine.add([long, ending])
    completions = [one for _ in range(18) for one in engine.step()]
    assert [one.id.row for one in completions] == [1]
    engine.add([late])
    completions += drain(engine)
    assert [one.error for one in completions] == [None] * 3
    expected = [spell(healthy(one)) for one in (long, ending, late)]
    assert texts(sorted(completions, key=lambda one: one.id)) == expected


def failing_prefill(token: int, error: Callable[[], Exception]) -> Callable[..., Any]:
    """`Forward.prefill`, which raises if a prompt of the batch has the token."""
    prefill = Forward.prefill

    def raising(self: Forward, rows: Sequence[Sequence[int]], *args: Any) -> Any:
        if any(token in row for row in rows):
            raise error()
        return prefill(self, rows, *args)

    return raising


@pytest.mark.parametrize("error", [RuntimeError("odd"), IndexError("odd"), TypeError("odd")])
def test_a_prompt_that_raises_costs_one_row(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its group is prefilled one by one, and only the culprit is an error row."""
    chance = random.Random(0)
    requests = [request(row, [3 + row, 4 + row, 5 + row]) for row in range(8)]
    culprit = request(8, [90, *random_prompt(chance, 2)])
    monkeypatch.setattr(Forward, "prefill", failing_prefill(90, lambda: error))
    completions = answers(ContinuousEngine(model, num_slots=9), [*requests, culprit])
    assert completions[-1].error == f"generate: {type(error).__name__}: odd"
    assert texts(completions[:-1]) == [spell(alone(model, one)) for one in requests]


@pytest.mark.parametrize("num_slots", [1, 4])
def test_a_prefix_that_raises_costs_no_row(
    model: Model, monkeypatch: pytest.MonkeyPatch, num_slots: int
) -> None:
    """The rows run without it, those of a group and a single one."""

    def broken(self: Prefiller) -> int:
        raise RuntimeError("odd")

    monkeypatch.setattr(Prefiller, "_compute_prefix", broken)
    chance = random.Random(0)
    prefix = random_prompt(chance, 40)
    requests = [request(row, prefix + random_prompt(chance, 3)) for row in range(4)]
    completions = answers(ContinuousEngine(model, num_slots), requests)
    assert texts(completions) == [spell(alone(model, one)) for one in requests]


def test_a_failed_device_ends_the_engine(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing works in the process any more: no row is to blame."""
    monkeypatch.setattr(
        Forward, "prefill", failing_prefill(3, lambda: torch.AcceleratorError("CUDA error", 700))
    )
    engine = ContinuousEngine(model, num_slots=4)
    engine.add([request(0, [3, 4])])
    with pytest.raises(torch.AcceleratorError):
        engine.step()


SHORTAGES = (
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("std::bad_alloc"),
)


@pytest.mark.parametrize("shortage", SHORTAGES, ids=["cuda", "python", "allocator", "c++"])
@pytest.mark.parametrize("where", ["decode", "append", "prefill"])
def test_out_of_memory_loses_no_row(
    model: Model, monkeypatch: pytest.MonkeyPatch, where: str, shortage: Exception
) -> None:
    """Wherever it runs out, the engine goes on with fewer rows, and every answer is the same."""
    original: Any = {
        "decode": Batch.decode,
        "append": SlotCache.append,
        "prefill": Forward.prefill,
    }[where]

    def limited(self: Any, *args: Any) -> Any:
        rows = {"decode": lambda: self.rows, "append": lambda: args[1], "prefill": lambda: args[0]}
        if len(rows[where]()) > 2:
            raise shortage
        return original(self, *args)

    owner = {"decode": Batch, "append": SlotCache, "prefill": Forward}[where]
    monkeypatch.setattr(owner, where, limited)
    requests = varied(14)
    requests += [request(14 + row, one.prompt_ids, 1) for row, one in enumerate(requests)]
    limit = MemoryLimit()
    engine = ContinuousEngine(model, num_slots=8, limit=limit)
    assert texts(answers(engine, requests)) == [spell(alone(model, one)) for one in requests]
    assert engine.metrics.num_out_of_memory > 0
    assert limit.max_tokens is not None
    assert limit.max_tokens < 8 * 40


@pytest.mark.parametrize("where", ["append", "remove"])
def test_out_of_memory_while_rows_are_put_back(
    model: Model, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A row that loses its slot in the same moment is done once, like every other."""
    original = getattr(Batch, where)
    num_calls = 0

    def short_at_times(self: Batch, *args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls in (1, 4, 9):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, *args)

    monkeypatch.setattr(Batch, where, short_at_times)
    token_bytes = Forward(model).prefill([(3, 4)])[0].num_token_bytes
    for temperature in (0.0, 1.0):
        num_calls = 0
        requests = varied(14, temperature=temperature)
        engine = ContinuousEngine(model, num_slots=8, cache_bytes=100 * token_bytes)
        assert answers(engine, requests) == reference(model, requests)
        assert engine.metrics.num_out_of_memory == 3


def test_out_of_memory_frees_everything(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of the batch and of the shared prefix, before the next attempt."""
    chance = random.Random(0)
    prefix = random_prompt(chance, 40)
    engine = ContinuousEngine(model, num_slots=4)
    engine.add([request(row, prefix + random_prompt(chance, 3), 20) for row in range(4)])
    engine.step()
    prefix_cache = engine._prefiller._cache
    assert prefix_cache is not None
    held = [weakref.ref(cache.layers[0].keys) for cache in (engine._batch.cache, prefix_cache)]
    del prefix_cache

    def full(self: Batch) -> list[int]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "decode", full)
        assert engine.step() == []
    assert [reference() for reference in held] == [None, None]
    assert len(drain(engine)) == 4


def test_a_row_too_big_alone_is_an_error_row(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others still run together."""
    resize = SlotCache.resize

    def limited(self: SlotCache, num_slots: int, capacity: int) -> None:
        if capacity > 60:
            raise MemoryError
        resize(self, num_slots, capacity)

    monkeypatch.setattr(SlotCache, "resize", limited)
    requests = [*varied(10), request(10, random_prompt(random.Random(5), 70))]
    engine = ContinuousEngine(model, num_slots=4)
    completions = answers(engine, requests)
    assert "tokens do not fit, even alone" in (completions[-1].error or "")
    assert texts(completions[:-1]) == [spell(alone(model, one)) for one in requests[:-1]]
    assert engine.metrics.num_steps < sum(one.num_completion_tokens for one in completions) / 2


def test_a_row_alone_is_tried_with_what_it_needs(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers are made with room to grow; where memory is short, that is no reason to fail a row.

    Nor has it taught anything about rows that run together.
    """
    monkeypatch.setattr(room, "GROWTH", 2)
    allocate = SlotLayer._allocate

    def limited(self: SlotLayer, *states: Any) -> None:
        if self._num_slots * self._capacity > 200:  # it needs 133, and would get twice as many
            raise MemoryError
        allocate(self, *states)

    monkeypatch.setattr(SlotLayer, "_allocate", limited)
    token_bytes = Forward(model).prefill([(3, 4)])[0].num_token_bytes
    long, limit = request(0, random_prompt(random.Random(5), 100), 20), MemoryLimit()
    engine = ContinuousEngine(model, 4, cache_bytes=400 * token_bytes, limit=limit)
    assert texts(answers(engine, [long])) == [spell(alone(model, long))]
    assert engine.metrics.num_out_of_memory > 0
    assert limit.max_tokens is None
    few = varied(4)
    assert texts(answers(engine, few)) == [spell(alone(model, one)) for one in few]


def test_what_was_allocated_is_halved_and_not_what_was_live(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out when most rows have ended leaves a limit near the one that worked."""
    monkeypatch.setattr(room, "COLUMN_STEP", 64)  # as many slots as there were
    requests = [
        request(row, random_prompt(random.Random(row), 5), 3 + 20 * (row < 2)) for row in range(8)
    ]
    limit = MemoryLimit()
    engine = ContinuousEngine(model, num_slots=8, limit=limit)
    engine.add(requests)
    completions = []
    while len(engine._batch) != 2:
        completions += engine.step()
    num_allocated = []

    def full(self: Batch) -> list[int]:
        num_allocated.append(self.cache.num_slots * self.cache.capacity)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "decode", full)
        engine.step()
    assert [limit.max_tokens] == [num_allocated[0] // 2]
    assert num_allocated[0] > 2 * num_columns(23 + 5)
    completions += drain(engine)
    assert len(completions) == 8
