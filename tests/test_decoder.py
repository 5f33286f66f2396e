from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline import room
from pipeline.continuous_engine import ContinuousEngine
from pipeline.decoder import Decoder
from pipeline.fixed_step import Decoded, FixedStep
from pipeline.forward import Forward
from pipeline.memory_limit import MemoryLimit
from pipeline.model import Model
from pipeline.room import Room, bucket
from pipeline.sampling import BROKEN
from pipeline.slots import SlotCache
from pipeline.stepping import Stepping
from pipeline.transfer import Readback
from tests.bare_models import (
    alone,
    answers,
    bare_llama,
    random_prompt,
    request,
    spell,
    texts,
    varied,
)
from tests.recorded import STEPPINGS, RecordedSteps


@pytest.fixture(scope="module")
def model() -> Model:
    """A Llama whose answers vary; not to be changed."""
    torch.set_num_threads(1)
    return bare_llama()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[RecordedSteps]:
    """Every capture that is made, in order."""
    made: list[RecordedSteps] = []
    init = RecordedSteps.__init__

    def noting(self: RecordedSteps) -> None:
        init(self)
        made.append(self)

    monkeypatch.setattr(RecordedSteps, "__init__", noting)
    return made


def prefilled_cache(forward: Forward, lengths: tuple[int, ...], num_slots: int) -> SlotCache:
    """Rows of random tokens in the first slots of a cache of 64 columns."""
    chance = random.Random(0)
    rows = [random_prompt(chance, length) for length in lengths]
    with torch.no_grad():
        prefilled, _ = forward.prefill(rows)
    cache = SlotCache(forward.num_layers, num_slots, capacity=64)
    cache.append(prefilled, range(len(rows)))
    return cache


def test_a_step_of_fixed_shapes_gives_the_rows_logits(model: Model) -> None:
    """With empty slots, wherever the window is; an empty slot's own logits are numbers too."""
    forward = Forward(model)
    tokens = torch.tensor([5, 60, 33])
    with torch.no_grad():
        expected = forward(tokens[:, None], prefilled_cache(forward, (9, 2, 5), 3))
        for end in (9, 20, 40):
            cache = prefilled_cache(forward, (9, 2, 5), 5)
            cache.move_end(end)
            step = FixedStep(forward, cache)
            step.load(tokens)
            decoded = step.run(width=48)
            torch.testing.assert_close(decoded.logits[:3], expected, atol=1e-4, rtol=1e-4)
            assert decoded.best[:3].tolist() == expected.argmax(dim=-1).tolist()
            assert decoded.logits.isfinite().all()
            assert decoded.best.min() > BROKEN


def test_a_step_writes_one_column_and_no_other(model: Model) -> None:
    """What other columns hold, in any slot, stays as it is; and to run it again changes nothing."""
    forward = Forward(model)
    cache = prefilled_cache(forward, (9, 2, 5), 5)
    before = [layer.keys.clone() for layer in cache.layers]
    step = FixedStep(forward, cache)
    step.load(torch.tensor([5, 60, 33]))
    with torch.no_grad():
        first = step.run(width=64)
        logits = first.logits.clone()
        again = step.run(width=64)
        assert step.run(width=32).logits is first.logits, "recorded steps keep one set for all"
    torch.testing.assert_close(again.logits, logits, atol=1e-4, rtol=1e-4)
    for layer, old in zip(cache.layers, before, strict=True):
        changed = (layer.keys != old).any(dim=1).any(dim=-1)  # (slots, columns)
        assert changed.any(dim=0).nonzero().flatten().tolist() == [9]


def test_one_recording_for_each_bucket(
    model: Model, monkeypatch: pytest.MonkeyPatch, captures: list[RecordedSteps]
) -> None:
    """Made when its bucket first comes, and anew when the cache has other buffers."""
    monkeypatch.setattr(room, "BUCKET_STEP", 8)
    forward = Forward(model)
    cache = prefilled_cache(forward, (6, 2), 2)
    decoder = Decoder(forward, RecordedSteps)
    plain = prefilled_cache(forward, (6, 2), 2)
    tokens = torch.tensor([5, 60])

    def step() -> None:
        rows = tokens[: cache.window.num_rows]
        with torch.no_grad():
            expected = forward(rows[:, None], plain)
            logits = decoder(rows, cache).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    for _ in range(12):  # columns 6 to 17: buckets of 8, 16 and 24
        step()
    assert [len(capture.recorders) for capture in captures] == [3]
    for one in (cache, plain):
        one.keep([1])
        one.move_end(14)
    step()
    assert [len(capture.recorders) for capture in captures] == [3]
    for one in (cache, plain):
        one.resize(2, 40)
    step()
    assert [len(capture.recorders) for capture in captures] == [3, 1]
    assert captures[0].num_replays == 13


def test_buffers_that_are_given_up_are_freed(model: Model) -> None:
    """Recorded steps hold none, and what is recorded for others goes before it is made anew."""
    forward = Forward(model)
    cache = prefilled_cache(forward, (6, 2), 2)
    made: list[weakref.ref[Any]] = []

    def capture() -> Callable[[Callable[[], Decoded]], Callable[[], Decoded]]:
        assert all(one() is None for one in made)
        recording = _Holder()
        made.append(weakref.ref(recording))
        return recording

    decoder = Decoder(forward, capture)
    with torch.no_grad():
        decoder(torch.tensor([5, 60]), cache)
        buffer = weakref.ref(cache.layers[0].keys)
        cache.resize(2, 80)
        assert buffer() is None
        decoder(torch.tensor([5, 60]), cache)
    assert len(made) == 2
    decoder.forget()
    assert made[1]() is None


class _Holder:
    """A capture that records nothing, as a graph holds addresses and no tensors."""

    def __call__(self, step: Callable[[], Decoded]) -> Callable[[], Decoded]:
        return step


def test_short_rows_need_few_recordings(
    model: Model, monkeypatch: pytest.MonkeyPatch, captures: list[RecordedSteps]
) -> None:
    """However many come one after the other: their window is moved back to the first buckets."""
    monkeypatch.setattr(room, "BUCKET_STEP", 8)
    chance = random.Random(0)
    requests = [request(row, random_prompt(chance, 4), 3 + row * 7 % 11) for row in range(60)]
    engine = ContinuousEngine(model, num_slots=4, stepping=STEPPINGS["replayed, behind"])
    expected = [spell(alone(model, one)) for one in requests]
    assert texts(answers(engine, requests)) == expected
    assert engine.metrics.num_steps > 64
    assert engine._batch.cache.capacity == 128
    assert sum(len(capture.recorders) for capture in captures) <= 4


def test_where_recording_fails_steps_are_called(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once or at a later bucket, out of memory too: one line, no other try, every answer."""
    monkeypatch.setattr(room, "BUCKET_STEP", 8)
    requests = varied(12)
    expected = [spell(alone(model, one)) for one in requests]
    for num_good, error in ((0, RuntimeError("odd kernel")), (2, torch.OutOfMemoryError("full"))):
        tried: list[int] = []

        class Failing(RecordedSteps):
            def __call__(self, step: Any) -> Any:
                tried.append(1)  # noqa: B023 - used within the round only
                if len(tried) > num_good:  # noqa: B023
                    raise error  # noqa: B023
                return super().__call__(step)

        caplog.clear()
        engine = ContinuousEngine(model, num_slots=4, stepping=Stepping(Failing, True))
        assert texts(answers(engine, requests)) == expected
        (line,) = [one.getMessage() for one in caplog.records]
        assert line.startswith("decode steps go on without CUDA graphs: ")
        assert str(error) in line
        assert len(tried) == num_good + 1
        assert engine.metrics.num_out_of_memory == 0


def test_a_step_is_launched_before_the_last_ones_tokens_are_read(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a GPU would stand still while the host looks at them.

    A CPU's tokens are read at once: nothing of them is ever on its way.
    """
    events = ""
    call, read = Decoder.__call__, Readback.read

    def noted_call(self: Decoder, *args: Any) -> Decoded:
        nonlocal events
        events += "L"
        return call(self, *args)

    def noted_read(self: Readback) -> list[int]:
        nonlocal events
        events += "R"
        return read(self)

    monkeypatch.setattr(Decoder, "__call__", noted_call)
    monkeypatch.setattr(Readback, "read", noted_read)
    orders = {}
    for name, stepping in STEPPINGS.items():
        events = ""
        engine = ContinuousEngine(model, num_slots=2, stepping=stepping)
        (completion,) = answers(engine, [request(0, [5, 6, 7], 5)])
        assert completion.num_completion_tokens == 5
        assert engine.metrics.num_generated_tokens == 5
        orders[name] = events
    assert orders == {
        "called": "LLLL",
        "called, behind": "LLRLRLRLR",
        "replayed, behind": "LLRLRLRLR",
    }


def test_a_token_of_a_row_that_leaves_is_dropped(model: Model) -> None:
    """While it is unread; the rows that stay get theirs, in whatever slots they are now."""
    engine = ContinuousEngine(model, num_slots=3, stepping=Stepping(reads_behind=True))
    requests = [request(row, [5 + row, 6, 7], 9) for row in range(3)]
    engine.add(requests)
    engine.step()
    batch = engine._batch
    leaving, *staying = batch.rows
    batch.remove({0})
    assert batch.rows == staying[::-1]
    read = dict(batch.decode())
    assert leaving not in read
    for row in staying:
        assert spell([*row.generated.ids, read[row]]) == spell(alone(model, row.requests[0])[:2])


def test_buckets_are_few_and_not_much_too_wide() -> None:
    """A quarter more than needed at most, or less than 64 columns."""
    for length in range(1, 5000):
        assert length <= bucket(length) < max(length + 64, 1.25 * length + 1)
    assert len({bucket(length) for length in range(1, 4097)}) == 20


def test_a_window_moves_to_stay_in_a_small_bucket(model: Model) -> None:
    """Only where steps are in buckets, and only if that frees an eighth of the columns."""
    for first, in_buckets, end in ((10, True, 54), (10, False, 64), (4, True, 64)):
        cache = prefilled_cache(Forward(model), (50,), num_slots=1)
        cache.resize(1, capacity=200)
        cache.move_end(50 + first)
        cache.advance(14 - first)
        assert Room(1, 1, MemoryLimit()).make_column(cache, in_buckets)
        assert cache.window.end == end
        assert cache.window.length == 64 - first
