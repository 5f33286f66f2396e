from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.model import Model
from pipeline.records import FinishReason, Request, RequestId, Sampling
from pipeline.sampling import Sampler
from pipeline.special_tokens import vocabulary_of
from pipeline.static_engine import StaticEngine
from tests.engines import PROMPTS, check_alone, failing, generate_alone, requests_for, run
from tests.models import PAD_ID, VOCABULARY_SIZE, load, make_gpt2, make_llama

MANY_ENDS = list(range(2, VOCABULARY_SIZE, 13))
"""End-of-sequence tokens: so many that random answers end at different times."""


@pytest.fixture(scope="module", params=[make_llama, make_gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose answers have different lengths."""
    make: Callable[..., Path] = request.param
    return load(make(tmp_path_factory.mktemp("ends") / "model", eos_token_id=MANY_ENDS))


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_equals_generate_on_each_row_alone(model: Model, batch_size: int) -> None:
    """Token for token, with its reason and counts, whatever company a row has in its batch."""
    requests = requests_for(model, Sampling(40))
    completions = run(StaticEngine(model, batch_size), requests)
    for request, completion in zip(requests, completions, strict=True):
        check_alone(model, request, completion)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_mixed_settings_in_one_add(model: Model) -> None:
    """Each row has its own limit and penalty, and gets what it would get by itself."""
    requests = [
        dataclasses.replace(request, sampling=sampling)
        for request, sampling in zip(
            requests_for(model, Sampling(1)),
            [Sampling(30), Sampling(5), Sampling(30, repetition_penalty=1.5)] * 3,
            strict=True,
        )
    ]
    completions = run(StaticEngine(model, 4), requests)
    for request, completion in zip(requests, completions, strict=True):
        penalty = request.sampling.repetition_penalty
        check_alone(model, request, completion, repetition_penalty=penalty)


def test_sampled_rows_do_not_depend_on_the_batch(model: Model) -> None:
    """The same keys draw the same text alone, together and among greedy rows; others do not."""
    sampling = Sampling(20, temperature=1.0, top_k=30, top_p=0.9, min_p=0.01)
    requests = requests_for(model, sampling)
    together = run(StaticEngine(model, 32), requests)
    assert run(StaticEngine(model, 1), requests) == together
    mixed = [
        dataclasses.replace(request, sampling=Sampling(20)) if row % 2 else request
        for row, request in enumerate(requests)
    ]
    among_greedy = run(StaticEngine(model, 32), mixed)
    assert among_greedy[::2] == together[::2]
    for request, completion in list(zip(mixed, among_greedy, strict=True))[1::2]:
        check_alone(model, request, completion)
    others = [
        dataclasses.replace(request, random_key=request.random_key + 1) for request in requests
    ]
    assert run(StaticEngine(model, 32), others) != together


def test_each_token_is_drawn_with_its_own_number(model: Model) -> None:
    """The n-th token is the one that `Sampler` draws at step n from the logits of what precedes."""
    (request,) = requests_for(model, Sampling(8, temperature=1.5), PROMPTS[:1])
    sampler = Sampler([request], model.vocabulary, model.device)
    ids = list(request.prompt_ids)
    for step in range(8):
        with torch.no_grad():
            logits = model.model(torch.tensor([ids])).logits[:, -1]
        ids.append(int(sampler.pick(sampler.process(logits), step)))
        if ids[-1] in model.eos_ids:
            break
    (completion,) = run(StaticEngine(model, 4), [request])
    generated = ids[len(request.prompt_ids) :]
    assert len(generated) > 2
    assert completion.num_completion_tokens == len(generated)
    assert completion.text == model.vocabulary.decode(
        [token for token in generated if token not in model.eos_ids]
    )


def test_padding_is_not_penalized(model: Model) -> None:
    """A row may generate the token that pads it as if it had not been there."""
    requests = requests_for(model, Sampling(10, repetition_penalty=1.5), PROMPTS[:2])
    first = generate_alone(model, requests[1], repetition_penalty=1.5)[0]
    assert first not in requests[1].prompt_ids
    padded = dataclasses.replace(model, pad_id=first)
    completion = run(StaticEngine(padded, 2), requests)[1]
    check_alone(model, requests[1], completion, repetition_penalty=1.5)


def test_stop_string(model: Model) -> None:
    """Each row ends by itself where its stop string is complete, and the others go on."""
    plain = run(StaticEngine(model, 32), requests_for(model, Sampling(40)))
    texts = [completion.text or "" for completion in plain]
    stop = max(texts, key=len)[4:7]
    assert "\ufffd" not in stop
    requests = requests_for(model, Sampling(40, stop=(stop, "never in it")))
    stopped = run(StaticEngine(model, 32), requests)
    for text, before, after in zip(texts, plain, stopped, strict=True):
        if stop not in text:
            assert after == before
            continue
        assert after.text == text[: text.index(stop)]
        assert (after.finish_reason, after.stop_reason) == (FinishReason.STOP, stop)
        assert 0 < after.num_completion_tokens <= before.num_completion_tokens
    assert any(completion.stop_reason for completion in stopped)


def test_end_of_sequence_on_the_last_allowed_token(model: Model) -> None:
    """A row that ends by itself just within its limit is `stop`; one token less is `length`."""
    plain = run(StaticEngine(model, 32), requests_for(model, Sampling(40)))
    row, length = next(
        (row, completion.num_completion_tokens)
        for row, completion in enumerate(plain)
        if completion.finish_reason is FinishReason.STOP and completion.num_completion_tokens > 1
    )
    exact = run(StaticEngine(model, 32), requests_for(model, Sampling(length)))[row]
    assert (exact.finish_reason, exact.num_completion_tokens) == (FinishReason.STOP, length)
    short = run(StaticEngine(model, 32), requests_for(model, Sampling(length - 1)))[row]
    assert (short.finish_reason, short.num_completion_tokens) == (FinishReason.LENGTH, length - 1)


def test_requests_that_cannot_be_done(model: Model) -> None:
    """They are error completions, and the rest of the batch is not touched."""
    good = requests_for(model, Sampling(10))
    fits = (60,) * 118
    bad = [
        Request(RequestId(1, 0, 0), (*fits, 60), Sampling(10)),
        Request(RequestId(1, 1, 0), (), Sampling(10)),
        Request(RequestId(1, 2, 0), (60, VOCABULARY_SIZE), Sampling(10)),
        Request(RequestId(1, 3, 0), fits, Sampling(10)),
    ]
    completions = run(StaticEngine(model, 4), [*bad, *good])
    errors = [completion.error or "" for completion in completions[:3]]
    assert errors[0] == (
        "overlong: 119 prompt tokens and generation.max_new_tokens 10 are more than the model's 128"
    )
    assert errors[1].startswith("empty_prompt: ")
    assert errors[2].startswith("unknown_token: ")
    assert {completion.finish_reason for completion in completions[:3]} == {FinishReason.ERROR}
    assert {completion.text for completion in completions[:3]} == {None}
    assert [completion.error for completion in completions[3:]] == [None] * 10


def test_rows_of_unlike_limits_stay_within_the_positions(model: Model) -> None:
    """A long prompt with a small limit does not run on, past the last position, with the others."""
    requests = [
        Request(RequestId(1, 0, 0), (60,) * 124, Sampling(4)),
        *requests_for(model, Sampling(40), PROMPTS[1:3]),
    ]
    for request, completion in zip(requests, run(StaticEngine(model, 8), requests), strict=True):
        check_alone(model, request, completion)


def test_long_rows_first_and_few_columns_wasted(llama: Model) -> None:
    """Batches are cut from the waiting rows in order of length, also from several `add`s."""
    widths: list[int] = []
    _, model = failing(llama, lambda rows: widths.append(len(rows[0])))
    engine = StaticEngine(model, 3)
    requests = requests_for(llama, Sampling(2))
    engine.add(requests[:5])
    engine.add(requests[5:])
    while engine.num_waiting:
        engine.step()
    lengths = sorted((len(request.prompt_ids) for request in requests), reverse=True)
    assert widths == lengths[::3]


def test_prompts_of_one_length(llama: Model) -> None:
    """Asked for batches without padding, the engine makes as few as that takes."""
    prompts = ["a", "dog", "b", "cat", "c", "d"]
    batches: list[list[int]] = []
    _, model = failing(llama, lambda rows: batches.append([len(row) for row in rows]))
    requests = requests_for(llama, Sampling(6), prompts)
    lengths = sorted((len(request.prompt_ids) for request in requests), reverse=True)
    completions = run(StaticEngine(model, 3, equal_lengths=True), requests)
    assert completions == run(StaticEngine(llama, 1), requests)
    assert all(len(set(batch)) == 1 for batch in batches)
    assert [length for batch in batches for length in batch] == lengths
    assert len(batches) == sum(-(-lengths.count(length) // 3) for length in set(lengths))


def test_counts(llama: Model) -> None:
    """They move during a step, token by token, and are exact at the end."""
    seen: list[tuple[int, int, int]] = []
    engine = StaticEngine(llama, 4)
    forward = llama.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        metrics = engine.metrics
        seen.append((engine.num_running, metrics.num_steps, metrics.num_generated_tokens))
        return forward(*args, **kwargs)

    requests = requests_for(llama, Sampling(6), PROMPTS[:6])
    llama.model.forward = watched
    try:
        completions = run(engine, requests)
    finally:
        del llama.model.forward
    assert engine.num_running == 0
    metrics = engine.metrics
    assert metrics.num_prefilled_tokens == sum(len(request.prompt_ids) for request in requests)
    assert metrics.num_padding_tokens > 0
    assert 0 < metrics.slot_occupancy <= 1
    assert metrics.prefill_seconds > 0
    assert metrics.decode_seconds > 0
    assert metrics.num_generated_tokens == sum(row.num_completion_tokens for row in completions)
    assert {num_running for num_running, _, _ in seen} == {4, 2}
    assert len({num_generated for _, _, num_generated in seen}) >= 12


def test_model_without_any_end(tmp_path: Path) -> None:
    """A model that names no end-of-sequence token, only padding, runs to its limit."""
    model = load(make_llama(tmp_path, eos_token_id=None))
    assert model.pad_id == PAD_ID
    vocabulary = vocabulary_of(model.tokenizer, VOCABULARY_SIZE, frozenset())
    without = dataclasses.replace(model, vocabulary=vocabulary)
    completions = run(StaticEngine(without, 4), requests_for(model, Sampling(12)))
    assert {completion.finish_reason for completion in completions} == {FinishReason.LENGTH}
