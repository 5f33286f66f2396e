"""A model folder or hub id -> a `Checkpoint`: files that are there, whole and of a usable kind.

Everything here is settled before anything heavy starts, so it imports neither torch nor
transformers: it reads JSON, safetensors headers and samples of the weights.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.adapter_files import AdapterFiles, fetch_adapters
from pipeline.errors import ModelError
from pipeline.gguf import GgufHeader, read_header
from pipeline.hub import download, download_lock, is_hub_id
from pipeline.model_files import (
    PICKLE,
    SAFETENSORS,
    digest,
    has_weights,
    read_json,
    read_tensors,
    small_files,
    weight_files,
)
from pipeline.settings import ModelSettings
from pipeline.stored import stored_quantization

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
        weights: the files that are loaded.
        quantization: how they are stored, such as `gptq`; `none` if plain.
        config: of `config.json`, or of a GGUF file in the same terms.
        has_tokenizer: whether the folder has one; else it is in the GGUF file.
        context_length: tokens of prompt and completion together; None if the configuration
            does not say.
        generation_defaults: what `generation_config.json` says, or nothing.
    """

    source: str
    folder: Path
    revision: str | None
    digest: str
    weights: tuple[Path, ...]
    quantization: str
    config: Mapping[str, Any]
    has_tokenizer: bool
    context_length: int | None
    has_chat_template: bool
    generation_defaults: Mapping[str, object] = field(default_factory=dict)
    adapters: tuple[AdapterFiles, ...] = ()

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the model and of each adapter."""
        return (self.digest, *(adapter.digest for adapter in self.adapters))

    def pinned(self, settings: ModelSettings) -> ModelSettings:
        """The settings with commits instead of branches: wherever used, they mean these files."""
        changes: dict[str, object] = {"revision": self.revision}
        if settings.adapter is not None:
            sources = {adapter.name: adapter.source for adapter in self.adapters}
            is_one = settings.adapter.path is not None
            pinned = {"path": sources[""]} if is_one else {"paths": sources}
            changes["adapter"] = settings.adapter.model_copy(update=pinned)
        return settings.model_copy(update=changes)


def fetch(settings: ModelSettings, local_files_only: bool = False) -> Checkpoint:
    """Finds or downloads a model and checks it.

    Args:
        settings: the model block of a job.
        local_files_only: take a hub model from this machine's cache, or fail.

    Raises:
        ModelError: it is not there, not whole, not to be read, or not to be loaded as the settings
            ask.
    """
    with _permission_errors(settings):
        return _fetch(settings, local_files_only)


@contextmanager
def _permission_errors(settings: ModelSettings) -> Iterator[None]:
    """Names what is closed to us: a file, or a folder above it."""
    try:
        yield
    except PermissionError as error:
        raise ModelError(
            f"model {settings.path!r}: '{error.filename}' cannot be read ({error.strerror}): allow "
            "it and the folders above it to be read, or correct the path in the model block."
        ) from error


def _fetch(settings: ModelSettings, local_files_only: bool) -> Checkpoint:
    folder = Path(settings.path).expanduser()
    is_local = folder.exists()
    if is_local:
        _check_local(settings, folder)
    else:
        folder = _download(settings, local_files_only)
    header = None if settings.gguf_file is None else read_header(_gguf_file(settings, folder))
    config = _plain_config(settings, folder) if header is None else header.config
    quantization = stored_quantization(settings, config)
    has_tokenizer = _check_tokenizer(settings, folder, header)
    weights = _checked_weights(settings, folder) if header is None else (header.path,)
    return Checkpoint(
        source=settings.path,
        folder=folder,
        revision=None if is_local else folder.name,
        digest=digest(folder, small_files(folder), weights),
        weights=weights,
        quantization=quantization,
        config=config,
        has_tokenizer=has_tokenizer,
        context_length=_context_length(config),
        has_chat_template=_has_chat_template(folder, None if has_tokenizer else header),
        generation_defaults=read_json(folder / "generation_config.json"),
        adapters=fetch_adapters(settings, local_files_only),
    )


def fetch_once(settings: ModelSettings) -> Checkpoint:
    """As `fetch`, for one of several processes on a machine that may lack a hub model.

    The first of them downloads it while the others wait; they find it in the cache then, and the
    hub is asked no more.
    """
    adapters = () if settings.adapter is None else settings.adapter.named_paths.values()
    with _permission_errors(settings):
        hub_ids = [path for path in (settings.path, *adapters) if is_hub_id(path)]
    if not hub_ids:
        return fetch(settings)
    checkpoint = _cached(settings)
    if checkpoint is None:
        with download_lock(hub_ids[0]):
            checkpoint = _cached(settings) or fetch(settings)
    return checkpoint


def _cached(settings: ModelSettings) -> Checkpoint | None:
    """None if it is not in the cache, or not whole there, which a download mends or tells."""
    try:
        return fetch(settings, local_files_only=True)
    except ModelError:
        return None


def _check_local(settings: ModelSettings, folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"model.path {settings.path!r} is a file: set it to the folder, and for GGUF "
            "model.gguf_file to the file's name."
        )
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
    if settings.allow_pickle and not settings.gguf_file and not has_weights(folder, SAFETENSORS):
        folder = download(settings, allow_pickle=True, local_files_only=local_files_only)
    return folder


def quantization_name(checkpoint: Checkpoint, settings: ModelSettings) -> str:
    """How a model's weights are held, or were stored: a method of either, or `none`."""
    if checkpoint.quantization != "none":
        return checkpoint.quantization
    return settings.quantization.method


def _gguf_file(settings: ModelSettings, folder: Path) -> Path:
    path = folder / str(settings.gguf_file)
    if not path.is_file():
        raise ModelError(
            f"model.gguf_file {settings.gguf_file!r} is no file of {settings.path!r}; "
            f"{_gguf_names(folder)}."
        )
    return path


def _gguf_names(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.gguf"))
    return f"there are {', '.join(names)}" if names else "there are no GGUF files"


def _plain_config(settings: ModelSettings, folder: Path) -> dict[str, Any]:
    """The `config.json` of a model that is not GGUF."""
    config = read_json(folder / "config.json")
    if not config and any(folder.glob("*.gguf")):
        raise ModelError(
            f"model.path {settings.path!r} holds GGUF files: set model.gguf_file to the one that "
            f"is to be used; {_gguf_names(folder)}."
        )
    if not config:
        raise ModelError(
            f"model.path {settings.path!r} holds no config.json: it is not a transformers model."
        )
    _check_code(settings, config)
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


def _check_tokenizer(settings: ModelSettings, folder: Path, header: GgufHeader | None) -> bool:
    """Checks that there is a tokenizer; whether it is one in files of its own."""
    has_file = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if has_file or any(folder.glob("*.tiktoken")):
        return True
    if header is None or not header.has_tokenizer:
        raise ModelError(
            f"model {settings.path!r} holds no tokenizer (such as tokenizer.json): save one into "
            "it with tokenizer.save_pretrained."
        )
    return False


def _checked_weights(settings: ModelSettings, folder: Path) -> tuple[Path, ...]:
    """The files of a model that is not GGUF, whole as far as their headers tell."""
    has_pickle = has_weights(folder, PICKLE)
    if has_weights(folder, SAFETENSORS):
        for path in weight_files(folder):
            read_tensors(path)
    elif has_pickle and not settings.allow_pickle:
        raise ModelError(
            f"model {settings.path!r} has weights only as pickle files, which can run code when "
            "loaded: convert them to safetensors, or set model.allow_pickle: true if you trust "
            "them."
        )
    elif has_pickle and settings.offload == "disk":
        raise ModelError(
            f"model {settings.path!r} has weights only as pickle files, which cannot be read at "
            "every step: convert them to safetensors, or set model.offload to cpu."
        )
    elif not has_pickle:
        raise ModelError(
            f"model {settings.path!r} holds no weights: neither {SAFETENSORS} nor an index of "
            "several; pickle weights of a hub model are fetched only with "
            "model.allow_pickle: true."
        )
    return tuple(weight_files(folder))


def _context_length(config: Mapping[str, Any]) -> int | None:
    text_config = config.get("text_config")
    for block in (config, text_config if isinstance(text_config, dict) else {}):
        for key in CONTEXT_KEYS:
            if isinstance(block.get(key), int):
                return int(block[key])
    return None


def _has_chat_template(folder: Path, header: GgufHeader | None) -> bool:
    """Whether the tokenizer has one: that of the GGUF file, or that in the folder."""
    if header is not None:
        return header.has_chat_template
    return (
        (folder / "chat_template.jinja").is_file()
        or any(folder.glob("additional_chat_templates/*.jinja"))
        or bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    )
