from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline.memory_limit import MemoryLimit
from pipeline.model import Model
from pipeline.records import Sampling
from pipeline.static_engine import StaticEngine
from pipeline.stopping import Generated
from tests.engines import PROMPTS, check_alone, failing, requests_for, run
from tests.models import BOS_ID, load, make_llama


def test_nan_costs_one_row(tmp_path: Path) -> None:
    """A row whose logits are not numbers is an error; its neighbours are as ever."""
    poison = 77
    model = load(make_llama(tmp_path, tie_word_embeddings=False))
    with torch.no_grad():
        model.model.get_input_embeddings().weight[poison] = torch.nan
    requests = requests_for(model, Sampling(10))
    requests[2] = dataclasses.replace(requests[2], prompt_ids=(BOS_ID, poison, 60))
    completions = run(StaticEngine(model, 32), requests)
    assert (completions[2].error or "").startswith("nan: ")
    assert completions[2].text is None
    for row in (row for row in range(len(requests)) if row != 2):
        check_alone(model, requests[row], completions[row])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        torch.AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
    ],
    ids=["torch", "cublas", "device", "host"],
)
def test_out_of_memory_halves_the_batch(llama: Model, error: Exception) -> None:
    """No row is lost, what fits is remembered, and short rows still come in larger batches."""
    requests = requests_for(llama, Sampling(5))
    longest = max(len(request.prompt_ids) for request in requests) + 5

    def fail(rows: Sequence[Sequence[int]]) -> None:
        if len(rows) * (len(rows[0]) + 5) > 3 * longest:
            raise error

    fake, model = failing(llama, fail)
    limit = MemoryLimit()
    assert run(StaticEngine(model, 8, limit=limit), requests) == run(
        StaticEngine(llama, 8), requests
    )
    assert fake.sizes[:3] == [8, 4, 2]
    assert limit.max_tokens == 2 * longest
    assert max(fake.sizes[3:]) > 2


def test_out_of_memory_with_one_row(llama: Model) -> None:
    """A row that does not fit even alone is an error row, and the others are done."""
    requests = requests_for(llama, Sampling(5))
    longest = max(len(request.prompt_ids) for request in requests)

    def fail(rows: Sequence[Sequence[int]]) -> None:
        if len(rows[0]) == longest:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    fake, model = failing(llama, fail)
    completions = run(StaticEngine(model, 8), requests)
    errors = {completion.id.row: completion.error for completion in completions if completion.error}
    assert errors == {0: f"out_of_memory: {longest + 5} tokens do not fit, even alone"}
    assert fake.sizes[:4] == [8, 4, 2, 1]
    assert max(fake.sizes[4:]) > 1


def test_row_longer_than_any_that_has_fitted(llama: Model) -> None:
    """It is tried, by itself, whatever limit has been learned."""
    engine = StaticEngine(llama, 4, limit=MemoryLimit(6))
    engine.add(requests_for(llama, Sampling(5), PROMPTS[:2]))
    assert [len(engine.step()) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("probability tensor\ncontains nan"), "probability tensor contains nan"),
        (ValueError("no such length"), "no such length"),
        (IndexError("index out of range"), "IndexError: index out of range"),
        (KeyError("experts"), "KeyError: 'experts'"),
        (TypeError("unhashable"), "TypeError: unhashable"),
        (AssertionError(), "AssertionError"),
        (Exception("anything"), "Exception: anything"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failure_in_a_batch_costs_the_row_that_fails(
    llama: Model, error: Exception, words: str
) -> None:
    """The rows of a batch that raises run alone, so that only the guilty one is an error."""
    requests = requests_for(llama, Sampling(5))
    guilty = list(requests[3].prompt_ids)

    def fail(rows: Sequence[Sequence[int]]) -> None:
        if any(row[-len(guilty) :] == guilty for row in rows):
            raise error

    _, model = failing(llama, fail)
    completions = run(StaticEngine(model, 32), requests)
    expected = run(StaticEngine(llama, 32), requests)
    assert completions[3].error == f"generate: {words}"
    assert [*completions[:3], *completions[4:]] == [*expected[:3], *expected[4:]]


def test_device_that_has_failed(llama: Model) -> None:
    """It would fail every row after, so it ends the engine."""
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")

    def fail(rows: Sequence[Sequence[int]]) -> None:
        raise error

    _, model = failing(llama, fail)
    engine = StaticEngine(model, 4)
    engine.add(requests_for(llama, Sampling(5)))
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_listener_that_raises(llama: Model) -> None:
    """Who listens is no row's fault: a closed pipe ends the engine and makes no error rows."""

    def listen(row: Generated) -> None:
        raise BrokenPipeError("closed")

    engine = StaticEngine(llama, 4, listen)
    engine.add(requests_for(llama, Sampling(5)))
    with pytest.raises(BrokenPipeError):
        engine.step()
