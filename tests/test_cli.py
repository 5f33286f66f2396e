"""The command line as a user meets it: exit codes and sentences, no traceback, nothing written."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.cli import main
from tests.small_jobs import Result, questions, write_job


@pytest.fixture
def shardmill(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs a command in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["shardmill", *map(str, arguments)])
        # The handlers that a command adds go with its process; here they would stay.
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        with pytest.raises(SystemExit) as raised:
            main()
        out, err = capsys.readouterr()
        return Result(int(raised.value.code or 0), out, err)

    return call


@pytest.fixture
def job(tmp_path: Path, llama_folder: Path) -> Path:
    """A job that would run."""
    return write_job(tmp_path, llama_folder, questions(30))


def _files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _cut_short(folder: Path) -> None:
    content = (folder / "in.parquet").read_bytes()
    (folder / "in.parquet").write_bytes(content[: len(content) // 2])


def _as_text(folder: Path) -> None:
    (folder / "in.parquet").write_text("question\n1+1?\n")


def _no_rows(folder: Path) -> None:
    pq.write_table(questions(0), folder / "in.parquet")


def _other_schema_beside(folder: Path) -> None:
    (folder / "many").mkdir()
    pq.write_table(questions(1), folder / "many" / "a.parquet")
    pq.write_table(pa.table({"q": [1]}), folder / "many" / "b.parquet")


def _bad_jsonl(folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"q": "fine"}\n{"q": \n{"q": "fine"}\n')


def _nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize("command", ["run", "plan", "try"])
@pytest.mark.parametrize(
    ("spoil", "settings", "code", "words"),
    [
        (_nothing, ["input.path=gone.parquet"], 65, "gone.parquet"),
        (_nothing, ["input.path=*.gone.parquet"], 65, "gone.parquet"),
        (_cut_short, [], 65, "in.parquet"),
        (_as_text, [], 65, "in.parquet"),
        (_no_rows, [], 65, "no rows"),
        (_other_schema_beside, ["input.path=many"], 65, "b.parquet"),
        (_bad_jsonl, ["input.path=in.jsonl"], 65, "line 2"),
        (_nothing, ["prompt.template={{ qq }}"], 78, "'q'"),
        (_nothing, ["prompt.template={{ q "], 78, "template"),
        (_nothing, ["prompt={messages: turns}"], 78, "turns"),
        (_nothing, ["generation.max_new_tokens=128"], 78, "leaves no room"),
        (_nothing, ["generation.stop_token_ids=[3, 99999]"], 78, "stop_token_ids has 99999"),
        (_nothing, ["output.columns=[zz]"], 78, "'zz'"),
        (_nothing, ["model.path=./nowhere"], 65, "nowhere"),
        (_nothing, ["model.quantization=int3"], 78, "model.quantization"),
        (_nothing, ["model.trust_remote_code=true", "model.path=org/name"], 65, "revision"),
    ],
)
def test_bad_input_gets_a_sentence(
    shardmill: Callable[..., Result],
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    spoil: Callable[[Path], None],
    settings: list[str],
    code: int,
    words: str,
) -> None:
    """One sentence with the culprit in it, the right exit code, and the folder as it was."""
    monkeypatch.chdir(job.parent)
    spoil(job.parent)
    before = _files_below(job.parent)
    result = shardmill(command, job, *(part for text in settings for part in ("--set", text)))
    assert result.code == code, result.stderr
    message = result.stderr.splitlines()[-1]
    assert message.startswith("shardmill: ")
    assert words in message
    assert "Traceback" not in result.stderr
    assert _files_below(job.parent) == before


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["config.json"], "config.json"),
        (["tokenizer.json", "tokenizer_config.json"], "tokenizer"),
        (["model.safetensors"], "weights"),
    ],
)
def test_a_model_folder_that_lacks_something(
    shardmill: Callable[..., Result],
    job: Path,
    llama_folder: Path,
    missing: list[str],
    words: str,
) -> None:
    """The sentence names what is missing before any worker starts."""
    model = job.parent / "model"
    shutil.copytree(llama_folder, model)
    for name in missing:
        (model / name).unlink()
    result = shardmill("run", job, "--set", f"model.path={model}")
    assert result.code == 65
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (job.parent / "out").exists()


def test_a_model_whose_answers_are_wrong_is_refused(
    shardmill: Callable[..., Result], job: Path, llama_folder: Path
) -> None:
    """Before the first row, with what was tried; who wants it nevertheless can have it."""
    model = job.parent / "model"
    shutil.copytree(llama_folder, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    command = ["try", job, "-n", "1", "--set", f"model.path={model}"]
    result = shardmill(*command)
    assert result.code == 65
    assert "whatever is tried: with sdpa attention, a prompt alone makes" in result.stderr
    assert "Traceback" not in result.stderr
    result = shardmill(*command, "--set", "model.self_check=false")
    assert result.code == 0
    assert "nan: the model's output is not a number" in result.stdout


def test_a_chat_needs_a_chat_template(
    shardmill: Callable[..., Result], job: Path, llama_folder: Path
) -> None:
    """A base model is not sent chat turns in a made-up format."""
    base = job.parent / "base"
    shutil.copytree(llama_folder, base, ignore=shutil.ignore_patterns("*.jinja"))
    result = shardmill(
        "run", job, "--set", f"model.path={base}", "--set", "prompt.chat_template=true"
    )
    assert result.code == 65
    assert "chat template" in result.stderr


def test_somebody_elses_folder_is_left_alone(shardmill: Callable[..., Result], job: Path) -> None:
    """An output folder with other files in it is refused and not touched."""
    (job.parent / "out").mkdir()
    (job.parent / "out" / "thesis.tex").write_text("42")
    result = shardmill("run", job)
    assert result.code == 73
    assert "thesis.tex" in result.stderr
    assert _files_below(job.parent / "out") == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission(shardmill: Callable[..., Result], job: Path) -> None:
    """Exit code 73 and the system's reason."""
    locked = job.parent / "locked"
    locked.mkdir(mode=0o500)
    result = shardmill("run", job, "--output", locked / "out")
    assert result.code == 73
    assert "cannot be written" in result.stderr


def test_an_output_path_that_is_a_file(shardmill: Callable[..., Result], job: Path) -> None:
    """A file in the way is named and kept."""
    result = shardmill("run", job, "--output", job)
    assert result.code == 73
    assert "is a file" in result.stderr
    assert job.read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "a.yaml", "b.yaml"],
        ["walk", "a.yaml"],
        ["run", "a.yaml", "--limit", "0"],
        ["run", "a.yaml", "--max-walltime", "soon"],
    ],
)
def test_wrong_usage_exits_with_2(shardmill: Callable[..., Result], arguments: list[str]) -> None:
    """As every command-line program does."""
    assert shardmill(*arguments).code == 2


def test_a_plan_says_what_would_run(shardmill: Callable[..., Result], job: Path) -> None:
    """Rows, shards, prompt lengths, memory and the state of the output; nothing is written."""
    before = _files_below(job.parent)
    facts = json.loads(shardmill("plan", job, "--json").stdout)
    assert facts["rows"]["num_rows"] == 30
    assert 5 < facts["rows"]["prompt_tokens_median"] < 128
    assert facts["memory"]["weights"] > 0
    assert facts["state"] == "a new run"
    text = shardmill("run", job, "--dry-run").stdout
    assert "30 in 1 file" in text
    assert "fits" in text
    assert _files_below(job.parent) == before


def test_a_plan_for_a_run_here_sees_what_this_machine_lacks(
    shardmill: Callable[..., Result], job: Path
) -> None:
    """A run would end so after Ray's start; `plan` alone may be for another machine."""
    offloading = ("--set", "model.offload=cpu")
    result = shardmill("run", job, "--dry-run", *offloading)
    assert result.code == 69
    assert "this worker has no GPU" in result.stderr
    assert shardmill("plan", job, *offloading).code == 0


def test_try_shows_prompts_and_completions(shardmill: Callable[..., Result], job: Path) -> None:
    """The prompt with its special tokens and the streamed text; nothing is written."""
    before = _files_below(job.parent)
    facts: list[dict[str, Any]] = json.loads(shardmill("try", job, "-n", 2, "--json").stdout)
    assert [row["row_id"] for row in facts] == ["in.parquet#0", "in.parquet#1"]
    text = shardmill("try", job, "-n", 2).stdout
    for row in facts:
        assert row["prompt"] in text
        assert row["completion"] in text
    assert _files_below(job.parent) == before


def test_try_streams_what_the_row_will_have(shardmill: Callable[..., Result], job: Path) -> None:
    """A stop string never shows up in the stream, not even in part."""
    completion = json.loads(shardmill("try", job, "-n", 1, "--json").stdout)[0]["completion"]
    stop = completion[3:5]
    result = shardmill("try", job, "-n", 1, "--set", f"generation.stop={json.dumps([stop])}")
    shown = result.stdout.partition("--- completion\n")[2].partition("\n---")[0]
    assert shown == completion[: completion.index(stop)]


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_folder_without_a_run_is_refused(
    shardmill: Callable[..., Result], tmp_path: Path, command: str
) -> None:
    """Asking about the wrong folder is no traceback."""
    result = shardmill(command, tmp_path)
    assert result.code == 65
    assert str(tmp_path) in result.stderr


def test_schema_is_json(shardmill: Callable[..., Result]) -> None:
    """An editor can read it."""
    assert json.loads(shardmill("schema").stdout)["title"] == "JobConfig"


@pytest.mark.parametrize("error", [KeyError("x"), PermissionError(13, "Permission denied")])
def test_a_bug_is_called_one(
    shardmill: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """What nobody thought of shows its traceback and exits with 70, never with 0 or 1."""

    def broken() -> None:
        raise error

    monkeypatch.setattr("jobs.config.job_schema", broken)
    result = shardmill("schema")
    assert result.code == 70
    assert "Traceback" in result.stderr
    assert "bug" in result.stderr
