"""Rows that fit into memory, though little else does: none is lost, and little is learnt by it."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch

from pipeline.continuous_engine import ContinuousEngine
from pipeline.forward import Forward
from pipeline.memory_limit import MemoryLimit
from pipeline.model import Model
from pipeline.records import Request
from pipeline.slot_layer import SlotLayer
from tests.bare_models import (
    LLAMA,
    alone,
    answers,
    bare_llama,
    drain,
    in_order,
    random_prompt,
    request,
    spell,
    texts,
)

NUM_LAYERS = LLAMA["num_hidden_layers"]


@pytest.fixture(scope="module")
def model() -> Model:
    """A Llama whose answers vary; not to be changed."""
    torch.set_num_threads(1)
    return bare_llama()


@pytest.fixture(scope="module")
def token_bytes(model: Model) -> int:
    """What a token takes in all layers."""
    return Forward(model).prefill([(3, 4)])[0].num_token_bytes


class Memory:
    """Takes keys and values of so many tokens at a time, whatever cache they are in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
        self._left = num_tokens * NUM_LAYERS
        allocate = SlotLayer._allocate

        def limited(layer: SlotLayer, *states: Any) -> None:
            size = layer._num_slots * layer._capacity
            if size > self._left:
                raise MemoryError
            allocate(layer, *states)
            self._left -= size
            weakref.finalize(layer._buffers[0], self._free, size)

        monkeypatch.setattr(SlotLayer, "_allocate", limited)

    def _free(self, size: int) -> None:
        self._left += size


def _sharing(num_rows: int, num_shared: int, length: int) -> list[Request]:
    chance = random.Random(0)
    prefix = random_prompt(chance, num_shared)
    rest = length - num_shared
    return [request(row, prefix + random_prompt(chance, rest), 10) for row in range(num_rows)]


@pytest.mark.parametrize("num_shared", [0, 100])
def test_a_row_alone_gets_all_that_there_is(
    model: Model, token_bytes: int, monkeypatch: pytest.MonkeyPatch, num_shared: int
) -> None:
    """It is not copied from where its prompt was computed, and no shared prefix lies beside it."""
    requests = _sharing(3, num_shared, length=110)
    expected = [spell(alone(model, one)) for one in requests]
    Memory(monkeypatch, 280)
    engine = ContinuousEngine(model, 4, cache_bytes=210 * token_bytes)
    assert texts(answers(engine, requests)) == expected
    assert engine.metrics.num_out_of_memory > 0


def test_what_could_not_be_made_is_halved(
    model: Model, token_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what there was before: here the slot of the first row, which had run alone."""
    requests = _sharing(8, 0, length=15)
    expected = [spell(alone(model, one)) for one in requests]
    allocate = SlotLayer._allocate

    def limited(layer: SlotLayer, *states: Any) -> None:
        if layer._num_slots * layer._capacity >= 512:
            raise MemoryError
        allocate(layer, *states)

    monkeypatch.setattr(SlotLayer, "_allocate", limited)
    limit = MemoryLimit()
    engine = ContinuousEngine(model, 8, cache_bytes=512 * token_bytes, limit=limit)
    assert texts(answers(engine, requests)) == expected
    assert limit.max_tokens == 256


def test_a_long_prompt_has_slots_make_way(
    model: Model, token_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is prefilled at a time lies beside the slots, and has its share of the memory."""
    chance = random.Random(0)
    short = [request(row, random_prompt(chance, 15), 40 if row < 2 else 5) for row in range(8)]
    long = [request(row, random_prompt(chance, 100 + row), 10) for row in (8, 9)]
    requests = [*short, *long]
    expected = [spell(alone(model, one)) for one in requests]
    engine = ContinuousEngine(model, 8, cache_bytes=512 * token_bytes)
    prefill, held = Forward.prefill, []

    def noting(self: Forward, rows: Any, *arguments: Any) -> Any:
        slots = engine._batch.cache
        held.append(slots.num_slots * slots.capacity + sum(map(len, rows)))
        return prefill(self, rows, *arguments)

    monkeypatch.setattr(Forward, "prefill", noting)
    engine.add(short)
    completions = engine.step()
    assert engine._batch.cache.num_slots * engine._batch.cache.capacity == 512
    engine.add(long)
    assert texts(in_order([*completions, *drain(engine)], requests)) == expected
    assert 512 < max(held) <= 512 * 9 / 8
