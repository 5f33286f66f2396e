"""Whether a model fits, told before it is loaded, and weights that lie elsewhere than they work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from jobs.config import load_job
from pipeline import placement
from pipeline.checkpoint import fetch
from pipeline.continuous_engine import ContinuousEngine
from pipeline.engine import build_engine
from pipeline.errors import JobFileError, ModelError, ResourceError
from pipeline.footprint import Footprint
from pipeline.host_memory import HostMemory
from pipeline.memory_limit import MemoryLimit
from pipeline.model import load_model
from pipeline.placement import (
    Gpu,
    check_memory,
    devices_of,
    is_spilled,
    lacking_gpus,
    place_names,
    shortage,
)
from pipeline.records import Sampling
from pipeline.room import Room
from pipeline.settings import EngineSettings, ModelSettings
from pipeline.stepping import replays_right
from tests.bare_models import LLAMA
from tests.engines import requests_for, run
from tests.models import load, make_llama, make_model
from tests.small_jobs import questions, shardmill, write_job

GIB = 2**30
HOST = HostMemory(total=64 * GIB, available=32 * GIB)
NEED = Footprint(weights=16 * GIB, cache_per_token=0)


def gpus(*free: float) -> list[Gpu]:
    """GPUs 2, 3, … with so many GiB free."""
    return [Gpu(str(index + 2), int(size * GIB)) for index, size in enumerate(free)]


def make_huge(folder: Path, source: Path) -> Path:
    """A model of 1.5 TiB in bfloat16, of which the disk holds nothing."""
    shutil.copytree(source, folder)
    size = 3 * 2**38
    entry = {"dtype": "BF16", "shape": [size], "data_offsets": [0, 2 * size]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * size)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


@pytest.mark.parametrize(
    ("there", "offload", "words"),
    [
        (gpus(24), "none", None),
        (gpus(10, 10), "none", None),
        (gpus(16), "none", None),  # within what the estimate may be wrong by
        (
            gpus(10.2),
            "none",
            "needs about 16.0 GiB for its weights, but GPU 2 has 10.2 GiB free: set "
            "workers.gpus_per_worker to 2 or more, or "
            "model.quantization, or, of plain weights, model.offload to cpu",
        ),
        (gpus(5, 4), "none", "GPU 2 has 5.0 GiB free and GPU 3 has 4.0 GiB free: set workers.gp"),
        (gpus(5, 4), "none", "workers.gpus_per_worker to 4 or more"),
        (gpus(5), "cpu", None),
        (gpus(5), "disk", None),
        ([], "none", None),
        ([], "disk", None),
    ],
)
def test_what_fits_on_gpus(there: list[Gpu], offload: str, words: str | None) -> None:
    """All GPUs of a worker count together, with the machine's memory if that is asked for."""
    problem = shortage(NEED, 1, offload, there, HOST)
    assert problem is None if words is None else words in str(problem)


@pytest.mark.parametrize(
    ("host", "num_workers", "is_mapped", "words"),
    [
        (HostMemory(64 * GIB, 10 * GIB), 1, False, "this machine has 10.0 GiB free: lower"),
        (HostMemory(64 * GIB, 20 * GIB), 3, False, None),
        (
            HostMemory(64 * GIB, 60 * GIB),
            5,
            False,
            "about 72.0 GiB of this machine's memory in 5 workers, but",
        ),
        (HostMemory(64 * GIB, 60 * GIB), 5, True, None),
        (HostMemory(15 * GIB, 15 * GIB), 80, True, None),
    ],
)
def test_what_fits_on_a_machine(
    host: HostMemory, num_workers: int, is_mapped: bool, words: str | None
) -> None:
    """Without a GPU: one worker in what is free, all of them in what there is.

    Weights that are used as they lie in their files are there once for all workers.
    """
    need = Footprint(NEED.weights, NEED.cache_per_token, is_mapped)
    problem = shortage(need, num_workers, "none", [], host)
    assert problem is None if words is None else words in str(problem)


def test_workers_that_spill_share_a_machine() -> None:
    """What does not fit on the GPUs of each is in the machine's memory once for each."""
    there = gpus(8)
    assert shortage(NEED, 8, "cpu", there, HostMemory(64 * GIB, 60 * GIB)) is None
    problem = shortage(NEED, 12, "cpu", there, HostMemory(64 * GIB, 60 * GIB))
    assert "about 76.8 GiB of this machine's memory in 12 workers" in str(problem)
    assert shortage(NEED, 12, "disk", there, HostMemory(64 * GIB, 60 * GIB)) is None


def lie_in(model: Any, path: Path) -> bool:
    """Whether all weights are at addresses where this file is mapped."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [entry[0].split("-") for entry in maps if entry[-1] == str(path)]
    return all(
        any(int(start, 16) <= parameter.data_ptr() < int(end, 16) for start, end in spans)
        for parameter in model.parameters()
    )


def test_weights_are_shared_only_as_they_are(tmp_path: Path) -> None:
    """Used where the file is mapped, which all workers share; of another type or quantized, copied.

    The estimate knows which of both it will be.
    """
    folder = make_llama(tmp_path / "model", dtype="float32")
    for settings, is_mapped in (
        ({}, True),
        ({"dtype": "float32"}, True),
        ({"dtype": "bfloat16"}, False),
        ({"quantization": "nf4"}, False),
    ):
        block = ModelSettings.model_validate({"path": str(folder), **settings})
        assert placement.estimate_footprint(fetch(block), block).is_mapped == is_mapped, settings
        model = load_model(fetch(block), block, num_threads=1).model
        assert lie_in(model, folder / "model.safetensors") == is_mapped, settings


def test_gpus_that_torch_does_not_see(tmp_path: Path) -> None:
    """A driver too old for this torch would have the job done by one thread of a CPU, overnight."""
    num_gpus = torch.cuda.device_count() + 1
    with pytest.raises(ResourceError, match=f"was given {num_gpus} GPU"):
        lacking_gpus(num_gpus, signs=[tmp_path / "none", tmp_path])
    [note] = lacking_gpus(num_gpus, signs=[tmp_path / "none"])
    assert "it works on the CPU" in note
    assert lacking_gpus(num_gpus - 1, signs=[tmp_path]) == ()


def test_a_huge_model_is_refused_before_it_is_loaded(tmp_path: Path, llama_folder: Path) -> None:
    """A real run ends with 69 and the numbers; with the weights read, it would have no end."""
    folder = make_huge(tmp_path / "huge", llama_folder)
    job = write_job(tmp_path, folder, questions(5), generation={"max_new_tokens": 100})
    result = shardmill("run", job)
    assert result.code == 69, result.stderr
    assert "needs about 1,536.0 GiB for its weights, " in result.stderr
    assert "but this machine has" in result.stderr
    assert "Traceback" not in result.stderr
    tried = shardmill("try", job)
    assert tried.code == 69
    assert "needs about 1,536.0 GiB" in tried.stderr
    assert "DOES NOT FIT" in shardmill("plan", job).stdout


def test_offload_needs_a_gpu(llama_folder: Path) -> None:
    """Into the memory where everything is anyway."""
    block = ModelSettings(path=str(llama_folder), offload="cpu")
    with pytest.raises(ResourceError, match=r"model\.offload is cpu.*has no GPU"):
        check_memory(fetch(block), block, 1)


@pytest.mark.parametrize(
    "rival", ["quantization: nf4", "adapter: org/lora", "gguf_file: model.gguf"]
)
def test_offload_goes_with_plain_weights(tmp_path: Path, rival: str) -> None:
    """What cannot be done is refused by the job file already."""
    path = tmp_path / "job.yaml"
    path.write_text(
        "{name: t, input: {path: x}, prompt: {template: x}, output: {path: o}, "
        f"model: {{path: org/name, offload: cpu, {rival}}}}}"
    )
    with pytest.raises(JobFileError, match=f"goes only without '{rival.partition(':')[0]}'"):
        load_job(path)


def test_offload_of_stored_quantized_weights_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    """Which method it is, the model's files say."""
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.offload is 'disk'.*quantized \(fp8\)"):
        fetch(ModelSettings(path=str(folder), offload="disk"))


def short_of_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """A machine with so much memory left for weights."""
    available = int(num_bytes / placement.OFFLOADED_SHARE)
    monkeypatch.setattr(placement, "host_memory", lambda: HostMemory(available, available))


@pytest.mark.parametrize(
    ("kind", "room", "places"),
    [
        ("continuous", 2, {"cpu", "disk"}),
        ("continuous", 1000, {"disk"}),
        ("static", 2, {"cpu", "disk"}),
        ("static", 1000, {"disk"}),
    ],
)
def test_weights_on_disk_give_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, room: int, places: set[str]
) -> None:
    """Layers for which there is no room are read from the model's files at every step.

    Of all weights there is room for half, or for nothing. No such step is recorded.
    """
    folder = make_llama(tmp_path / "model", num_hidden_layers=6)
    plain = load(folder)
    short_of_memory(monkeypatch, plain.num_weight_bytes // room)
    block = ModelSettings(path=str(folder), offload="disk")
    offloaded = load_model(fetch(block), block, num_threads=1)
    assert set(offloaded.model.hf_device_map.values()) == places
    assert f" on {' and '.join(sorted(places))}, loaded" in offloaded.summary
    assert offloaded.devices == (torch.device("cpu"),)
    recorded: list[str] = []
    assert not replays_right(offloaded, lambda: recorded.append("a step"))  # type: ignore
    assert recorded == []
    settings = EngineSettings(kind=kind, batch_size=4)
    requests = requests_for(plain, Sampling(12))
    expected = run(build_engine(plain, settings), requests)
    engine = build_engine(offloaded, settings)
    assert isinstance(engine, ContinuousEngine) == (kind == "continuous")
    assert run(engine, requests) == expected
    assert {completion.error for completion in expected} == {None}


def test_weights_that_no_file_holds_are_not_read_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are put together while loading: on disk they would be a second copy of the model."""
    config = MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1)
    folder = make_model(tmp_path / "model", config)
    short_of_memory(monkeypatch, 1000)
    block = ModelSettings(path=str(folder), offload="disk")
    with pytest.raises(ModelError, match=r"at every step: set model\.offload to cpu"):
        load_model(fetch(block), block, num_threads=1)


@pytest.mark.parametrize(
    ("where", "offload", "is_refused"),
    [
        ({"cpu"}, "none", False),
        ({0, 1}, "none", False),
        ({0, "disk"}, "none", True),
        ({0, "disk"}, "cpu", True),
        ({0, "cpu"}, "cpu", False),
        ({0, "cpu", "disk"}, "disk", False),
    ],
)
def test_weights_lie_where_it_was_asked_for(where: Any, offload: Any, is_refused: bool) -> None:
    """Where accelerate has put them in the end is looked at again."""
    model: Any = SimpleNamespace(hf_device_map=dict(enumerate(where)))
    settings = ModelSettings(path="org/name", offload=offload)
    assert is_spilled(model, settings) == is_refused


def test_devices_stand_in_order() -> None:
    """Tokens go in at the first GPU, whatever the order of layers, and ten comes after two."""
    model: Any = SimpleNamespace(hf_device_map=dict(enumerate([10, 2, "disk", 0, "cpu"])))
    assert devices_of(model) == tuple(torch.device("cuda", index) for index in (0, 2, 10))
    assert place_names(model) == "cuda:0, cuda:2, cuda:10, cpu and disk"


def test_disk_is_not_taken_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for the weights is a refusal, and the sentence says what would do."""
    folder = make_llama(tmp_path / "model", num_hidden_layers=6)
    block = ModelSettings(path=str(folder))
    short_of_memory(monkeypatch, 1000)
    with pytest.raises(ResourceError, match=r"model\.offload to disk"):
        load_model(fetch(block), block, num_threads=1)


def test_each_device_has_room_for_its_own_layers() -> None:
    """The tokens that fit are those of the device that has least room for its part of each."""
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    room = Room(64, {one: 1000, other: 300}, MemoryLimit())
    room.set_token_bytes({one: 4, other: 2})
    assert room.max_tokens == 150
    together = Room(64, 1200, MemoryLimit())
    together.set_token_bytes({one: 4, other: 2})
    assert together.max_tokens == 200
