"""Hub models through real processes and real runs, from a hub on this machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest
import ray
import yaml
from huggingface_hub import HfApi, constants, errors

from jobs.cluster import WorkerShape
from jobs.crew import Crew
from jobs.events import Event, WorkerReady
from jobs.worker import Worker
from pipeline.checkpoint import fetch
from pipeline.settings import ModelSettings
from tests.fake_hub import COMMIT, HUB_ID, FakeHub, fake_hub
from tests.run_folders import SmallJob
from tests.small_jobs import Result, finish, questions, shardmill, start, write_job
from tests.test_crew import worker_spec

pytestmark = pytest.mark.timeout(300)

CANARY = "hf_canaryQ7b2K9xWz4Lm8Tn3Vr6Yp1Sd5"


@pytest.fixture
def hub(llama_folder: Path) -> Iterator[FakeHub]:
    """A hub that gives its model to nobody without the token."""
    with fake_hub(llama_folder, CANARY) as served:
        yield served


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for Ray, whose path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="sm", dir="/tmp"))
    yield folder
    rmtree(folder, ignore_errors=True)


def run_job(folder: Path, hub: FakeHub, **environment: str) -> Result:
    """A small job with the hub's model; the machine's own token does not count."""
    job = write_job(folder, Path(HUB_ID), questions(20))
    environment = {"HF_TOKEN": "", **hub.environment(folder / "home"), **environment}
    return finish(start("run", job, module="tests.keeping_ray", **environment))


def said(result: Result) -> list[str]:
    """The lines of standard error, but for the hub's own progress bar."""
    lines = result.stderr.strip().splitlines()
    return [line for line in lines if line and not line.startswith("Fetching ")]


def where_it_says(secret: str, *folders: Path) -> list[Path]:
    """The files with these bytes in them, or in their name."""
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes():
                found.append(path)
            if secret in path.name:
                found.append(path)
    return found


def test_the_token_is_used_and_written_nowhere(tmp_path: Path, hub: FakeHub, scratch: Path) -> None:
    """A real run with a gated model: not in the output, a log, metadata or Ray's session folder.

    The hub is asked by the driver alone, once for each file; the workers are offline.
    """
    result = run_job(tmp_path, hub, HF_TOKEN=CANARY, RAY_TMPDIR=str(scratch))
    assert result.code == 0, result.stderr
    assert {token for _, path, token in hub.requests if "/resolve/" in path} == {CANARY}
    assert hub.count("GET", "/revision/") == 1
    assert hub.count("GET", "model.safetensors") == 1
    assert list(scratch.rglob("raylet.out")), "Ray's session folder is elsewhere"
    assert where_it_says(CANARY, tmp_path, scratch) == []
    assert CANARY not in result.stdout + result.stderr
    # The search finds what is there.
    assert where_it_says(HUB_ID, tmp_path / "out")
    assert where_it_says("raylet", scratch)


@pytest.mark.parametrize("token", ["", "hf_other"])
def test_a_gated_model_is_one_sentence(tmp_path: Path, hub: FakeHub, token: str) -> None:
    """Without a token, or with one that has no access; and nothing is left of the run folder."""
    result = run_job(tmp_path, hub, HF_TOKEN=token)
    assert result.code == 65
    assert "is gated: accept its terms" in result.stderr
    assert "HF_TOKEN" in result.stderr
    assert len(said(result)) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_one_sentence(tmp_path: Path, hub: FakeHub) -> None:
    """The name is no model of the hub."""
    job = write_job(tmp_path, Path("org/other"), questions(3))
    result = shardmill("run", job, HF_TOKEN=CANARY, **hub.environment(tmp_path / "home"))
    assert result.code == 65
    assert "'org/other'" in result.stderr
    assert "check the name" in result.stderr
    assert len(said(result)) == 1
    assert CANARY not in result.stderr


@pytest.mark.filterwarnings("ignore:.is_gradient_ch:FutureWarning")  # peft's
def test_an_adapter_of_the_hub_is_of_one_commit(tmp_path: Path, llama_folder: Path) -> None:
    """Workers load what the driver has seen, wherever its branch points to by then."""
    pytest.importorskip("peft")
    from tests.lora import make_lora

    with fake_hub(make_lora(llama_folder, tmp_path / "lora")) as hub:
        job = write_job(tmp_path, llama_folder, questions(5))
        environment = hub.environment(tmp_path / "home")
        result = shardmill("run", job, "--set", f"model.adapter={HUB_ID}", **environment)
        assert result.code == 0, result.stderr
        resolved = yaml.safe_load((tmp_path / "out/.shardmill/job.yaml").read_text())
        assert resolved["model"]["adapter"]["path"] == f"{HUB_ID}@{COMMIT}"
        again = shardmill("run", job, "--set", f"model.adapter={HUB_ID}@{COMMIT}", **environment)
        assert again.code == 0, again.stderr
        missing = shardmill("run", job, "--set", f"model.adapter={HUB_ID}@old", **environment)
        assert missing.code == 65
        assert "'old' is no branch, tag or commit of model.adapter 'org/name'" in missing.stderr


def test_several_processes_download_once(tmp_path: Path, hub: FakeHub) -> None:
    """Workers of one node that lack a model: one asks the hub, the others wait for it."""
    program = (
        "import sys\n"
        "from pipeline.checkpoint import fetch_once\n"
        "from pipeline.settings import ModelSettings\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        f"print(fetch_once(ModelSettings(path={HUB_ID!r})).digest)\n"
    )
    environment = {**os.environ, **hub.environment(tmp_path), "HF_TOKEN": CANARY}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    hub.delay = 1.0
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    digests = {process.communicate(timeout=100)[0] for process in processes}
    assert digests == {fetch(ModelSettings(path=str(hub.folder))).digest + "\n"}
    assert hub.count("GET", "/revision/") == 1
    assert hub.count("GET", "model.safetensors") == 1


def test_a_worker_is_offline_once_it_has_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Path
) -> None:
    """Nothing in its process asks the hub any more, whatever a library makes of it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    settings = ModelSettings(path=str(llama_folder))
    try:
        Worker(0, worker_spec(SmallJob(tmp_path), settings, ())).fetch()
    finally:
        root.setLevel(level)
        for handler in root.handlers:
            handler.close()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(errors.OfflineModeIsEnabled):
        HfApi().model_info(HUB_ID)


def test_a_node_without_the_model_downloads_it_once(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node than the driver's: its first worker fetches the commit, with its own token."""
    for name, value in {**hub.environment(tmp_path / "home"), "HF_TOKEN": CANARY}.items():
        monkeypatch.setenv(name, value)
    spec = worker_spec(
        SmallJob(tmp_path),
        model=ModelSettings(path=HUB_ID, revision=COMMIT),
        digests=fetch(ModelSettings(path=str(hub.folder))).digests,
    )
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    crew = Crew(
        spec, WorkerShape(2, num_gpus=0, num_cpus=1, num_threads=1, most=2), stall_timeout=60
    )
    try:
        events: list[Event] = []
        deadline = time.monotonic() + 100
        while len(events) < 2 and time.monotonic() < deadline:
            crew.start()
            events += crew.wait(0.2)
        assert [type(event) for event in events] == [WorkerReady, WorkerReady]
    finally:
        crew.close()
        ray.shutdown()
    assert hub.count("GET", "model.safetensors") == 1
    assert {token for _, path, token in hub.requests if "/resolve/" in path} == {CANARY}
