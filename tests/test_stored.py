"""Checkpoints that are stored quantized: each made on the spot, and run through whole jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.quantized_models import CALIBRATED
from benchmarks.quantized_models import KINDS as SAVE
from pipeline.checkpoint import fetch
from pipeline.continuous_engine import ContinuousEngine
from pipeline.engine import build_engine
from pipeline.errors import ModelError
from pipeline.footprint import estimate_footprint
from pipeline.records import Request, RequestId, Sampling
from pipeline.settings import EngineSettings, ModelSettings
from tests.engines import run
from tests.models import load
from tests.small_jobs import read_output, shardmill, write_job

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"
GPTQMODEL = (
    pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs gptqmodel"),
    # It leaves a temporary folder to the interpreter's end.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.timeout(400),
)
KINDS = [
    "bitsandbytes-int8",
    "bitsandbytes-nf4",
    "torchao",
    "gguf",
    "compressed-tensors",
    "fp8",
    pytest.param("gptq", marks=GPTQMODEL),
    pytest.param("awq", marks=GPTQMODEL),
]
METHODS = {"bitsandbytes-int8": "bitsandbytes", "bitsandbytes-nf4": "bitsandbytes"}
PROMPTS = "prompts-0.parquet"
NUM_QUESTIONS, LEAST_RIGHT = 40, 38
"""The plain model has all of them right, and a quantized one of its size nearly all."""
EVERY_JOB = "SHARDMILL_TEST_EVERY_MODEL" in os.environ
"""Whole jobs with every kind take minutes."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of quantized copies of the quickstart model; each is made when first asked for."""
    return tmp_path_factory.mktemp("quantized")


def make(made: Path, kind: str) -> Path:
    """One copy; gptqmodel changes what other libraries do, so it has a process of its own."""
    folder = made / kind
    if folder.exists():
        return folder
    if kind in CALIBRATED:
        command = [sys.executable, "-m", "benchmarks.quantized_models"]
        command += [str(QUICKSTART / "model"), str(made), "--only", kind]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        # Not in the project's folder: gptqmodel writes logs where it is.
        subprocess.run(command, cwd=made, env=environment, check=True, capture_output=True)
        return folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SAVE[kind](QUICKSTART / "model", folder)
    return folder


def settings_of(folder: Path) -> dict[str, str]:
    """The model block of a copy."""
    names = [path.name for path in folder.glob("*.gguf")]
    return {"path": str(folder), **({"gguf_file": names[0]} if names else {})}


def questions() -> pa.Table:
    """Some of the quickstart's, all of which its model answers right."""
    return pq.read_table(QUICKSTART / "prompts" / PROMPTS).slice(0, NUM_QUESTIONS)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # optimum's, of transformers
@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_model_answers_as_it_was_trained(made: Path, kind: str) -> None:
    """Recognized without a setting, fit for the continuous engine, and of the size estimated."""
    settings = ModelSettings(**settings_of(make(made, kind)))
    checkpoint = fetch(settings)
    model = load(Path(settings.path), gguf_file=settings.gguf_file)
    assert checkpoint.quantization == model.quantization == METHODS.get(kind, kind)
    assert model.num_parameters == pytest.approx(902_272, rel=0.02)
    estimate = estimate_footprint(checkpoint, settings)
    assert estimate.weights == pytest.approx(model.num_weight_bytes, rel=0.15)
    engine = build_engine(model, EngineSettings())
    assert type(engine) is ContinuousEngine
    asked = questions().to_pylist()
    prompts = [f"<|user|>{row['question']}<|end|><|assistant|>" for row in asked]
    requests = [
        Request(RequestId(0, row, 0), tuple(model.tokenizer.encode(prompt)), Sampling(64))
        for row, prompt in enumerate(prompts)
    ]
    completions = run(engine, requests)
    num_right = sum(
        done.text == row["expected"] for done, row in zip(completions, asked, strict=True)
    )
    assert num_right >= LEAST_RIGHT


@pytest.mark.parametrize("kind", KINDS if EVERY_JOB else ["compressed-tensors"])
def test_a_stored_model_runs_a_whole_job(made: Path, tmp_path: Path, kind: str) -> None:
    """From `fetch` in the driver to the parts, in a worker of its own."""
    folder = make(made, kind)
    job = write_job(
        tmp_path,
        folder,
        questions(),
        prompt={"template": "{{ question }}", "chat_template": True},
        generation={"max_new_tokens": 64},
        workers={"count": 1},
        engine={"kind": "continuous"},
    )
    settings = [f"--set=model.{name}={value}" for name, value in settings_of(folder).items()]
    done = shardmill("run", job, *settings)
    assert done.code == 0, done.stderr
    output = read_output(tmp_path / "out")
    pairs = zip(*(output[name].to_pylist() for name in ("completion", "expected")), strict=True)
    assert sum(completion == expected for completion, expected in pairs) >= LEAST_RIGHT


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_cannot_be_merged(llama_folder: Path, tmp_path: Path, method: str) -> None:
    """peft would say so only in the workers, and of AWQ by nothing but a type."""
    folder = store_as(method, llama_folder, tmp_path / "model")
    with pytest.raises(ModelError, match=f"stored as {method}: leave merge out"):
        fetch(ModelSettings(path=str(folder), adapter={"path": "org/name", "merge": True}))


def store_as(method: str, source: Path, folder: Path) -> Path:
    """A copy of a model that says it is stored so."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_method_nobody_knows(llama_folder: Path, tmp_path: Path) -> None:
    """transformers would load it as if it were not quantized, and answer nonsense."""
    folder = store_as("magic", llama_folder, tmp_path / "model")
    with pytest.raises(ModelError, match="stored as magic, a method that transformers does not"):
        load(folder)


@pytest.mark.parametrize(
    ("method", "command"),
    [
        ("gptq", "gptqmodel and optimum.*pip install 'shardmill.gptq.'"),
        ("awq", "pip install 'shardmill.gptq.'"),
        ("compressed-tensors", "compressed_tensors.*pip install 'shardmill.compressed-tensors.'"),
        ("torchao", "pip install 'shardmill.torchao.'"),
    ],
)
def test_a_missing_package_is_one_sentence(
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    command: str,
) -> None:
    """Before Ray starts, with the command that helps."""
    monkeypatch.setattr("pipeline.extras.find_spec", lambda name: None)
    folder = store_as(method, llama_folder, tmp_path / "model")
    with pytest.raises(ModelError, match=f"is stored as {method}, which needs .*{command}"):
        fetch(ModelSettings(path=str(folder)))
