"""A model folder or hub id -> a `Checkpoint`: files that are there, whole and of a usable kind.

Everything here is settled before anything heavy starts, so it imports neither torch nor
transformers: it reads JSON, safetensors headers and samples of the weights.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.hub import download
from pipeline.model_files import (
    PICKLE,
    SAFETENSORS,
    check_header,
    digest,
    has_weights,
    read_json,
    weight_files,
)
from pipeline.settings import ModelSettings

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
COMMIT = re.compile(r"[0-9a-f]{40}")

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""Names for the longest sequence, as configurations have them; the first that is there counts."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine's disk.

    Attributes:
        source: what the job file says: a hub id or a folder.
        revision: the commit of a hub model; None for a folder.
        digest: of the files that decide the answers; other weights or templates, other digest,
            whatever the folder and the times of its files.
        context_length: tokens of prompt and completion together; None if the configuration
            does not say.
        generation_defaults: what `generation_config.json` says, or nothing.
    """

    source: str
    folder: Path
    revision: str | None
    digest: str
    context_length: int | None
    has_chat_template: bool
    generation_defaults: Mapping[str, object] = field(default_factory=dict)


def fetch(settings: ModelSettings, local_files_only: bool = False) -> Checkpoint:
    """Finds or downloads a model and checks it.

    Args:
        settings: the model block of a job.
        local_files_only: take a hub model from this machine's cache, or fail.

    Raises:
        ModelError: it is not there, not whole, or not to be loaded as the settings ask.
    """
    folder = Path(settings.path).expanduser()
    is_local = folder.is_dir()
    if is_local:
        _check_local(settings)
    else:
        folder = _download(settings, local_files_only)
    config = _check(settings, folder)
    return Checkpoint(
        source=settings.path,
        folder=folder,
        revision=None if is_local else folder.name,
        digest=digest(folder),
        context_length=_context_length(config),
        has_chat_template=_has_chat_template(folder),
        generation_defaults=read_json(folder / "generation_config.json"),
    )


def _check_local(settings: ModelSettings) -> None:
    if settings.revision is not None:
        raise ModelError(
            f"model.revision is {settings.revision!r}, but model.path {settings.path!r} is a "
            "folder, which has no revisions: leave model.revision out."
        )


def _download(settings: ModelSettings, local_files_only: bool) -> Path:
    if settings.trust_remote_code and not COMMIT.fullmatch(settings.revision or ""):
        raise ModelError(
            "model.trust_remote_code with a hub model needs model.revision to be a full commit of "
            f"40 hexadecimal digits, so that nobody can change the code; got {settings.revision!r}."
        )
    folder = download(settings, allow_pickle=False, local_files_only=local_files_only)
    if settings.allow_pickle and not has_weights(folder, SAFETENSORS):
        folder = download(settings, allow_pickle=True, local_files_only=local_files_only)
    return folder


def _check(settings: ModelSettings, folder: Path) -> dict[str, Any]:
    """Checks the files of a model; returns its `config.json`."""
    config = read_json(folder / "config.json")
    if not config:
        raise ModelError(
            f"model.path {settings.path!r} holds no config.json: it is not a transformers model."
        )
    _check_code(settings, config)
    _check_quantization(settings, config)
    _check_tokenizer(settings, folder)
    _check_weights(settings, folder)
    return config


def _check_code(settings: ModelSettings, config: Mapping[str, Any]) -> None:
    if config.get("auto_map") and not settings.trust_remote_code and not _is_known(config):
        raise ModelError(
            f"model {settings.path!r} comes with Python code of its own (auto_map in config.json): "
            "read it, then set model.trust_remote_code: true to run it."
        )


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has this architecture itself, so that the model's code is not needed.

    A look at its folders; importing it would take seconds. Loading finds out for certain.
    """
    spec = importlib.util.find_spec("transformers")
    assert spec is not None, "transformers is not installed"
    name = str(config.get("model_type", "")).replace("-", "_")
    return bool(name) and (Path(spec.origin or "").parent / "models" / name).is_dir()


def _check_quantization(settings: ModelSettings, config: Mapping[str, Any]) -> None:
    stored = config.get("quantization_config")
    if stored and settings.quantization != "none":
        method = stored.get("quant_method", "unknown") if isinstance(stored, dict) else stored
        raise ModelError(
            f"model.quantization is {settings.quantization!r}, but the weights of "
            f"{settings.path!r} are quantized already ({method}): leave model.quantization out."
        )


def _check_tokenizer(settings: ModelSettings, folder: Path) -> None:
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if not has_tokenizer and not any(folder.glob("*.tiktoken")):
        raise ModelError(
            f"model {settings.path!r} holds no tokenizer (such as tokenizer.json): save one into "
            "it with tokenizer.save_pretrained."
        )


def _check_weights(settings: ModelSettings, folder: Path) -> None:
    has_pickle = has_weights(folder, PICKLE)
    if has_weights(folder, SAFETENSORS):
        for path in weight_files(folder):
            check_header(path)
    elif has_pickle and not settings.allow_pickle:
        raise ModelError(
            f"model {settings.path!r} has weights only as pickle files, which can run code when "
            "loaded: convert them to safetensors, or set model.allow_pickle: true if you trust "
            "them."
        )
    elif not has_pickle:
        raise ModelError(
            f"model {settings.path!r} holds no weights: neither {SAFETENSORS} nor an index of "
            "several; pickle weights of a hub model are fetched only with "
            "model.allow_pickle: true."
        )


def _context_length(config: Mapping[str, Any]) -> int | None:
    text_config = config.get("text_config")
    for block in (config, text_config if isinstance(text_config, dict) else {}):
        for key in CONTEXT_KEYS:
            if isinstance(block.get(key), int):
                return int(block[key])
    return None


def _has_chat_template(folder: Path) -> bool:
    return (
        (folder / "chat_template.jinja").is_file()
        or any(folder.glob("additional_chat_templates/*.jinja"))
        or bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    )
