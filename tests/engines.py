"""Requests for an engine, and what transformers' own `generate` makes of each by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.engine import Engine
from pipeline.model import Model
from pipeline.records import Completion, FinishReason, Request, RequestId, Sampling
from pipeline.sampling import random_key
from tests.models import BOS_ID

PROMPTS = (
    "Question: If 12 apples cost 3 dollars, how much do 20 apples cost?\nAnswer:",
    "a",
    "The quick brown fox",
    "Question: Wie heißt die Hauptstadt von Österreich?\nAnswer:",
    "東京",
    "dog",
    "The lazy dog jumps; then it",
    "Answer: 5 dollars.\n\nQuestion:",
    "x y z",
)


def requests_for(
    model: Model, sampling: Sampling, prompts: Sequence[str] = PROMPTS
) -> list[Request]:
    """One request per prompt, each with a key of its own."""
    return [
        Request(
            RequestId(0, row, 0),
            (BOS_ID, *model.tokenizer.encode(prompt)),
            sampling,
            random_key(5, f"rows#{row}", 0),
        )
        for row, prompt in enumerate(prompts)
    ]


def run(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """All completions, in the order of the requests, each exactly once."""
    engine.add(requests)
    completions: list[Completion] = []
    while engine.num_waiting + engine.num_running:
        completions += engine.step()
    by_id = {completion.id: completion for completion in completions}
    assert len(by_id) == len(completions) == len(requests)
    return [by_id[request.id] for request in requests]


def generate_alone(model: Model, request: Request, **options: Any) -> list[int]:
    """The tokens that transformers' own `generate` gives for a request by itself."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=request.sampling.max_new_tokens,
        eos_token_id=sorted(model.eos_ids),
        pad_token_id=model.pad_id,
        **options,
    )
    ids = torch.tensor([request.prompt_ids])
    output = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return output[0, len(request.prompt_ids) :].tolist()


def check_alone(model: Model, request: Request, completion: Completion, **options: Any) -> None:
    """Asserts that a completion is what `generate` gives for its request alone."""
    ids = generate_alone(model, request, **options)
    has_ended = ids[-1] in model.eos_ids
    assert completion == Completion(
        id=request.id,
        text=model.vocabulary.decode(ids[:-1] if has_ended else ids),
        finish_reason=FinishReason.STOP if has_ended else FinishReason.LENGTH,
        num_prompt_tokens=len(request.prompt_ids),
        num_completion_tokens=len(ids),
    )


class Failing:
    """A model whose `generate` raises as told; else it is the model itself."""

    def __init__(self, model: Model, failure: Callable[[Sequence[Sequence[int]]], None]) -> None:
        self._model = model.model
        self.config = self._model.config
        self._failure = failure
        self.sizes: list[int] = []

    def generate(self, input_ids: torch.Tensor, **options: Any) -> Any:
        self.sizes.append(len(input_ids))
        self._failure(input_ids.tolist())
        return self._model.generate(input_ids=input_ids, **options)


def failing(model: Model, failure: Callable[[Sequence[Sequence[int]]], None]) -> tuple[Any, Model]:
    """A model that raises as told, and the fake inside it."""
    fake: Any = Failing(model, failure)
    return fake, dataclasses.replace(model, model=fake)
