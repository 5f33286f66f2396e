"""Whether a loaded model keeps the promise that padding changes no answer."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PretrainedConfig

from pipeline.continuous_engine import ContinuousEngine
from pipeline.engine import build_engine
from pipeline.model import Model
from pipeline.padding import pad_left, padding_problem
from pipeline.records import Completion, Request
from pipeline.settings import EngineSettings
from pipeline.static_engine import StaticEngine
from tests.bare_models import (
    LLAMA,
    NUM_POSITIONS,
    NUM_TOKENS,
    alone,
    bare,
    bare_llama,
    in_order,
    random_model,
    spell,
    varied,
)
from tests.models import load, make_llama

GPT2 = {"vocab_size": NUM_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4}
SMALL = {"vocab_size": NUM_TOKENS, "hidden_size": 32, "num_hidden_layers": 2}
SOUND: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "gpt2": lambda: hf.GPT2Config(**GPT2, n_positions=NUM_POSITIONS),
    "gemma3": lambda: hf.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=9),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA, num_local_experts=8),
    "bloom": lambda: hf.BloomConfig(**SMALL, n_head=4),
    "mamba": lambda: hf.MambaConfig(**SMALL),
}


def bare_gpt2(num_positions: int = NUM_POSITIONS) -> Model:
    """A model with a table of positions."""
    model = bare(random_model(hf.GPT2Config(**GPT2, n_positions=num_positions)))
    return dataclasses.replace(model, context_length=num_positions)


def without(model: Model, argument: str) -> Model:
    """The model, which from now on does not see an argument of its forward pass."""
    network: Any = model.model
    forward = network.forward

    @functools.wraps(forward)
    def deaf(*args: Any, **options: Any) -> Any:
        return forward(*args, **{**options, argument: None})

    network.forward = deaf
    return model


def raising(model: Model, is_bad: Callable[[torch.Tensor], bool], error: Exception) -> Model:
    """The model, which from now on raises over some inputs."""
    network: Any = model.model
    forward = network.forward

    @functools.wraps(forward)
    def raises(*args: Any, **options: Any) -> Any:
        if is_bad(options["input_ids"]):
            raise error
        return forward(*args, **options)

    network.forward = raises
    return model


def finish(engine: Any, requests: list[Request]) -> list[Completion]:
    """All completions, in the order of the requests."""
    engine.add(requests)
    completions: list[Completion] = []
    while engine.num_waiting + engine.num_running:
        completions += engine.step()
    return in_order(completions, requests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOUND)
def test_sound_model(name: str, dtype: torch.dtype) -> None:
    """Rounding is no problem, in whatever type, with attention, experts, ALiBi or a state."""
    network: Any = random_model(SOUND[name]())
    model = dataclasses.replace(bare(network.to(dtype)), dtype=dtype)
    assert padding_problem(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_sees_padding(dtype: torch.dtype) -> None:
    """A model that ignores the attention mask is told, with by how much it is off."""
    network: Any = bare_llama().model
    model = without(dataclasses.replace(bare(network.to(dtype)), dtype=dtype), "attention_mask")
    assert "left padding changes this model's logits by " in (padding_problem(model) or "")


def test_model_that_counts_padding() -> None:
    """So is one that numbers positions from the padding on."""
    assert "logits" in (padding_problem(without(bare_gpt2(), "position_ids")) or "")
    assert padding_problem(without(bare_llama(), "position_ids")) is None  # they are relative


def test_recurrent_model_that_sees_padding() -> None:
    """RWKV has no mask at all."""
    config = hf.RwkvConfig(**SMALL, attention_hidden_size=32, context_length=NUM_POSITIONS)
    assert "logits" in (padding_problem(bare(random_model(config))) or "")


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_model(tmp_path: Any, quantization: str) -> None:
    """Quantized, a sound model stays one."""
    folder = make_llama(tmp_path, hidden_size=64, num_attention_heads=4)
    assert padding_problem(load(folder, quantization=quantization)) is None


@pytest.mark.parametrize("num_positions", [3, 4, 9, 34, 35, 36])
def test_no_position_is_left(num_positions: int) -> None:
    """The probes fit the smallest context."""
    assert padding_problem(bare_gpt2(num_positions)) is None


def test_wrong_in_one_width_only() -> None:
    """Padded to 33 columns, or in the decode step after, is where it has been seen to go wrong."""
    for columns in (33, 1):
        odd = raising(bare_llama(), lambda ids, w=columns: ids.shape == (4, w), ValueError("odd"))
        assert padding_problem(odd) == "padded prompts fail in this model (ValueError: odd)"


def test_tokens_of_the_probes() -> None:
    """They are in the model's table and mean nothing special, however small the table is."""
    seen: set[int] = set()
    model = dataclasses.replace(bare_llama(), num_embeddings=5)

    def watch(ids: torch.Tensor) -> bool:
        if len(ids) == 1:  # and so without padding
            seen.update(ids[0].tolist())
        return False

    assert padding_problem(raising(model, watch, ValueError())) is None
    assert seen == {1, 3, 4}


def test_broken_model() -> None:
    """Output that is not a number is told, and whether padding is to blame."""
    model = bare_llama()
    with torch.no_grad():
        model.model.get_output_embeddings().weight[5] = torch.nan
    assert "the model is broken" in (padding_problem(model) or "")

    sound = bare_llama()
    network: Any = sound.model
    forward = network.forward

    @functools.wraps(forward)
    def overflowing(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        if len(options["input_ids"]) > 1:
            output.logits[1, -1, 3] = torch.inf
        return output

    network.forward = overflowing
    assert padding_problem(sound) == (
        "padded prompts make this model's output something that is not a number"
    )


def test_model_that_raises() -> None:
    """Alone or padded; but a device that has failed is no matter of padding."""
    many = raising(bare_llama(), lambda ids: len(ids) > 1, KeyError("rows"))
    assert padding_problem(many) == "padded prompts fail in this model (KeyError: 'rows')"
    every = raising(bare_llama(), lambda ids: True, AssertionError())
    assert padding_problem(every) == "a prompt alone fails already (AssertionError)"
    failed = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(torch.AcceleratorError):
        padding_problem(raising(bare_llama(), lambda ids: True, failed))


@pytest.mark.parametrize("kind", ["auto", "continuous", "static"])
def test_model_that_sees_padding_gets_none(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever engine is asked for, each row then has the answer that it has alone."""
    model = without(bare_llama(), "attention_mask")
    requests = varied(24)
    with caplog.at_level(logging.WARNING, "pipeline"):
        engine = build_engine(model, EngineSettings(kind=kind, batch_size=8))
    assert isinstance(engine, StaticEngine)
    assert caplog.text.count("prompts of one length at a time, since left padding changes") == 1
    expected = [spell(alone(model, request)) for request in requests]
    assert [completion.text for completion in finish(engine, requests)] == expected
    padded = finish(StaticEngine(model, 8), requests)
    assert [completion.text for completion in padded] != expected


def test_sound_model_is_not_held_up(caplog: pytest.LogCaptureFixture) -> None:
    """It gets the engine asked for, without a word."""
    assert isinstance(build_engine(bare_llama(), EngineSettings()), ContinuousEngine)
    assert caplog.text == ""


def test_the_probes_leave_chance_alone() -> None:
    """Nobody's random numbers depend on whether there was a check."""
    before = torch.get_rng_state()
    padding_problem(bare_llama())
    assert torch.equal(torch.get_rng_state(), before)


def test_pad_left() -> None:
    """Rows end in the same column, and the mask says where they begin."""
    ids, mask = pad_left([(5, 6, 7), (8,)], 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
