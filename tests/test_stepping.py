from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.model import Model
from pipeline.stepping import Stepping, replays_right, stepping_for
from tests.bare_models import bare, bare_llama, random_model
from tests.recorded import RecordedSteps
from tests.test_architectures import CONFIGS


@pytest.fixture(scope="module")
def model() -> Model:
    """A Llama whose answers vary; not to be changed."""
    torch.set_num_threads(1)
    return bare_llama()


def test_a_cpu_records_nothing_and_reads_at_once(model: Model) -> None:
    """There is nothing to be kept busy, and a junk step would cost time."""
    assert stepping_for(model) == Stepping(make_capture=None, reads_behind=False)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "gpt2"])
def test_replaying_is_tried_on_the_model(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where it gives the same logits, it is used, and nothing is said."""
    assert replays_right(bare(random_model(CONFIGS[name]())), RecordedSteps)
    assert not caplog.records


class Frozen(RecordedSteps):
    """As if a step's kernels ran elsewhere than where they are recorded."""

    def __call__(self, step: Callable[[], Any]) -> Callable[[], Any]:
        result = step()
        return lambda: result


class Refusing(RecordedSteps):
    def __call__(self, step: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("capture", "said"),
    [(Frozen, "replaying decode steps changes this model's logits"), (Refusing, "not permitted")],
)
def test_replaying_that_goes_wrong_is_not_used(
    model: Model, capture: type[RecordedSteps], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the recording fails or the replay gives other logits; one line says so."""
    assert not replays_right(model, capture)
    (line,) = [one.getMessage() for one in caplog.records]
    assert said in line


def test_a_model_on_several_devices_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """What its other devices do would not be part of the recording."""
    caplog.set_level("INFO")
    model = bare_llama()
    model.model.model.layers[1].to("meta")
    assert not replays_right(model, RecordedSteps)
    assert "the model is on several devices" in caplog.text
