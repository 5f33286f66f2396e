"""transformers' own ways to generate for many prompts, each given the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextGenerationPipeline,
)

from pipeline.model import Model
from pipeline.records import Request

TUNED = ContinuousBatchingConfig(max_requests_per_batch=48, max_batch_tokens=1024, page_size=64)
"""The best of six settings that were tried."""


class _OwnLengths(StoppingCriteria):
    """Ends each row after the tokens it asked for, batch after batch in the order of requests."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        lengths = [request.sampling.max_new_tokens for request in requests]
        self._lengths = torch.tensor(lengths, device=device)
        self._first = 0
        self._num_steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._num_steps += 1
        batch = self._lengths[self._first : self._first + len(input_ids)]
        has_ended = batch <= self._num_steps
        if bool(has_ended.all()):
            self._first, self._num_steps = self._first + len(input_ids), 0
        return has_ended


def generate(model: Model, requests: Sequence[Request], batch_size: int, is_sorted: bool) -> None:
    """`model.generate` on left-padded batches; sorted is what our static engine does."""
    todo = list(requests)
    if is_sorted:
        todo.sort(key=lambda request: -len(request.prompt_ids))
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        width = max(len(request.prompt_ids) for request in batch)
        padding = [width - len(request.prompt_ids) for request in batch]
        ids = [[0] * n + list(r.prompt_ids) for n, r in zip(padding, batch, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        model.model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=_config(batch),
            stopping_criteria=StoppingCriteriaList([_OwnLengths(batch, model.device)]),
        )


def text_generation(model: Model, requests: Sequence[Request], batch_size: int) -> None:
    """`pipeline("text-generation", batch_size=…)`, in file order; a word stands for each token."""
    run = TextGenerationPipeline(
        model=model.model, tokenizer=_words(model.num_embeddings), device=model.device
    )
    texts = [" ".join(map(str, request.prompt_ids)) for request in requests]
    run(
        texts,
        batch_size=batch_size,
        generation_config=_config(requests),
        stopping_criteria=StoppingCriteriaList([_OwnLengths(requests, model.device)]),
    )


def continuous_batching(
    model: Model, requests: Sequence[Request], config: ContinuousBatchingConfig | None
) -> None:
    """transformers' ContinuousBatchingManager."""
    shared = _config(requests)
    shared.eos_token_id = -1
    manager = model.model.init_continuous_batching(shared, config)
    manager.start()
    try:
        for request in requests:
            most = request.sampling.max_new_tokens
            manager.add_request(list(request.prompt_ids), max_new_tokens=most, eos_token_id=-1)
        for _ in requests:
            result = manager.get_result(timeout=600)
            assert result is not None, "transformers' continuous batching has ended early"
    finally:
        manager.stop(block=True)


def _config(requests: Sequence[Request]) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max(request.sampling.max_new_tokens for request in requests),
        do_sample=requests[0].sampling.temperature > 0,
        top_k=0,
        pad_token_id=0,
    )


def _words(num_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers of its tokens."""
    words = {str(number): number for number in range(num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="0", eos_token="0", padding_side="left"
    )
