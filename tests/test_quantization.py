"""Quantization while loading: what a job file may say, and what becomes of it."""

from __future__ import annotations

import inspect
import io
import json
import logging
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from jobs.config import job_schema, load_job
from jobs.logs import terminal_handler
from pipeline.checkpoint import fetch
from pipeline.engine import build_engine
from pipeline.errors import JobFileError, ModelError
from pipeline.extras import EXTRAS, require
from pipeline.footprint import estimate_footprint
from pipeline.quantization_settings import OPTIONS, QuantizationSettings
from pipeline.records import Sampling
from pipeline.settings import EngineSettings, ModelSettings
from tests.engines import requests_for, run
from tests.models import load, make_llama

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao.*")

JOB = """
name: test
input: {path: in.parquet}
prompt: {template: "{{ q }}"}
output: {path: out}
model: {path: org/name, quantization: %s}
"""


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose linear layers are most of it, in sizes that every method takes."""
    return make_llama(
        tmp_path_factory.mktemp("wide") / "model", hidden_size=128, intermediate_size=512
    )


def loaded_from(tmp_path: Path, quantization: str) -> QuantizationSettings:
    """The setting of a job file."""
    (tmp_path / "job.yaml").write_text(JOB % quantization)
    return load_job(tmp_path / "job.yaml").model.quantization


def test_a_word_is_a_block_without_options(tmp_path: Path) -> None:
    """Both are the same job, and the shorter one is recorded."""
    word, block = (loaded_from(tmp_path, text) for text in ("nf4", "{method: nf4}"))
    assert word == block
    assert ModelSettings(path="x", quantization=block).model_dump()["quantization"] == "nf4"


def test_options_reach_the_record(tmp_path: Path) -> None:
    """So that a job with other ones is another job."""
    block = loaded_from(tmp_path, "{method: nf4, bnb_4bit_use_double_quant: true}")
    dumped = ModelSettings(path="x", quantization=block).model_dump(mode="json")
    assert dumped["quantization"] == {"method": "nf4", "bnb_4bit_use_double_quant": True}
    assert ModelSettings.model_validate_json(json.dumps(dumped)).quantization == block


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ("int3", ["'model.quantization.method' must be 'none', 'int8'", "got 'int3'"]),
        ("5", ["'model.quantization' must be a block of settings, got 5"]),
        ("{bnb_4bit_use_double_quant: true}", ["'model.quantization.method' is missing"]),
        (
            "{method: nf4, double: true}",
            ["no setting 'model.quantization.double'", "known"],
        ),
        ("{method: nf4, group_size: 64}", ["group_size", "nf4 knows bnb_4bit_compute_dtype"]),
        ("{method: torchao-int4, group_size: 33}", ["model.quantization.group_size", "33"]),
        ("{method: nf4, bnb_4bit_compute_dtype: int8}", ["bnb_4bit_compute_dtype", "float32"]),
    ],
)
def test_wrong_options_get_a_sentence(tmp_path: Path, quantization: str, words: list[str]) -> None:
    """The setting, and what the method knows; before anything is loaded."""
    with pytest.raises(JobFileError) as caught:
        loaded_from(tmp_path, quantization)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_the_schema_takes_word_and_block() -> None:
    """Editors accept what the loader accepts."""
    validator = jsonschema.Draft202012Validator(job_schema())
    job: dict[str, Any] = {
        "name": "x",
        "input": {"path": "x"},
        "prompt": {"template": "x"},
        "output": {"path": "x"},
    }
    for value, is_right in (("nf4", True), ({"method": "fp4"}, True), ("x", False), ({}, False)):
        model = {"path": "x", "quantization": value}
        assert validator.is_valid({**job, "model": model}) == is_right


def test_every_option_is_one_of_the_library() -> None:
    """What the job file offers is what the methods' own configuration classes take."""
    from torchao.quantization import Int4WeightOnlyConfig

    known = {*inspect.signature(BitsAndBytesConfig).parameters}
    known |= {*inspect.signature(TorchAoConfig).parameters}
    known |= {*inspect.signature(Int4WeightOnlyConfig).parameters}
    offered = {name for names in OPTIONS.values() for name in names}
    assert offered <= known
    assert offered == set(QuantizationSettings.model_fields) - {"method"}


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"method": "int8", "llm_int8_skip_modules": ["down_proj", "lm_head"]}, None),
        ({"method": "nf4", "bnb_4bit_use_double_quant": True}, None),
        ({"method": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}, None),
        ("torchao-int8", torch.int8),
        ({"method": "torchao-int8", "group_size": 32}, torch.int8),
        ({"method": "torchao-fp8", "modules_to_not_convert": ["lm_head"]}, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_details_reach_the_layers(
    wide_folder: Path, quantization: dict[str, Any], bits: torch.dtype | None
) -> None:
    """Each option changes the loaded layers as its library says, and the estimate is near."""
    settings = QuantizationSettings.model_validate(quantization)
    model = load(wide_folder, quantization=settings)
    layer = model.model.model.layers[0].mlp
    options = settings.options
    if bits is not None:
        assert layer.up_proj.weight.qdata.dtype is bits
        if "group_size" in options:
            assert layer.up_proj.weight.scale.shape == (512, 128 // 32)
    if "llm_int8_skip_modules" in options:
        assert type(layer.down_proj) is torch.nn.Linear
        assert type(layer.up_proj) is not torch.nn.Linear
        return
    if "bnb_4bit_use_double_quant" in options:
        assert layer.up_proj.weight.quant_state.nested
    if "bnb_4bit_compute_dtype" in options:
        assert layer.up_proj.compute_dtype is torch.bfloat16
    block = ModelSettings(path=str(wide_folder), quantization=settings)
    estimate = estimate_footprint(fetch(block), block)
    assert model.num_weight_bytes == pytest.approx(estimate.weights, rel=0.1)
    assert model.num_weight_bytes < 0.6 * load(wide_folder).num_weight_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [method for method in OPTIONS if method != "none"])
def test_every_method_on_a_gpu(wide_folder: Path, method: str) -> None:
    """It loads in bfloat16 and answers on the continuous engine."""
    model = load(wide_folder, quantization=method, dtype="bfloat16")
    engine = build_engine(model, EngineSettings(kind="continuous"))
    completions = run(engine, requests_for(model, Sampling(8)))
    assert [completion.error for completion in completions] == [None] * len(completions)


def test_int4_of_torchao_needs_a_gpu(wide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU it has no kernels; the sentence names what runs instead."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ModelError, match="set it to nf4 or torchao-int8"):
        load(wide_folder, quantization="torchao-int4")


def test_a_missing_package_is_named_before_loading(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that installs it."""
    monkeypatch.setattr("pipeline.extras.find_spec", lambda name: None)
    for extra, modules in EXTRAS.items():
        with pytest.raises(ModelError, match=f"{modules[0]}.*pip install 'shardmill.{extra}.'"):
            require(extra, "this")
    with pytest.raises(ModelError, match="quantization torchao-int8 needs torchao"):
        fetch(ModelSettings(path=str(llama_folder), quantization="torchao-int8"))


def test_extras_are_those_of_the_project() -> None:
    """The command in the sentence works: pyproject.toml has each extra, with its packages."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        packages = " ".join(extras[extra]).replace("-", "_")
        assert all(module in packages for module in modules)


def test_a_library_that_is_only_imported_is_quiet() -> None:
    """torchao warns of missing kernels whenever transformers is imported; errors are shown."""
    stream = io.StringIO()
    handler = terminal_handler(stream, logging.INFO)
    for name in ("torchao.kernel.intmm", "torch.cuda"):
        for level, text in ((logging.WARNING, "warning"), (logging.ERROR, "error")):
            record = logging.LogRecord(name, level, __file__, 1, f"{name} {text}", None, None)
            handler.handle(record)
    assert stream.getvalue().split("shardmill: ")[1:] == [
        "torchao.kernel.intmm error\n",
        "torch.cuda warning\n",
        "torch.cuda error\n",
    ]
