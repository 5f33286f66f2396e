from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from pipeline.errors import JobFileError, ModelError, ShardmillError
from pipeline.records import Sampling
from pipeline.settings import GenerationSettings

SAMPLES = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
IDLE = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize(
    ("job", "model", "expected"),
    [
        ({}, {}, {}),
        ({}, IDLE, {}),
        ({}, {**IDLE, "do_sample": False}, {}),
        ({}, SAMPLES, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({}, {"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({}, {"do_sample": True, "temperature": None, "top_k": 0}, {"temperature": 1.0}),
        ({}, {"do_sample": True, "temperature": 1, "top_k": 5}, {"temperature": 1, "top_k": 5}),
        ({"temperature": 0}, SAMPLES, {}),
        ({"temperature": 0, "top_p": 0.5}, SAMPLES, {}),
        ({"temperature": 0.9}, SAMPLES, {"temperature": 0.9, "top_k": 20, "top_p": 0.95}),
        ({"temperature": 0.9}, IDLE, {"temperature": 0.9, "top_k": 50}),
        ({"temperature": 0.9, "top_k": 0}, {}, {"temperature": 0.9}),
        ({"top_k": 0, "top_p": 1, "min_p": 0.1}, SAMPLES, {"temperature": 0.6, "min_p": 0.1}),
        ({}, {"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repetition_penalty": 1}, {"repetition_penalty": 1.1}, {}),
    ],
)
def test_what_a_job_leaves_out_comes_from_the_model(
    job: dict[str, Any], model: dict[str, Any], expected: dict[str, Any]
) -> None:
    """The job's value, else the model's if it samples, else transformers' default."""
    settings = GenerationSettings(max_new_tokens=7, stop=("a", "b"), **job)
    assert settings.resolve(model) == Sampling(7, ("a", "b"), **expected)


def test_defaults_are_those_of_transformers() -> None:
    """What nobody sets is what `generate` would take."""
    defaults = GenerationConfig._get_default_generation_params()
    sampling = GenerationSettings().resolve({"do_sample": True})
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(sampling, name) == defaults[name]


@pytest.mark.parametrize(
    ("job", "model", "error", "words"),
    [
        ({"top_p": 0.9}, {}, JobFileError, ["generation.top_p", "generation.temperature"]),
        ({"min_p": 0.1}, IDLE, JobFileError, ["generation.min_p", "greedy"]),
        ({}, {"do_sample": True, "top_p": 1.5}, ModelError, ["generation_config", "top_p: 1.5"]),
        ({}, {"repetition_penalty": "high"}, ModelError, ["repetition_penalty: 'high'"]),
    ],
)
def test_what_cannot_be_meant_is_refused(
    job: dict[str, Any], model: dict[str, Any], error: type[ShardmillError], words: list[str]
) -> None:
    """A filter without sampling would do nothing; a value out of range would do anything."""
    with pytest.raises(error) as caught:
        GenerationSettings(**job).resolve(model)
    assert all(word in str(caught.value) for word in words)
