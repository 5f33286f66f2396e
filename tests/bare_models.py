"""Small random models without files or tokenizers, and what `generate` makes of a prompt alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from pipeline.continuous_engine import ContinuousEngine
from pipeline.model import Model
from pipeline.records import Completion, Request, RequestId, Sampling
from pipeline.static_engine import StaticEngine
from pipeline.stopping import Vocabulary
from tests.models import scale_up

NUM_TOKENS = 97
NUM_POSITIONS = 128
PAD_ID, BOS_ID, EOS_ID = range(3)
LLAMA: dict[str, Any] = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": NUM_POSITIONS,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}

GPT2: dict[str, Any] = {
    "vocab_size": NUM_TOKENS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": NUM_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def spell(ids: Sequence[int]) -> str:
    """Each token is a letter or two: 3 is `d`, 29 is `bd`; so strings may span tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(letters[token // 26] * (token >= 26) + letters[token % 26] for token in ids)


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model in float32 whose answers vary, always the same one for a configuration."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scale_up(model)
    return model.eval()


def bare(network: PreTrainedModel) -> Model:
    """What an engine needs; there is no tokenizer."""
    network.generation_config = GenerationConfig()
    return Model(
        model=network,
        tokenizer=None,  # type: ignore[arg-type]
        device=network.device,
        vocabulary=Vocabulary(spell, NUM_TOKENS, {}, frozenset([EOS_ID])),
        pad_id=PAD_ID,
        num_embeddings=NUM_TOKENS,
        context_length=NUM_POSITIONS,
        num_parameters=network.num_parameters(),
        num_weight_bytes=0,
        dtype=torch.float32,
        quantization="none",
        load_seconds=0.0,
    )


def bare_llama(**changes: Any) -> Model:
    """A Llama of two layers with grouped keys."""
    return bare(random_model(LlamaConfig(**{**LLAMA, **changes})))


def random_prompt(chance: random.Random, length: int) -> tuple[int, ...]:
    """Tokens that are not special."""
    return tuple(chance.randrange(3, NUM_TOKENS) for _ in range(length))


def request(row: int, prompt: Sequence[int], max_new_tokens: int = 8, **options: Any) -> Request:
    """A request, greedy unless told otherwise, with a key of its own."""
    return Request(
        RequestId(0, row, 0), tuple(prompt), Sampling(max_new_tokens, **options), 977 * row + 1
    )


def varied(num_rows: int, seed: int = 0, **options: Any) -> list[Request]:
    """Requests with prompts and limits of different lengths."""
    chance = random.Random(seed)
    return [
        request(row, random_prompt(chance, chance.randint(1, 20)), chance.randint(1, 16), **options)
        for row in range(num_rows)
    ]


def drain(engine: ContinuousEngine) -> list[Completion]:
    """Steps until nothing is left."""
    completions: list[Completion] = []
    while engine.num_waiting + engine.num_running:
        completions += engine.step()
    return completions


def answers(engine: ContinuousEngine, requests: Sequence[Request]) -> list[Completion]:
    """All completions, in the order of the requests, each exactly once."""
    engine.add(requests)
    return in_order(drain(engine), requests)


def in_order(completions: Sequence[Completion], requests: Sequence[Request]) -> list[Completion]:
    """The completions in the order of the requests, each exactly once."""
    by_id = {completion.id: completion for completion in completions}
    assert len(by_id) == len(completions) == len(requests)
    return [by_id[request.id] for request in requests]


def alone(model: Model, request: Request) -> list[int]:
    """What `generate` gives for a greedy request by itself, without the end-of-sequence token."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=request.sampling.max_new_tokens,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    prompt = torch.tensor([request.prompt_ids])
    generate: Any = model.model.generate
    output = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    ids: list[int] = output[0, prompt.shape[1] :].tolist()
    return ids[:-1] if ids[-1] == EOS_ID else ids


def reference(model: Model, requests: Sequence[Request]) -> list[Completion]:
    """The static engine's answers, one row at a time."""
    engine = StaticEngine(model, batch_size=1)
    engine.add(requests)
    completions: list[Completion] = []
    while engine.num_waiting + engine.num_running:
        completions += engine.step()
    return in_order(completions, requests)


def texts(completions: Sequence[Completion]) -> list[str | None]:
    """What was generated."""
    return [completion.text for completion in completions]
