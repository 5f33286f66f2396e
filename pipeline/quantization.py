"""bitsandbytes quantization while loading."""

from __future__ import annotations

import logging

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from pipeline.settings import ModelSettings


def quantization_config(
    settings: ModelSettings, config: PretrainedConfig
) -> BitsAndBytesConfig | None:
    """What `from_pretrained` needs to know; None without quantization."""
    if settings.quantization == "none":
        return None
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantization,
        bnb_4bit_compute_dtype=_compute_dtype(settings, config),
    )


def _compute_dtype(settings: ModelSettings, config: PretrainedConfig) -> torch.dtype:
    """The type of matrix products with 4-bit weights: bfloat16 where the GPU has it."""
    if torch.cuda.is_available():
        has_bfloat16 = torch.cuda.get_device_capability()[0] >= 8
        return torch.bfloat16 if has_bfloat16 else torch.float16
    stored = getattr(config, "dtype", None)
    asked = stored if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return asked if isinstance(asked, torch.dtype) else torch.float32


class _Once(logging.Filter):
    """Lets each message format through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[object] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = record.msg not in self._seen
        self._seen.add(record.msg)
        return is_new


_only_once = _Once()


def quiet_bitsandbytes() -> None:
    """Lets it warn of the cast in int8 layers once, and not at every step."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_only_once)
