"""Weights that are stored quantized: by which method, and whether what reads them is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import ModelError
from pipeline.extras import EXTRAS, require
from pipeline.settings import ModelSettings

EXTRA_OF = {
    "awq": "gptq",
    "compressed-tensors": "compressed-tensors",
    "gguf": "gguf",
    "gptq": "gptq",
    "torchao": "torchao",
    "torchao-fp8": "torchao",
    "torchao-int4": "torchao",
    "torchao-int8": "torchao",
}
"""Method -> the extra that it needs; the others come with transformers and bitsandbytes."""


UNMERGEABLE = ("gptq", "awq")
"""peft has no way to pack weights again as these are."""


def libraries_of(settings: ModelSettings, stored: str) -> tuple[str, ...]:
    """The optional packages that make a model's answers.

    Args:
        stored: how its weights are stored.
    """
    method = settings.quantization.method if stored == "none" else stored
    extras = [EXTRA_OF[method]] if method in EXTRA_OF else []
    extras += ["adapters"] if settings.adapter is not None else []
    return tuple(name for extra in extras for name in EXTRAS[extra])


def stored_quantization(settings: ModelSettings, config: Mapping[str, Any]) -> str:
    """How a model's weights are stored, as its `config.json` names the method; 'none' if plain.

    Raises:
        ModelError: the settings ask for another quantization on top, or a package is missing.
    """
    method = "gguf" if settings.gguf_file is not None else _named(config)
    if method == "none":
        if settings.quantization.method in EXTRA_OF:
            wish = f"model.quantization {settings.quantization.method}"
            require(EXTRA_OF[settings.quantization.method], wish)
        return method
    if settings.quantization.method != "none":
        raise ModelError(
            f"model.quantization is {settings.quantization.method!r}, but the weights of "
            f"{settings.path!r} are quantized already ({method}): leave model.quantization out."
        )
    if settings.offload != "none":
        raise ModelError(
            f"model.offload is {settings.offload!r}, but the weights of {settings.path!r} are "
            f"quantized ({method}), and only plain ones can be offloaded: leave model.offload "
            "out, or take the model unquantized."
        )
    if method in UNMERGEABLE and settings.adapter is not None and settings.adapter.merge:
        raise ModelError(
            f"model.adapter.merge adds to the weights, which cannot be done where they are stored "
            f"as {method}: leave merge out."
        )
    if method in EXTRA_OF:
        require(EXTRA_OF[method], f"model {settings.path!r} is stored as {method}, which")
    return method


def _named(config: Mapping[str, Any]) -> str:
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else {}
    stored = config.get("quantization_config") or inner.get("quantization_config")
    if not isinstance(stored, dict):
        return str(stored or "none")
    # Old files of bitsandbytes do not name it.
    is_bitsandbytes = stored.get("load_in_4bit") or stored.get("load_in_8bit")
    return str(stored.get("quant_method", "bitsandbytes" if is_bitsandbytes else "unknown"))
