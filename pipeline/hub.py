"""A model of the Hugging Face hub -> a folder in the local cache. Knows nothing of its content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.settings import ModelSettings

SMALL_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
CODE_PATTERNS = ("*.py",)
SAFETENSORS_PATTERNS = ("model*.safetensors",)  # not consolidated.safetensors: the same again
PICKLE_PATTERNS = ("pytorch_model*.bin",)


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
    # Importing it takes a good part of a second, and a model in a folder needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*SMALL_PATTERNS, *SAFETENSORS_PATTERNS]
    patterns += CODE_PATTERNS if settings.trust_remote_code else ()
    patterns += PICKLE_PATTERNS if allow_pickle else ()
    # One of the bases is the HTTP library's own error, whichever library this version uses.
    expected: Any = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
    try:
        return Path(
            snapshot_download(
                settings.path,
                revision=settings.revision,
                allow_patterns=patterns,
                local_files_only=local_files_only,
            )
        )
    except expected as error:
        raise ModelError(_sentence(settings, error, local_files_only)) from error


def _sentence(settings: ModelSettings, error: Exception, local_files_only: bool) -> str:
    from huggingface_hub import errors

    name = f"model.path {settings.path!r}"
    if isinstance(error, errors.HFValidationError) or _looks_like_path(settings.path):
        return f"{name} is neither a folder on this machine nor a hub id such as 'org/name'."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"model.revision {settings.revision!r} is no branch, tag or commit of {name}."
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
            f"`hf download {settings.path}`."
        )
    return f"{name} cannot be downloaded from the hub: {error}"


def _looks_like_path(path: str) -> bool:
    return path.startswith((os.sep, ".", "~")) or path.count("/") > 1
