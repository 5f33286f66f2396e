"""How a row may end, through both engines and the real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.continuous_engine import ContinuousEngine
from pipeline.engine import Engine
from pipeline.model import Model
from pipeline.records import FinishReason, Sampling
from pipeline.static_engine import StaticEngine
from pipeline.stepping import Stepping
from tests.engines import PROMPTS, generate_alone, requests_for, run
from tests.models import load, make_llama

ENGINES: dict[str, Callable[[Model], Engine]] = {
    "continuous": lambda model: ContinuousEngine(model, num_slots=4),
    "read one step behind": lambda model: ContinuousEngine(
        model, num_slots=4, stepping=Stepping(reads_behind=True)
    ),
    "static": lambda model: StaticEngine(model, batch_size=4),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small model whose rows end on their own, some sooner than others."""
    folder: Path = tmp_path_factory.mktemp("llama")
    return load(make_llama(folder))


@pytest.mark.parametrize("kind", ENGINES)
def test_minimum_is_that_of_generate(llama: Model, kind: str) -> None:
    """The tokens, and no row ends before it has so many."""
    usual = [generate_alone(llama, one) for one in requests_for(llama, Sampling(40))]
    early = sorted(len(ids) for ids in usual)[0]
    assert early < 30, "a minimum that no row would have gone below proves nothing"
    requests = requests_for(llama, Sampling(40, min_new_tokens=30))
    for request, completion in zip(requests, run(ENGINES[kind](llama), requests), strict=True):
        ids = generate_alone(llama, request, min_new_tokens=30)
        assert completion.num_completion_tokens == len(ids) >= 30
        kept = [token for token in ids if token not in llama.eos_ids]
        assert completion.text == llama.vocabulary.decode(kept)


@pytest.mark.parametrize("kind", ENGINES)
def test_rows_go_on_past_the_end_of_sequence(llama: Model, kind: str) -> None:
    """To their full length, with the tokens that the model has for it."""
    requests = requests_for(llama, Sampling(40, ignore_eos=True))
    completions = run(ENGINES[kind](llama), requests)
    assert {row.num_completion_tokens for row in completions} == {40}
    assert {row.finish_reason for row in completions} == {FinishReason.LENGTH}
    usual = run(ENGINES[kind](llama), requests_for(llama, Sampling(40)))
    for free, ended in zip(completions, usual, strict=True):
        assert free.text is not None
        assert ended.text is not None
        assert free.text.startswith(ended.text)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_stop_token_ends_rows_of_a_batch(llama: Model, kind: str) -> None:
    """Each where the token comes first, and the rows without it not at all."""
    plain = requests_for(llama, Sampling(20, ignore_eos=True))
    generated = [generate_alone(llama, one)[:20] for one in plain]
    token = generated[0][3]
    requests = requests_for(llama, Sampling(20, stop_token_ids=(token,)))
    for ids, completion in zip(generated, run(ENGINES[kind](llama), requests), strict=True):
        expected = ids.index(token) + 1 if token in ids else len(ids)
        assert completion.num_completion_tokens == expected
        assert (completion.stop_reason == str(token)) == (token in ids)
    assert len(PROMPTS) == len(requests)
