"""Checkpoints of the hub: what is downloaded, found in the cache, or refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from pipeline.checkpoint import fetch
from pipeline.errors import ModelError
from pipeline.settings import ModelSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of a model, free to be broken."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def response(status: int) -> Any:
    """An answer of the hub."""
    # Made with the HTTP library that this version of the client uses.
    base = errors.HfHubHTTPError.__bases__[0]
    library = sys.modules[base.__module__.partition(".")[0]]
    return library.Response(status, request=library.Request("GET", "https://hub.test/x"))


@pytest.mark.parametrize(
    ("path", "failure", "words"),
    [
        ("org/name", lambda: errors.GatedRepoError("x", response=response(403)), ["gated"]),
        ("org/name", lambda: errors.RepositoryNotFoundError("x", response=response(404)), ["name"]),
        (
            "org/name",
            lambda: errors.RevisionNotFoundError("x", response=response(404)),
            ["model.revision 'v9'"],
        ),
        ("org/name", lambda: errors.LocalEntryNotFoundError("x"), ["out of reach"]),
        ("org/name", lambda: errors.HfHubHTTPError("503 x", response=response(503)), ["503 x"]),
        ("org/name", lambda: OSError(28, "No space left on device"), ["No space left"]),
        ("org/na me", lambda: errors.HFValidationError("x"), ["neither a folder", "hub id"]),
        ("runs/model/best", lambda: errors.LocalEntryNotFoundError("x"), ["neither a folder"]),
        (
            "./model",
            lambda: errors.RepositoryNotFoundError("x", response=response(404)),
            ["folder"],
        ),
    ],
)
def test_what_is_wrong_with_a_hub_model(
    monkeypatch: pytest.MonkeyPatch, path: str, failure: Callable[[], Exception], words: list[str]
) -> None:
    """Each failure of the hub is one sentence that names the model or the setting."""

    def fail(*args: Any, **kwargs: Any) -> str:
        raise failure()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError) as caught:
        fetch(ModelSettings(path=path, revision="v9"))
    assert all(word in str(caught.value) for word in [*words, path])


def test_a_hub_model_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a connection, a hub model is taken from the cache, and its commit is known."""
    cached = tmp_path / "hub" / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    checkpoint = fetch(ModelSettings(path="org/name"), local_files_only=True)
    assert checkpoint.revision == COMMIT
    assert checkpoint.digest == fetch(ModelSettings(path=str(folder))).digest
    with pytest.raises(ModelError, match="not whole, in its hub cache"):
        fetch(ModelSettings(path="org/other"), local_files_only=True)


@pytest.mark.parametrize(
    ("settings", "num_downloads", "expected"),
    [
        ({}, 1, {"pytorch_model-1.bin": False, "modeling.py": False, "model.safetensors": True}),
        ({"allow_pickle": True}, 2, {"pytorch_model-1.bin": True}),
        ({"trust_remote_code": True, "revision": COMMIT}, 1, {"modeling.py": True}),
    ],
)
def test_only_what_is_needed_is_downloaded(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    num_downloads: int,
    expected: dict[str, bool],
) -> None:
    """Pickle weights only with consent and where there are no others; code only if trusted."""
    calls: list[list[str]] = []

    def download(repo_id: str, allow_patterns: list[str], **kwargs: Any) -> str:
        calls.append(allow_patterns)
        if len(calls) == 2:
            (folder / "pytorch_model-1.bin").write_bytes(b"pickle")
        return str(folder)

    if num_downloads == 2:
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"w": "pytorch_model-1.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetch(ModelSettings(path="org/name", **settings))
    assert len(calls) == num_downloads
    for name, is_wanted in expected.items():
        chosen = list(huggingface_hub.utils.filter_repo_objects([name], allow_patterns=calls[-1]))
        assert bool(chosen) == is_wanted
    assert not list(
        huggingface_hub.utils.filter_repo_objects(
            ["consolidated.safetensors", "tf_model.h5", "onnx/model.onnx"], allow_patterns=calls[-1]
        )
    )


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12]])
def test_hub_code_needs_a_commit(revision: str | None) -> None:
    """Code from the hub is only run at a commit, which nobody can move."""
    settings = ModelSettings(path="org/name", trust_remote_code=True, revision=revision)
    with pytest.raises(ModelError, match="40 hexadecimal digits"):
        fetch(settings)
