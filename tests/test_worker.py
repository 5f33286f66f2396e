"""The actor's own code, called without Ray."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import pipeline.model
from jobs import beacon
from jobs.beacon import light
from jobs.config import load_job
from jobs.opening import open_or_create
from jobs.prepare import prepare_job
from jobs.worker import Worker, WorkerSpec
from pipeline.errors import InputError, ResourceError
from pipeline.folder import RunFolder
from tests.small_jobs import questions, write_job


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The log that a worker opens goes with its process; here it would stay."""
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(root, "handlers", [])
    yield
    root.setLevel(level)
    for handler in root.handlers:
        handler.close()


def _spec(job_file: Path) -> WorkerSpec:
    job = load_job(job_file)
    prepared = prepare_job(job, job_file.parent / "staging")
    folder = job_file.parent / "out"
    folder.mkdir()
    ledger = open_or_create(folder, prepared.manifest())
    return WorkerSpec(
        prompt=job.prompt,
        model=job.model,
        model_digests=prepared.checkpoint.digests,
        engine=job.engine,
        sampling=prepared.sampling,
        seed=0,
        num_samples=1,
        run_folder=folder,
        beacon=light(ledger.folder),
        memory_file=ledger.folder.memory,
        fingerprint=ledger.manifest.fingerprint,
        output_schema=ledger.manifest.arrow_schema,
        passed_columns=prepared.passed_columns,
        started=datetime.now(UTC),
        input_stamps=prepared.inputs.stamps,
        num_gpus=1,  # or it would hide those of this process
        num_threads=2,
    )


def test_a_worker_without_gpus_sees_none(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node of a cluster whose GPUs are others'; Ray leaves them visible."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "4,5")
    spec = _spec(write_job(tmp_path, llama_folder, questions(1)))
    Worker(0, spec)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
    Worker(0, replace(spec, num_gpus=0))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == os.environ["HIP_VISIBLE_DEVICES"] == ""


def test_no_thread_but_the_engines_has_computed(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP keeps threads for each thread that has; of two such, both sleep between products."""
    threads: list[threading.Thread] = []
    load_model = pipeline.model.load_model

    def noting(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return load_model(*args, **options)

    monkeypatch.setattr(pipeline.model, "load_model", noting)
    Worker(0, _spec(write_job(tmp_path, llama_folder, questions(4)))).load()
    (thread,) = threads
    assert not thread.is_alive()


READ = """
import pickle, sys
info = pickle.load(sys.stdin.buffer)
print(info.self_check["batches"], sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_the_driver_reads_answers_without_torch(tmp_path: Path, llama_folder: Path) -> None:
    """A value whose class is the engine's would have the driver import all of it."""
    info = Worker(0, _spec(write_job(tmp_path, llama_folder, questions(4)))).load()
    command = [sys.executable, "-c", READ]
    read = subprocess.run(command, input=pickle.dumps(info), capture_output=True, check=True)
    assert read.stdout == b"slots []\n"


def test_a_node_must_see_the_run_folder_and_the_input(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it sees at the same path may be a folder of its own, even a copy of the right one."""
    monkeypatch.setattr(beacon, "PATIENCE", 0.0)
    spec = _spec(write_job(tmp_path, llama_folder, questions(4)))
    node = socket.gethostname()
    assert Worker(0, spec).place() == node
    shutil.copytree(spec.run_folder, tmp_path / "copy")
    light(RunFolder(spec.run_folder))
    with pytest.raises(ResourceError, match=f"node {node} has another folder at .*out"):
        Worker(0, spec).place()
    with pytest.raises(ResourceError, match=f"node {node} sees no such run folder at .*gone"):
        Worker(0, replace(spec, run_folder=tmp_path / "gone")).place()
    copied = replace(spec, run_folder=tmp_path / "copy", input_stamps={"/gone.parquet": ""})
    with pytest.raises(InputError, match=rf"node {node} has no '/gone\.parquet'"):
        Worker(0, copied).place()
