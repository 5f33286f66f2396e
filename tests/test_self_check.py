"""Whether a loaded model keeps the promise that a batch changes no answer."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PretrainedConfig

from pipeline.bands import Band
from pipeline.continuous_engine import ContinuousEngine
from pipeline.engine import build_engine
from pipeline.errors import ModelError, ResourceError
from pipeline.model import Model
from pipeline.padding import pad_left
from pipeline.records import Completion, Request
from pipeline.self_check import Batches, SelfCheck, self_check
from pipeline.settings import EngineSettings
from pipeline.slots import SlotCache
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


def padded(model: Model) -> SelfCheck:
    """What is found for the static engine."""
    return self_check(model, EngineSettings(kind="static"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOUND)
def test_sound_model(name: str, dtype: torch.dtype) -> None:
    """Rounding is no problem, in whatever type, with attention, experts, ALiBi or a state."""
    network: Any = random_model(SOUND[name]())
    model = dataclasses.replace(bare(network.to(dtype)), dtype=dtype)
    check = self_check(model, EngineSettings())
    assert check.batches == (Batches.PADDED if name == "mamba" else Batches.SLOTS)
    assert padded(model).batches == Batches.PADDED
    assert check.difference <= check.tolerance
    assert check.rejected == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_sees_padding(dtype: torch.dtype) -> None:
    """A model that ignores the attention mask is told, with by how much it is off."""
    network: Any = bare_llama().model
    model = without(dataclasses.replace(bare(network.to(dtype)), dtype=dtype), "attention_mask")
    check = self_check(model, EngineSettings())
    assert check.batches is Batches.EQUAL_LENGTHS
    slots, slots_eager, left, left_eager = check.rejected
    assert "with sdpa attention, running in slots changes this model's logits by " in slots
    assert "with eager attention, running in slots" in slots_eager
    assert "with sdpa attention, left padding changes this model's logits by " in left
    assert "with eager attention, left padding" in left_eager


def test_model_that_counts_padding() -> None:
    """So is one that numbers positions from the padding on."""
    check = self_check(without(bare_gpt2(), "position_ids"), EngineSettings())
    assert check.batches is Batches.EQUAL_LENGTHS
    relative = self_check(without(bare_llama(), "position_ids"), EngineSettings())
    assert relative.rejected == ()


def test_padding_on_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tokenizer left at its default would pad: the last column is not a row's own."""

    def pad_right(
        rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = pad_left(rows, pad_id, device)
        turned = [(mask[row] == 0).sum() for row in range(len(rows))]
        pairs = zip(range(len(rows)), turned, strict=True)
        order = torch.stack([torch.arange(ids.shape[1]).roll(-int(by)) for _, by in pairs])
        return ids.gather(1, order), mask.gather(1, order)

    monkeypatch.setattr("pipeline.self_check.pad_left", pad_right)
    check = padded(bare_llama())
    assert check.batches is Batches.EQUAL_LENGTHS
    assert "left padding changes this model's logits" in check.rejected[0]


def test_model_for_which_no_batch_is_right() -> None:
    """RWKV sees padding, and its state of several rows goes wrong; one at a time it is right."""
    config = hf.RwkvConfig(**SMALL, attention_hidden_size=32, context_length=NUM_POSITIONS)
    model = bare(random_model(config))
    with pytest.raises(ModelError, match=r"another row of the same length .* engine\.batch_size 1"):
        self_check(model, EngineSettings())
    settings = EngineSettings(batch_size=1)
    requests = varied(6)
    engine = build_engine(model, settings, check=self_check(model, settings))
    expected = [spell(alone(model, request)) for request in requests]
    assert [completion.text for completion in finish(engine, requests)] == expected


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_model(tmp_path: Any, quantization: str) -> None:
    """Quantized, a sound model stays one."""
    folder = make_llama(tmp_path, hidden_size=64, num_attention_heads=4)
    check = self_check(load(folder, quantization=quantization), EngineSettings())
    assert (check.batches, check.rejected) == (Batches.SLOTS, ())


@pytest.mark.parametrize("num_positions", [3, 4, 9, 34, 35, 36])
def test_no_position_is_left(num_positions: int) -> None:
    """The probes fit the smallest context."""
    assert self_check(bare_gpt2(num_positions), EngineSettings()).rejected == ()
    assert padded(bare_gpt2(num_positions)).rejected == ()


def test_wrong_in_one_width_only() -> None:
    """Padded to 33 columns, or in the decode step after, is where it has been seen to go wrong."""
    for columns in (33, 1):
        odd = raising(bare_llama(), lambda ids, w=columns: ids.shape == (4, w), ValueError("odd"))
        assert padded(odd).rejected[0] == (
            "with sdpa attention, a padded batch fails in this model (ValueError: odd)"
        )


def test_wrong_with_one_attention_only(caplog: pytest.LogCaptureFixture) -> None:
    """Another implementation takes its place, and with it answers are what they are alone."""
    model = bare_llama()
    network: Any = model.model
    forward = network.forward

    @functools.wraps(forward)
    def overflowing(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        if network.config._attn_implementation != "eager" and len(output.logits) > 1:
            output.logits[1, -1, 3] = torch.nan
        return output

    network.forward = overflowing
    with caplog.at_level(logging.WARNING, "pipeline"):
        check = self_check(model, EngineSettings())
    assert (check.attention, check.batches) == ("eager", Batches.SLOTS)
    assert "with sdpa attention, a batch in slots makes this model's output something" in (
        caplog.text
    )
    requests = varied(24)
    engine = build_engine(model, EngineSettings(batch_size=8), check=check)
    assert isinstance(engine, ContinuousEngine)
    expected = [spell(alone(model, request)) for request in requests]
    assert [completion.text for completion in finish(engine, requests)] == expected


def test_wrong_bands_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in bands of rows is tried too, although the probes are too short to need it."""

    def not_wanted(lengths: Sequence[int], *_: Any) -> Any:
        raise AssertionError("not asked: the bands are given")

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.slots.bands_of", not_wanted)
        assert self_check(bare_llama(), EngineSettings()).attention == "sdpa"

    def shifted(first: int, end: int, num_hidden: int) -> Band:
        return Band(first, end, num_hidden + 1 if num_hidden else 0)

    monkeypatch.setattr("pipeline.self_check.Band", shifted)
    check = self_check(bare_llama(), EngineSettings())
    assert (check.attention, check.batches) == ("eager", Batches.SLOTS)
    assert "running in slots changes" in check.rejected[0]


def test_wrong_in_slots_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The static engine is what is left then."""

    def one_off(*args: Any, **options: Any) -> Any:
        mask, positions = model_inputs(*args, **options)
        return mask, positions + 3

    model_inputs = SlotCache.model_inputs
    monkeypatch.setattr(SlotCache, "model_inputs", one_off)
    model = bare_gpt2()
    check = self_check(model, EngineSettings())
    assert check.batches is Batches.PADDED
    assert isinstance(build_engine(model, EngineSettings(), check=check), StaticEngine)


def test_tokens_of_the_probes() -> None:
    """They are in the model's table and mean nothing special, however small the table is."""
    seen: set[int] = set()
    model = dataclasses.replace(bare_llama(), num_embeddings=5)

    def watch(ids: torch.Tensor) -> bool:
        if len(ids) == 1:  # and so without padding
            seen.update(ids[0].tolist())
        return False

    assert padded(raising(model, watch, ValueError())).rejected == ()
    assert seen == {1, 3, 4}


def test_broken_model() -> None:
    """One whose output is not a number, or who raises at everything, is refused."""
    model = bare_llama()
    with torch.no_grad():
        model.model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(ModelError, match="a prompt alone makes this model's output something"):
        self_check(model, EngineSettings())
    every = raising(bare_llama(), lambda ids: True, AssertionError())
    with pytest.raises(ModelError, match=r"a prompt alone fails in this model \(AssertionError\)"):
        self_check(every, EngineSettings())


def test_model_that_is_off_in_every_batch() -> None:
    """It is refused, with the numbers, and with the attention that it had."""
    model = bare_llama()
    network: Any = model.model
    forward = network.forward

    @functools.wraps(forward)
    def crowded(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits *= 1 + 0.1 * (len(output.logits) - 1)
        return output

    network.forward = crowded
    with pytest.raises(ModelError) as refused:
        self_check(model, EngineSettings())
    said = str(refused.value)
    assert re.search(r"another row of the same length changes .* by \d+\.\d% of their range", said)
    assert "(0.1% would be rounding)" in said
    assert "model.self_check" in said
    assert network.config._attn_implementation == "sdpa"


def test_failures_that_are_not_the_models() -> None:
    """Memory and the device have their own kinds of errors."""
    failed = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(torch.AcceleratorError):
        padded(raising(bare_llama(), lambda ids: True, failed))
    full = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ResourceError, match="too little for a short prompt"):
        padded(raising(bare_llama(), lambda ids: True, full))


@pytest.mark.parametrize("kind", ["auto", "continuous", "static"])
def test_model_that_sees_padding_gets_none(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever engine is asked for, each row then has the answer that it has alone."""
    model = without(bare_llama(), "attention_mask")
    requests = varied(24)
    settings = EngineSettings(kind=kind, batch_size=8)
    with caplog.at_level(logging.WARNING, "pipeline"):
        engine = build_engine(model, settings, check=self_check(model, settings))
    assert isinstance(engine, StaticEngine)
    assert caplog.text.count("prompts of one length at a time") == 1
    assert "with sdpa attention, left padding changes this model's logits" in caplog.text
    expected = [spell(alone(model, request)) for request in requests]
    assert [completion.text for completion in finish(engine, requests)] == expected
    mixed = finish(StaticEngine(model, 8), requests)
    assert [completion.text for completion in mixed] != expected


def test_sound_model_is_not_held_up(caplog: pytest.LogCaptureFixture) -> None:
    """It gets the engine asked for, without a word."""
    model = bare_llama()
    check = self_check(model, EngineSettings())
    assert isinstance(build_engine(model, EngineSettings(), check=check), ContinuousEngine)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_probes_leave_chance_alone() -> None:
    """Nobody's random numbers depend on whether there was a check."""
    model = bare_llama()
    before = torch.get_rng_state()
    self_check(model, EngineSettings())
    assert torch.equal(torch.get_rng_state(), before)


def test_pad_left() -> None:
    """Rows end in the same column, and the mask says where they begin."""
    ids, mask = pad_left([(5, 6, 7), (8,)], 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
