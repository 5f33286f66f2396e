"""A model of the Hugging Face hub -> a folder in the local cache. Knows nothing of its content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.settings import ModelSettings

SMALL_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
CODE_PATTERNS = ("*.py",)
SAFETENSORS_PATTERNS = ("model*.safetensors",)  # not consolidated.safetensors: the same again
PICKLE_PATTERNS = ("pytorch_model*.bin",)
ADAPTER_PATTERNS = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_PICKLE_PATTERNS = ("adapter_model.bin",)


def download(settings: ModelSettings, *, allow_pickle: bool, local_files_only: bool) -> Path:
    """The folder of a hub model, named after the commit; what the cache has is not fetched again.

    Several processes may ask at once: the hub's client locks each file.

    Args:
        settings: with a hub id as path.
        allow_pickle: fetch pickle weights too.
        local_files_only: take it from the cache, or fail.

    Raises:
        ModelError: no such model or revision, no access to it, or no connection.
    """
    patterns = [*SMALL_PATTERNS]
    patterns += SAFETENSORS_PATTERNS if settings.gguf_file is None else (settings.gguf_file,)
    patterns += CODE_PATTERNS if settings.trust_remote_code else ()
    patterns += PICKLE_PATTERNS if allow_pickle else ()
    return _snapshot("model.path", settings.path, settings.revision, patterns, local_files_only)


def download_adapter(path: str, *, allow_pickle: bool, local_files_only: bool) -> Path:
    """The folder of a hub adapter, likewise.

    Args:
        path: hub id, perhaps with `@` and a branch, tag or commit.
    """
    patterns = [*ADAPTER_PATTERNS, *(ADAPTER_PICKLE_PATTERNS if allow_pickle else ())]
    hub_id, _, revision = path.partition("@")
    return _snapshot("model.adapter", hub_id, revision or None, patterns, local_files_only)


@contextmanager
def download_lock(hub_id: str) -> Iterator[None]:
    """Lets one process at a time in, of those that share a cache; it goes with its process.

    Raises:
        ModelError: the cache cannot be written.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    folder = Path(constants.HF_HUB_CACHE) / ".locks"  # where the hub's client has its own
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"shardmill--{hub_id.replace('/', '--')}.lock"
            held.enter_context(WeakFileLock(folder / name))
        except OSError as error:
            raise ModelError(
                f"{hub_id!r} is not in the hub's cache, which cannot be written: {error}"
            ) from error
        yield


def go_offline() -> None:
    """Keeps all of this process from asking the hub: what it needs is there by now."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True  # read from the environment when it was imported


def _snapshot(
    setting: str, path: str, revision: str | None, patterns: list[str], local_files_only: bool
) -> Path:
    # Importing it takes a good part of a second, and a model in a folder needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # One of the bases is the HTTP library's own error, whichever library this version uses.
    expected: Any = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=local_files_only,
            )
        )
    except expected as error:
        raise ModelError(_sentence(setting, path, revision, error, local_files_only)) from error


def _sentence(
    setting: str, path: str, revision: str | None, error: Exception, local_files_only: bool
) -> str:
    from huggingface_hub import errors

    name = f"{setting} {path!r}"
    if isinstance(error, errors.HFValidationError) or _looks_like_path(path):
        return f"{name} is neither a folder on this machine nor a hub id such as 'org/name'."
    if isinstance(error, errors.RevisionNotFoundError):
        where = "model.revision " if setting == "model.path" else ""
        return f"{where}{revision!r} is no branch, tag or commit of {name}."
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: accept its terms on its hub page, and log in with `hf auth login` "
            "or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name} is neither a folder on this machine nor a model of the hub that you may "
            "read: check the name, or log in with `hf auth login` if it is private."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        wanted = "it was to be taken from there" if local_files_only else "the hub is out of reach"
        return (
            f"{name} is no folder on this machine and is not, or not whole, in its hub cache, and "
            f"{wanted}: check the name and the connection, or download it first with "
            f"`hf download {path}`."
        )
    return f"{name} cannot be downloaded from the hub: {error}"


def is_hub_id(path: str) -> bool:
    """Whether a model or adapter of this name is looked for on the hub."""
    return not Path(path).expanduser().exists() and not _looks_like_path(path)


def _looks_like_path(path: str) -> bool:
    return path.startswith((os.sep, ".", "~")) or path.count("/") > 1
