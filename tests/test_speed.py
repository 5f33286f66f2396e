"""One model measured in this process, and what memory it takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig

from pipeline.errors import ModelError
from pipeline.measured import Cell, Limits, Shape, State
from pipeline.model import Model
from pipeline.peak_memory import peak_bytes, reset_peak
from pipeline.room import is_out_of_memory
from pipeline.speed import NUM_ROUNDS, NUM_STEPS, SpeedMeter, set_attention
from tests.models import VOCABULARY_SIZE, load, make_model

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def test_a_shape_is_measured_as_the_engine_would_run_it(llama: Model) -> None:
    """All steps, and a cache for so many rows of so many tokens: 256 bytes each, in this model."""
    cell = SpeedMeter(llama).measure(Shape(5, 40), max_seconds=60)
    assert cell.state is State.MEASURED
    assert cell.speed is not None
    assert cell.speed.num_steps == NUM_ROUNDS * NUM_STEPS
    assert cell.speed.cache_bytes == 5 * 64 * 256
    assert cell.speed.decode_tokens_per_second == pytest.approx(5 / cell.speed.step_seconds)


def test_more_rows_than_go_into_one_prefill(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share what is computed for the first of them."""
    calls: list[tuple[int, ...]] = []
    hook = llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    monkeypatch.setattr("pipeline.speed.MAX_PREFILL_TOKENS", 3 * (64 - 18))
    meter = SpeedMeter(llama)
    calls.clear()
    cell = meter.measure(Shape(8, 64), max_seconds=60)
    hook.remove()
    assert cell.state is State.MEASURED
    assert set(calls) == {(3, 64 - 18), (8, 1)}


def test_positions_stay_within_the_context(gpt2: Model) -> None:
    """A table of 128 positions does for rows that have 128 tokens in the end."""
    assert SpeedMeter(gpt2).measure(Shape(2, 128), 60).state is State.MEASURED


def test_little_time_gives_few_steps(llama: Model) -> None:
    """One at least."""
    cell = SpeedMeter(llama).measure(Shape(2, 40), max_seconds=1e-6)
    assert cell.speed is not None
    assert cell.speed.num_steps == 1
    assert cell.speed.seconds > 1e-6


def raising(error: Exception, batch: int) -> Any:
    """A hook by which a model fails with so many rows."""

    def before(module: object, args: object, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) == batch:
            raise error

    return before


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), State.MEMORY),
        (MemoryError(), State.MEMORY),
        (ValueError("odd heads"), State.FAILED),
    ],
)
def test_an_error_is_a_cell(llama: Model, error: Exception, state: State) -> None:
    """It says what was wrong; smaller shapes can be measured afterwards."""
    meter = SpeedMeter(llama)
    hook = llama.model.register_forward_pre_hook(raising(error, 4), with_kwargs=True)
    cell = meter.measure(Shape(4, 40), 60)
    after = meter.measure(Shape(2, 40), 60)
    hook.remove()
    assert (cell.state, after.state) == (state, State.MEASURED)
    assert cell.speed is None
    assert cell.message
    if state is State.FAILED:
        assert cell.message == "odd heads"


def test_a_broken_device_ends_the_process(llama: Model) -> None:
    """Nothing that it gave afterwards would mean anything."""
    meter = SpeedMeter(llama)
    error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    hook = llama.model.register_forward_pre_hook(raising(error, 4), with_kwargs=True)
    with pytest.raises(torch.AcceleratorError):
        meter.measure(Shape(4, 40), 60)
    hook.remove()


def test_what_is_too_large_rules_out_what_is_larger() -> None:
    """In both ways; a longer context with fewer rows may do."""
    limits = Limits()
    limits.learn(Cell(Shape(8, 128), State.MEMORY), 5)
    assert limits.allow(Shape(4, 2048))
    assert limits.allow(Shape(32, 64))
    assert not limits.allow(Shape(8, 128))
    assert not limits.allow(Shape(9, 128))
    assert not limits.allow(Shape(8, 256))


def test_a_model_of_the_static_engine_is_refused(tmp_path: Path) -> None:
    """It has no steps; the sentence says what measures it."""
    config = MambaConfig(vocab_size=VOCABULARY_SIZE, hidden_size=32, num_hidden_layers=2)
    model = load(make_model(tmp_path / "mamba", config))
    with pytest.raises(ModelError, match=r"static engine.*recurrent.*--compare none JOB"):
        SpeedMeter(model)


def test_attention_is_what_was_asked_for(llama_folder: Path) -> None:
    """Also where the engine would put its own in the place of sdpa."""
    model = load(llama_folder)
    set_attention(model, "eager")
    assert SpeedMeter(model).measure(Shape(2, 40), 60).state is State.MEASURED
    assert model.model.config._attn_implementation == "eager"


def test_attention_that_is_not_installed_is_refused(llama: Model) -> None:
    """With the library's own reason."""
    with pytest.raises(ModelError, match="attention flash_attention_2 cannot be used"):
        set_attention(llama, "flash_attention_2")


def test_attention_that_a_model_does_not_let_be_chosen(llama_folder: Path) -> None:
    """transformers would only warn, and the figures would be another's."""
    model = load(llama_folder)
    network: Any = model.model
    network._can_set_attn_implementation = lambda: False
    with pytest.raises(ModelError, match="has its own, sdpa"):
        set_attention(dataclasses.replace(model, model=network), "eager")


SPARING = """
import psutil, torch
from types import SimpleNamespace
from pipeline.peak_memory import stay_within_free_memory

psutil.virtual_memory = lambda: SimpleNamespace(total=2**30, available=2**28)
stay_within_free_memory(torch.device("cpu"))
torch.zeros(2**27, dtype=torch.uint8)
torch.zeros(2**30, dtype=torch.uint8)
"""


def test_no_more_memory_is_taken_than_is_free() -> None:
    """What there is no room for fails, where the system would have given it and killed later."""
    done = subprocess.run(
        [sys.executable, "-c", SPARING], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert "1073741824 bytes" in error
    assert is_out_of_memory(RuntimeError(error))


def test_peak_memory_is_measured_anew() -> None:
    """What an earlier measurement took and gave back does not count."""
    reset_peak(CPU)
    before = peak_bytes(CPU)
    block = bytearray(b"x" * 2**28)
    assert peak_bytes(CPU) >= before + 2**28
    del block
    reset_peak(CPU)
    assert peak_bytes(CPU) < before + 2**27
