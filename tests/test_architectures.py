"""The slots give, on every architecture, what `generate` gives for each row alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PretrainedConfig

from pipeline import bands, room
from pipeline.cache_support import unsupported
from pipeline.continuous_engine import ContinuousEngine
from pipeline.forward import Forward
from pipeline.records import Request
from pipeline.slots import SlotCache
from tests.bare_models import (
    GPT2,
    LLAMA,
    NUM_POSITIONS,
    NUM_TOKENS,
    alone,
    answers,
    bare,
    drain,
    in_order,
    random_model,
    random_prompt,
    request,
    spell,
)
from tests.recorded import STEPPINGS

PLAIN = {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"}
WINDOW = 9
"""Of sliding layers: less than most rows have."""
EXPERTS = {"num_experts_per_tok": 2}
UNTIED = {"tie_word_embeddings": False}
"""Tied to the embedding, the output of a random model is its input."""

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=WINDOW),
    "gemma2": lambda: hf.Gemma2Config(**LLAMA, **UNTIED, head_dim=8, sliding_window=WINDOW),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **LLAMA,
        **UNTIED,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: hf.Phi3Config(**LLAMA),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "opt": lambda: hf.OPTConfig(**{**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**PLAIN),
    "bloom": lambda: hf.BloomConfig(**{**GPT2, **UNTIED, "hidden_size": 32}),
    "falcon": lambda: hf.FalconConfig(**PLAIN, alibi=False),
    "falcon-alibi": lambda: hf.FalconConfig(**PLAIN, alibi=True),
    "mpt": lambda: hf.MptConfig(
        vocab_size=NUM_TOKENS, d_model=32, n_layers=2, n_heads=4, max_seq_len=NUM_POSITIONS
    ),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA, **EXPERTS, num_local_experts=4),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(
        **LLAMA, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=32
    ),
    "olmo2": lambda: hf.Olmo2Config(**LLAMA),
    "cohere": lambda: hf.CohereConfig(**LLAMA),
    "gpt-oss": lambda: hf.GptOssConfig(
        **LLAMA,
        **EXPERTS,
        head_dim=8,
        sliding_window=WINDOW,
        num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "granite": lambda: hf.GraniteConfig(**LLAMA),
    "smollm3": lambda: hf.SmolLM3Config(**LLAMA),
    "glm4": lambda: hf.Glm4Config(**LLAMA, head_dim=8),
}


@pytest.fixture(autouse=True)
def _tight_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No spare columns beyond a quarter, so that windows move and buffers grow all the time.

    And every cut into bands of rows pays, and every move of rows for it.
    """
    monkeypatch.setattr(room, "COLUMN_STEP", 1)
    monkeypatch.setattr(room, "GROWTH", 1)
    monkeypatch.setattr(bands, "MIN_SAVED", 1)
    monkeypatch.setattr(bands, "NUM_STEPS", 1000)
    torch.set_num_threads(1)


def mixed_requests() -> list[Request]:
    """Short and long prompts and limits; some share a beginning, longer than a sliding window."""
    chance = random.Random(1)
    beginning = random_prompt(chance, 33)
    prompts = [random_prompt(chance, chance.randint(1, 30)) for _ in range(7)]
    prompts += [beginning + random_prompt(chance, chance.randint(1, 9)) for _ in range(5)]
    chance.shuffle(prompts)
    return [request(row, prompt, chance.randint(4, 24)) for row, prompt in enumerate(prompts)]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_row_has_the_answer_it_has_alone(name: str) -> None:
    """Token for token, with slots refilled in flight, windows moved, and buffers grown.

    A prefix is shared; and with little memory, rows are put back and continued.
    """
    model = bare(random_model(CONFIGS[name]()))
    assert unsupported(model.model) is None
    requests = mixed_requests()
    expected = [alone(model, one) for one in requests]

    engine = ContinuousEngine(model, num_slots=4)
    engine.add(requests[:7])
    completions = [completion for _ in range(5) for completion in engine.step()]
    engine.add(requests[7:])
    completions = in_order([*completions, *drain(engine)], requests)
    assert [completion.text for completion in completions] == [spell(ids) for ids in expected]
    assert engine.metrics.num_window_moves >= 2
    assert engine.metrics.slot_occupancy > 0.6

    token_bytes = sum(layer.num_token_bytes for layer in engine._batch.cache.layers)
    tight = ContinuousEngine(model, num_slots=6, cache_bytes=80 * token_bytes)
    again = answers(tight, requests)
    assert [completion.text for completion in again] == [spell(ids) for ids in expected]
    assert tight.metrics.num_put_back > 0

    # The comparison means something only if the answers differ, and vary.
    assert len({tuple(ids) for ids in expected}) >= 10
    assert sum(len(set(ids)) > 2 for ids in expected) >= 7


REFUSING = {"mpt"}
"""Their code looks at the length so far, which a recorded step has as a tensor."""


@pytest.mark.parametrize("name", CONFIGS)
def test_replayed_steps_give_the_same_answers(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As steps that are called, token for token, through all that happens to the rows.

    Slots are refilled, windows moved, buffers grown, rows put back. A model whose steps cannot be
    recorded says so once.
    """
    monkeypatch.setattr(room, "BUCKET_STEP", 8)
    model = bare(random_model(CONFIGS[name]()))
    requests = mixed_requests()
    token_bytes = Forward(model).prefill([[3]])[0].num_token_bytes
    for num_slots, cache_tokens in ((4, 10_000), (6, 180)):
        results = []
        for stepping in (STEPPINGS["called"], STEPPINGS["replayed, behind"]):
            engine = ContinuousEngine(
                model, num_slots, cache_tokens * token_bytes, stepping=stepping
            )
            results.append(answers(engine, requests))
        assert results[0] == results[1]
        assert engine._decoder.replays == (name not in REFUSING)
        assert engine.metrics.num_window_moves >= 2
    assert engine.metrics.num_put_back > 0
    assert len(caplog.records) == 2 * (name in REFUSING)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bloom", "gpt-oss", "gpt2"])
def test_the_logits_are_those_of_the_row_alone(name: str) -> None:
    """Prefilled apart, copied behind a longer row, moved, and decoded together: to 1e-4."""
    model = bare(random_model(CONFIGS[name]()))
    forward = Forward(model)
    chance = random.Random(3)
    rows = [random_prompt(chance, length) for length in (4, 31, 17)]
    following = [random_prompt(chance, 5) for _ in rows]
    cache = SlotCache(forward.num_layers, num_slots=3, capacity=60)
    with torch.no_grad():
        first, _ = forward.prefill([rows[1]])
        cache.append(first, [0])
        cache.move_end(45)
        others, _ = forward.prefill([rows[0], rows[2]])
        cache.append(others, [0, 1])
        in_slots = [rows[1], rows[0], rows[2]]
        for step in range(5):
            tokens = torch.tensor([[ids[step]] for ids in following])
            logits = forward(tokens, cache)
            for slot, (prompt, ids) in enumerate(zip(in_slots, following, strict=True)):
                whole = torch.tensor([[*prompt, *ids[: step + 1]]])
                expected = model.model(whole, use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits[slot], expected, atol=1e-4, rtol=1e-4)


UNFIT: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "mamba": (
        lambda: hf.MambaConfig(vocab_size=NUM_TOKENS, hidden_size=32, num_hidden_layers=2),
        "recurrent",
    ),
    "hybrid": (
        lambda: hf.Qwen3NextConfig(
            **LLAMA,
            head_dim=8,
            num_experts=4,
            layer_types=["linear_attention", "full_attention"],
        ),
        "recurrent",
    ),
    "convolutions": (
        lambda: hf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]),
        "LinearAttentionLayer",
    ),
    "chunked": (
        lambda: hf.Llama4TextConfig(**LLAMA, head_dim=8, num_local_experts=2),
        "chunks",
    ),
    "longrope": (
        lambda: hf.Phi3Config(
            **LLAMA,
            original_max_position_embeddings=64,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        ),
        "longrope",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_slots_do_not_fit_are_told_apart(name: str) -> None:
    """By a recurrent state, convolutions, chunks or positions that follow other rows."""
    make, reason = UNFIT[name]
    network: Any = random_model(make())
    found = unsupported(network)
    assert found is not None
    assert reason in found
