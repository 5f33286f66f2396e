"""Models whose rotary frequencies follow the longest row: nobody's answer depends on others."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from transformers import LlamaConfig, Phi3Config, PretrainedConfig

from pipeline.cache_support import mixed_columns
from pipeline.static_engine import StaticEngine
from tests.bare_models import (
    LLAMA,
    alone,
    bare,
    in_order,
    random_model,
    random_prompt,
    request,
    spell,
    texts,
)

LENGTHS = (20, 25, 30, 44, 47, 60, 60, 80, 80, 100, 20, 70)
"""Of prompts; with their answers some stay below 64 tokens, some begin above, some go across."""


def _longrope() -> PretrainedConfig:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
    }
    return Phi3Config(**LLAMA, original_max_position_embeddings=64, rope_parameters=rope)


def _dynamic() -> PretrainedConfig:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaConfig(**{**LLAMA, "max_position_embeddings": 64}, rope_parameters=rope)


@pytest.mark.parametrize("make", [_longrope, _dynamic])
def test_rows_do_not_change_one_another(make: Callable[[], PretrainedConfig]) -> None:
    """Each row is answered as by `generate` alone, on a model that has seen no other."""
    chance = random.Random(0)
    requests = [
        request(row, random_prompt(chance, length), 16) for row, length in enumerate(LENGTHS)
    ]
    expected = [spell(alone(bare(random_model(make())), one)) for one in requests]
    engine = StaticEngine(bare(random_model(make())), batch_size=8)
    engine.add(requests)
    completions, sizes = [], []
    while engine.num_waiting:
        finished = engine.step()
        completions += finished
        sizes.append(len(finished))
    assert texts(in_order(completions, requests)) == expected
    assert sizes == [1, 2, 1, 2, 6], "short rows go together, whatever their lengths"


def test_other_models_mix_lengths_freely() -> None:
    """They have no such length."""
    assert mixed_columns(LlamaConfig(**LLAMA)) is None
    assert mixed_columns(_longrope()) == mixed_columns(_dynamic()) == 63
