"""What only a GPU can show: `pytest -m gpu`. Everything else about these steps runs on a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline import placement, room
from pipeline.checkpoint import fetch
from pipeline.continuous_engine import ContinuousEngine
from pipeline.cuda_graph import CudaGraphs
from pipeline.engine import build_engine
from pipeline.errors import ResourceError
from pipeline.forward import Forward
from pipeline.model import Model, load_model
from pipeline.placement import Gpu
from pipeline.records import Sampling
from pipeline.settings import EngineSettings, ModelSettings
from pipeline.stepping import Stepping, stepping_for
from tests.bare_models import answers, bare, bare_llama, random_model, varied
from tests.engines import requests_for, run
from tests.models import make_llama
from tests.test_architectures import CONFIGS, mixed_requests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _tight_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "COLUMN_STEP", 8)
    monkeypatch.setattr(room, "GROWTH", 1)
    monkeypatch.setattr(room, "BUCKET_STEP", 8)


def on_gpu(model: Model) -> Model:
    """The same model, moved."""
    network: Any = model.model
    network.to("cuda")
    return dataclasses.replace(model, device=network.device)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "bloom", "qwen3"])
def test_cuda_graphs_give_the_answers_of_called_steps(name: str) -> None:
    """Token for token, through refills, window moves, growth, and rows put back."""
    model = on_gpu(bare(random_model(CONFIGS[name]())))
    stepping = stepping_for(model)
    assert stepping.make_capture is not None
    assert stepping.reads_behind
    expected = answers(ContinuousEngine(model, 4, stepping=Stepping()), mixed_requests())
    engine = ContinuousEngine(model, 4, stepping=stepping)
    assert answers(engine, mixed_requests()) == expected
    assert engine._decoder.replays
    assert engine.metrics.num_window_moves >= 2


def test_samples_are_those_of_called_steps() -> None:
    """Their chance is numbered by token, and one token is always still unread."""
    model = on_gpu(bare_llama())
    requests = varied(20, temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    expected = answers(ContinuousEngine(model, 4, stepping=Stepping()), requests)
    assert answers(ContinuousEngine(model, 4), requests) == expected


def test_a_failed_recording_leaves_everything_as_it_was() -> None:
    """A step that waits for a value is found out before, one that waits otherwise while recorded.

    The stream is the one before, memory can be freed, and the next recording works.
    """
    stream = torch.cuda.Stream()
    values = torch.ones(8, device="cuda")

    def waits_when_recorded() -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return values + 1

    before = torch.cuda.current_stream()
    for step in (lambda: values * values.sum().item(), waits_when_recorded):
        with pytest.raises(RuntimeError):
            CudaGraphs(stream)(step)
        assert torch.cuda.current_stream() == before
        assert torch.cuda.get_sync_debug_mode() == 0
        torch.cuda.empty_cache()
        assert (values + 1).sum().item() == 16
    replay = CudaGraphs(stream)(lambda: values * 2)
    values.fill_(4)
    assert replay().sum().item() == 64


def test_int8_runs_without_graphs(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    """Its kernels ask for outliers, which cannot be recorded: that is found out at load."""
    bare_llama(hidden_size=128, intermediate_size=256).model.save_pretrained(tmp_path)
    network: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cuda:0"},
    )
    model = dataclasses.replace(bare(network), quantization="int8")
    assert stepping_for(model) == Stepping(make_capture=None, reads_behind=True)
    assert "without CUDA graphs" in caplog.text
    completions = answers(ContinuousEngine(model, 4), varied(8))
    assert all(completion.error is None for completion in completions)


def spread(folder: Path, **settings: Any) -> Model:
    """The model of a folder, over all GPUs that there are."""
    block = ModelSettings(path=str(folder), **settings)
    return load_model(fetch(block), block)


def check_like_plain(model: Model, folder: Path) -> None:
    """Whichever engine it is, the answers are those of the model on one GPU."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).to("cuda:0")
    network = dataclasses.replace(model, model=plain, other_devices=())
    requests = requests_for(network, Sampling(12))
    for kind in ("continuous", "static"):
        settings = EngineSettings(kind=kind, batch_size=4)  # type: ignore[arg-type]
        expected = run(build_engine(network, settings), requests)
        engine = build_engine(model, settings)
        assert isinstance(engine, ContinuousEngine) == (kind == "continuous")
        assert run(engine, requests) == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_on_several_gpus_give_the_same_answers(tmp_path: Path) -> None:
    """Each layer's keys and values are on its own GPU, and tokens go in at the first."""
    folder = make_llama(tmp_path / "model", num_hidden_layers=8)
    model = spread(folder)
    assert len(model.devices) == torch.cuda.device_count()
    assert model.device == torch.device("cuda:0")
    assert len(model.peak.gpus) == len(model.devices)
    check_like_plain(model, folder)
    cache, _ = Forward(model).prefill([[3, 4, 5]])
    assert set(cache.token_bytes) == set(model.devices)


def test_offloaded_layers_give_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the weights lie in the machine's memory and come to the GPU for each step."""
    folder = make_llama(tmp_path / "model", num_hidden_layers=8)
    half = (folder / "model.safetensors").stat().st_size // 2
    monkeypatch.setattr(placement, "visible_gpus", lambda: [Gpu("0", 2 * half)])
    monkeypatch.setattr(placement, "OFFLOADED_SHARE", 0.5)
    model = spread(folder, offload="cpu")
    assert set(model.model.hf_device_map.values()) == {0, "cpu"}
    assert model.device == torch.device("cuda:0")
    check_like_plain(model, folder)
    monkeypatch.setattr("pipeline.model.placement_options", lambda *_: {"device_map": {"": "cpu"}})
    with pytest.raises(ResourceError, match="does not fit into the memory of 1 GPU"):
        spread(folder)
