from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config

from pipeline import batch, continuous_engine, room
from pipeline.continuous_engine import ContinuousEngine
from pipeline.forward import Forward
from pipeline.model import Model
from pipeline.records import Completion, FinishReason, Request, RequestId
from pipeline.slots import SlotCache
from tests.bare_models import (
    GPT2,
    NUM_POSITIONS,
    NUM_TOKENS,
    alone,
    answers,
    bare,
    bare_llama,
    drain,
    in_order,
    random_model,
    random_prompt,
    reference,
    request,
    spell,
    texts,
    varied,
)
from tests.recorded import STEPPINGS

TOKEN_BYTES = 2 * 2 * 2 * 8 * 4
"""Keys and values, layers, heads, head size, bytes."""


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


ROWS = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt length
        st.integers(1, 20),  # max_new_tokens
        st.sampled_from([(), ("c",), ("ab", "x"), ("ba", "ca", "da")]),
        st.booleans(),  # shares a beginning
        st.integers(0, 3),  # steps before the next arrives
        st.booleans(),  # half of what has no token yet is withdrawn, and comes again at the end
    ),
    min_size=1,
    max_size=14,
)


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=ROWS,
    num_slots=st.integers(1, 6),
    cache_tokens=st.sampled_from([1, 60, 150, 100_000]),
    refill_share=st.sampled_from([1, 2, 8]),
    stepping=st.sampled_from(sorted(STEPPINGS)),
    seed=st.integers(0, 3),
)
def test_every_request_ends_once_with_its_own_answer(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[int, int, tuple[str, ...], bool, int, bool]],
    num_slots: int,
    cache_tokens: int,
    refill_share: int,
    stepping: str,
    seed: int,
) -> None:
    """Whatever arrives when, with any lengths, limits, stop strings, slots, memory and groups.

    And however steps are launched and read.
    """
    monkeypatch.setattr(continuous_engine, "REFILL_SHARE", refill_share)
    chance = random.Random(seed)
    beginning = random_prompt(chance, 34)
    engine = ContinuousEngine(
        model,
        num_slots,
        cache_bytes=cache_tokens * TOKEN_BYTES,
        stepping=STEPPINGS[stepping],
    )
    requests: list[Request] = []
    completions: list[Completion] = []
    withdrawn: set[RequestId] = set()
    for length, limit, stop, is_shared, num_steps, withdraws in rows:
        prompt = beginning * is_shared + random_prompt(chance, length)
        requests.append(request(len(requests), prompt, limit, stop=stop))
        engine.add(requests[-1:])
        for _ in range(num_steps):
            completions += engine.step()
        if withdraws:
            withdrawn |= set(engine.withdraw(set(engine.unstarted()[::2])))
        assert engine.num_running <= num_slots
        num_left = len(requests) - len(withdrawn)
        assert engine.num_waiting + engine.num_running + len(completions) == num_left
    completions += drain(engine)
    assert not withdrawn & {completion.id for completion in completions}
    engine.add([each for each in requests if each.id in withdrawn])
    completions += drain(engine)
    assert in_order(completions, requests) == reference(model, requests)


@pytest.mark.parametrize("stepping", STEPPINGS)
def test_samples_do_not_depend_on_the_slots(model: Model, stepping: str) -> None:
    """The same keys give the static engine's samples in 1 slot, in 3, and in little memory.

    Greedy and penalized rows stand beside them; steps are launched and read in any way.
    """
    settings_of = [
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3},
        {},
        {"temperature": 1.5, "min_p": 0.05},
        {"repetition_penalty": 1.5},
    ]
    requests = [
        request(one.id.row, one.prompt_ids, one.sampling.max_new_tokens, **settings_of[row % 5])
        for row, one in enumerate(varied(20, seed=2))
    ]
    expected = reference(model, requests)
    for num_slots, cache_tokens in ((1, 10_000), (3, 10_000), (6, 60)):
        engine = ContinuousEngine(
            model,
            num_slots,
            cache_bytes=cache_tokens * TOKEN_BYTES,
            stepping=STEPPINGS[stepping],
        )
        engine.add(requests[:2])
        completions = engine.step()
        engine.add(requests[2:])
        assert in_order([*completions, *drain(engine)], requests) == expected
    assert engine.metrics.num_put_back > 0


def test_equal_greedy_requests_run_once(model: Model) -> None:
    """While one waits or runs, others join it; each gets the answer under its own name."""
    prompt = random_prompt(random.Random(0), 9)
    requests = [request(row, prompt, 6) for row in range(5)]
    engine = ContinuousEngine(model, num_slots=4)
    engine.add(requests[:3])
    completions = engine.step()
    assert (engine.num_waiting, engine.num_running) == (0, 3)
    engine.add(requests[3:])
    completions = in_order([*completions, *drain(engine)], requests)
    assert texts(completions) == [spell(alone(model, requests[0]))] * 5
    assert engine.metrics.num_generated_tokens == completions[0].num_completion_tokens

    other_limit = request(9, prompt, 3)
    assert answers(engine, [other_limit])[0].num_completion_tokens == 3


def test_a_row_that_others_share_is_not_withdrawn(model: Model) -> None:
    """What joined a row goes with it or stays with it; what follows does not join what is gone."""
    prompt = random_prompt(random.Random(0), 9)
    requests = [request(row, prompt, 6) for row in range(3)]
    engine = ContinuousEngine(model, num_slots=4)
    engine.add(requests[:2])
    assert engine.unstarted() == [requests[0].id, requests[1].id]
    assert engine.withdraw({requests[1].id}) == []
    assert engine.withdraw({requests[0].id, requests[1].id}) == [requests[0].id, requests[1].id]
    assert answers(engine, requests[2:]) == reference(model, requests[2:])
    assert engine.withdraw({requests[2].id}) == []


def test_samples_of_a_prompt_share_its_prefill(model: Model) -> None:
    """The prompt is worked through once, and the samples differ."""
    prompt = random_prompt(random.Random(0), 20)
    requests = [request(row, prompt, 8, temperature=1.0) for row in range(4)]
    engine = ContinuousEngine(model, num_slots=4)
    completions = answers(engine, requests)
    assert completions == reference(model, requests)
    assert len(set(texts(completions))) > 1
    assert engine.metrics.num_prefilled_tokens == 20
    assert engine.metrics.num_saved_tokens == 60


def test_a_shared_prefix_is_worked_through_once(model: Model) -> None:
    """For all groups that need it, also those that come later.

    A prompt that is the prefix and no more, and others without it, get their own answers.
    """
    chance = random.Random(0)
    prefix = random_prompt(chance, 50)
    prompts = [prefix + random_prompt(chance, chance.randint(3, 9)) for _ in range(12)]
    prompts += [prefix, random_prompt(chance, 55), prefix[:40]]
    requests = [request(row, prompt, 6) for row, prompt in enumerate(prompts)]
    engine = ContinuousEngine(model, num_slots=3)
    assert texts(answers(engine, requests)) == [spell(alone(model, one)) for one in requests]
    # The prefix's last token is left to the rows, for the one that has no other.
    num_own = sum(len(prompt) - 49 for prompt in prompts[:13])
    assert engine.metrics.num_prefilled_tokens == 49 + num_own + 55 + 40
    assert engine.metrics.num_saved_tokens == 12 * 49

    more = [request(100 + row, prefix + random_prompt(chance, 4), 6) for row in range(3)]
    assert texts(answers(engine, more)) == [spell(alone(model, one)) for one in more]
    assert engine.metrics.num_saved_tokens == 12 * 49 + 3 * 49


def test_what_a_row_has_seen_is_marked_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty would else cost a look at every token of every row whenever one comes or goes."""
    mark, num_marked = batch.marked, 0

    def counting(rows: Sequence[Sequence[int]], *args: Any) -> torch.Tensor:
        nonlocal num_marked
        num_marked += len(rows)
        return mark(rows, *args)

    monkeypatch.setattr(batch, "marked", counting)
    chance = random.Random(0)
    requests = [
        request(row, random_prompt(chance, 6), 2 + row % 9, repetition_penalty=1.5)
        for row in range(24)
    ]
    completions = answers(ContinuousEngine(model, num_slots=6), requests)
    assert num_marked <= 2 * 24, "for the first token, and for all others"
    expected = reference(model, requests[:4])
    assert texts(completions[:4]) == texts(expected)


def test_a_long_prefix_makes_groups_small(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied for each row of a group, and a prompt that nobody has measured runs alone."""
    prefill, shapes = Forward.prefill, []

    def noting(self: Forward, rows: Sequence[Sequence[int]], *args: Any) -> Any:
        shapes.append((len(rows), max(map(len, rows))))
        return prefill(self, rows, *args)

    monkeypatch.setattr(Forward, "prefill", noting)
    monkeypatch.setattr("pipeline.prefill.MAX_PREFILL_COLUMNS", 400)
    chance = random.Random(0)
    prefix = random_prompt(chance, 90)
    requests = [request(row, prefix + random_prompt(chance, 4), 2) for row in range(13)]
    completions = answers(ContinuousEngine(model, num_slots=13), requests)
    assert texts(completions) == [spell(alone(model, one)) for one in requests]
    assert shapes == [(1, 90), (1, 94), (4, 94), (4, 94), (4, 94)]
    shapes.clear()
    token_bytes = prefill(Forward(model), [(3, 4)])[0].num_token_bytes
    answers(ContinuousEngine(model, 13, cache_bytes=1600 * token_bytes), requests)
    assert max(shapes)[0] == 1600 // 8 // 94


def test_a_prompt_that_is_the_shared_prefix_and_no_more(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """Is worked through like any other: a row's last token gives its logits."""
    chance = random.Random(0)
    prefix = random_prompt(chance, 33)
    requests = [request(row, (*prefix, 3 + row), 2) for row in range(40)]
    requests.append(request(40, prefix, 2))
    engine = ContinuousEngine(model, num_slots=8)
    assert texts(answers(engine, requests)) == [spell(alone(model, one)) for one in requests]
    assert engine.metrics.num_prefilled_tokens == 33 + 40 + 33
    assert not caplog.records


def test_refused_requests_come_back_and_counts_add_up(model: Model) -> None:
    """An overlong, an empty and an unknown prompt are error rows of the next step."""
    good = request(0, [5, 6, 7], 4)
    bad = [request(1, [5] * 100, 100), request(2, []), request(3, [NUM_TOKENS])]
    engine = ContinuousEngine(model, num_slots=2)
    engine.add([good, *bad])
    assert (engine.num_waiting, engine.num_running) == (4, 0)
    refused = engine.step()
    assert [one.error.partition(":")[0] for one in refused if one.error] == [
        "overlong",
        "empty_prompt",
        "unknown_token",
    ]
    assert (engine.num_waiting, engine.num_running) == (0, 1)
    metrics = engine.metrics
    assert (metrics.num_prefilled_tokens, metrics.num_generated_tokens) == (3, 2)
    (last,) = drain(engine)
    assert last.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert engine.step() == []


def test_slots_are_refilled_in_groups(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before an eighth of them is free, so that prefill is no stream of single rows."""
    group_sizes: list[int] = []
    prefill = Forward.prefill

    def counting(self: Forward, rows: Sequence[Sequence[int]], *args: Any) -> Any:
        group_sizes.append(len(rows))
        return prefill(self, rows, *args)

    monkeypatch.setattr(Forward, "prefill", counting)
    chance = random.Random(0)
    requests = [request(row, random_prompt(chance, 6), 2 + row % 15) for row in range(80)]
    engine = ContinuousEngine(model, num_slots=16)
    answers(engine, requests)
    assert group_sizes[:2] == [1, 15], "the first one shows what a token takes"
    assert min(group_sizes[1:-1]) >= 2


def test_the_batch_shrinks_as_rows_run_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step computes live rows only: at the end of a job, fewer and fewer."""
    num_computed: list[int] = []
    call = Forward.__call__

    def counting(
        self: Forward, input_ids: torch.Tensor, cache: SlotCache, *adapters: Any
    ) -> torch.Tensor:
        if input_ids.shape[1] == 1:
            num_computed.append(input_ids.shape[0])
        return call(self, input_ids, cache, *adapters)

    monkeypatch.setattr(Forward, "__call__", counting)
    chance = random.Random(0)
    requests = [request(row, random_prompt(chance, 5), 2 + 3 * row) for row in range(6)]
    engine = ContinuousEngine(model, num_slots=6)
    completions = answers(engine, requests)
    assert sum(num_computed) == sum(one.num_completion_tokens - 1 for one in completions)
    assert num_computed == sorted(num_computed, reverse=True)
    assert num_computed[-1] < num_computed[0] == 6


@pytest.mark.parametrize("stepping", STEPPINGS)
def test_a_row_may_use_every_position(stepping: str) -> None:
    """Prompt and completion together fill the model's context to the last token.

    GPT-2 has a table of positions, and one beyond it is an error.
    """
    model = bare(random_model(GPT2Config(**GPT2)))
    prompt = random_prompt(random.Random(2), 100)
    one = request(0, prompt, NUM_POSITIONS - 100)
    others = varied(5, seed=4)
    engine = ContinuousEngine(model, num_slots=3, stepping=STEPPINGS[stepping])
    completions = answers(engine, [one, *(request(9 + r.id.row, r.prompt_ids) for r in others)])
    assert completions[0].text == spell(alone(model, one))
    assert completions[0].finish_reason is FinishReason.LENGTH
