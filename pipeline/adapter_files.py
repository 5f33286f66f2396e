"""LoRA adapters on disk: folders or hub ids, checked and identified without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.extras import require
from pipeline.hub import download_adapter
from pipeline.model_files import digest, read_json, read_tensors
from pipeline.settings import ModelSettings

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
DOWN_PROJECTION = ".lora_A.weight"
"""Ends the name of the matrices that have as many rows as the adapter has ranks."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter on this machine's disk.

    Attributes:
        name: as rows choose it; empty if it is for all rows.
        source: what the job file says; a hub id with the commit that it is of now.
        base: the model that it says it was trained on; perhaps nothing.
        digest: of all that decides the answers.
        num_bytes: of the weights.
    """

    name: str
    source: str
    folder: Path
    base: str
    digest: str
    num_bytes: int


def fetch_adapters(settings: ModelSettings, local_files_only: bool) -> tuple[AdapterFiles, ...]:
    """Finds or downloads the adapters of a job and checks them.

    Raises:
        ModelError: one is not there, not whole, or not LoRA; or peft is missing.
    """
    if settings.adapter is None:
        return ()
    require("adapters", "model.adapter")
    paths = settings.adapter.named_paths.items()
    return tuple(_fetch(name, path, settings, local_files_only) for name, path in paths)


def _fetch(name: str, path: str, settings: ModelSettings, local_files_only: bool) -> AdapterFiles:
    folder, source = Path(path).expanduser(), path
    if not folder.is_dir():
        folder = download_adapter(
            path, allow_pickle=settings.allow_pickle, local_files_only=local_files_only
        )
        source = f"{path.partition('@')[0]}@{folder.name}"
    config = read_json(folder / CONFIG)
    _check_config(path, config)
    weights = _checked_weights(path, folder, config, settings.allow_pickle)
    return AdapterFiles(
        name=name,
        source=source,
        folder=folder,
        base=str(config.get("base_model_name_or_path") or ""),
        digest=digest(folder, [folder / CONFIG], [weights]),
        num_bytes=weights.stat().st_size,
    )


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    if not config:
        raise ModelError(
            f"model.adapter {path!r} holds no {CONFIG}: give the folder that peft or "
            "Trainer.save_model has written."
        )
    kind = str(config.get("peft_type"))
    if kind != "LORA" or config.get("alora_invocation_tokens"):
        kind = "an activated LoRA" if kind == "LORA" else kind
        raise ModelError(
            f"model.adapter {path!r} is {kind}, and only LoRA adapters run here: merge it into "
            "its model with peft, and give that as model.path."
        )


def _checked_weights(
    path: str, folder: Path, config: Mapping[str, Any], allow_pickle: bool
) -> Path:
    if (folder / SAFETENSORS).is_file():
        _check_rank(path, read_tensors(folder / SAFETENSORS), config)
        return folder / SAFETENSORS
    if not (folder / PICKLE).is_file():
        raise ModelError(f"model.adapter {path!r} holds no weights: {SAFETENSORS} is missing.")
    if not allow_pickle:
        raise ModelError(
            f"model.adapter {path!r} has its weights only as {PICKLE}, a pickle file, which can "
            "run code when loaded: save it again as safetensors, or set model.allow_pickle: true "
            "if you trust it."
        )
    return folder / PICKLE


def _check_rank(
    path: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any]
) -> None:
    ranks = {shape[0] for name, (_, shape) in tensors.items() if name.endswith(DOWN_PROJECTION)}
    known = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    if ranks - known:
        raise ModelError(
            f"model.adapter {path!r} has weights of rank {min(ranks - known)}, and r is "
            f"{config.get('r')} in its {CONFIG}: the two files are not of one adapter."
        )
