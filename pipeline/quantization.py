"""What `from_pretrained` is told about quantization, while loading or as stored."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    BitsAndBytesConfig,
    GgufConfig,
    PretrainedConfig,
    TorchAoConfig,
)
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from pipeline.checkpoint import Checkpoint
from pipeline.errors import ModelError
from pipeline.settings import ModelSettings

GPTQMODEL_CPU_WORKERS = 2
"""On one or two cores it takes one itself, and then refuses to start its own pools of two."""
KNOWN_METHODS = {method.value for method in QuantizationMethod}
FP8_CAPABILITY = (8, 9)
"""GPUs from here on multiply in FP8."""


def quantization_config(
    checkpoint: Checkpoint, settings: ModelSettings, config: PretrainedConfig
) -> QuantizationConfigMixin | None:
    """What `from_pretrained` needs to know; None without quantization.

    Args:
        config: the model's; of weights that are stored quantized it may be changed.

    Raises:
        ModelError: the method is not known, or does not run on this machine.
    """
    if checkpoint.quantization == "gguf":
        # The packed way runs code from the hub, for three architectures.
        return GgufConfig(dequantize=True)
    if checkpoint.quantization != "none":
        _prepare_stored(checkpoint, config)
        return None
    return _while_loading(settings, config)


def _prepare_stored(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    if checkpoint.quantization in ("gptq", "awq"):
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(GPTQMODEL_CPU_WORKERS))
    inner: Any = config.get_text_config()
    stored: dict[str, Any] = (
        getattr(config, "quantization_config", None) or inner.quantization_config
    )
    if checkpoint.quantization not in KNOWN_METHODS:
        raise ModelError(
            f"model {checkpoint.source!r} is stored as {checkpoint.quantization}, a method that "
            "transformers does not know: take another copy of the model."
        )
    if checkpoint.quantization == "compressed-tensors":
        has_fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FP8_CAPABILITY
        keeps = has_fp8 and _has_fp8_weights(stored)
        # Else they would be unpacked by the first forward pass, when memory is spoken for.
        stored |= {"use_optimized_inference": keeps, "dequantize": not keeps}


def _has_fp8_weights(stored: Mapping[str, Any]) -> bool:
    groups = stored.get("config_groups", {}).values()
    weights = [group["weights"] for group in groups if group.get("weights")]
    return any(block["type"] == "float" and block["num_bits"] == 8 for block in weights)


def _while_loading(
    settings: ModelSettings, config: PretrainedConfig
) -> QuantizationConfigMixin | None:
    method, options = settings.quantization.method, settings.quantization.options
    if method == "none":
        return None
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)  # type: ignore[no-untyped-call]
    if method in ("nf4", "fp4"):
        options.setdefault("bnb_4bit_compute_dtype", _compute_dtype(settings, config))
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type=method, **options
        )
    skipped = options.pop("modules_to_not_convert", None)
    return TorchAoConfig(_torchao_type(method, **options), modules_to_not_convert=skipped)


def _torchao_type(method: str, group_size: int | None = None) -> Any:
    # Importing it takes a second, and only these methods need it.
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        PerGroup,
        PerRow,
    )
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    if method == "torchao-fp8":
        return Float8WeightOnlyConfig()
    if method == "torchao-int8":
        return Int8WeightOnlyConfig(granularity=PerGroup(group_size) if group_size else PerRow())
    if not torch.cuda.is_available():
        raise ModelError(
            "model.quantization torchao-int4 runs on GPUs only, and this machine has none: set it "
            "to nf4 or torchao-int8."
        )
    return Int4WeightOnlyConfig(
        group_size=group_size or 128, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D
    )


def _compute_dtype(settings: ModelSettings, config: PretrainedConfig) -> torch.dtype:
    """The type of matrix products with 4-bit weights: bfloat16 where the GPU has it."""
    if torch.cuda.is_available():
        has_bfloat16 = torch.cuda.get_device_capability()[0] >= 8
        return torch.bfloat16 if has_bfloat16 else torch.float16
    stored = getattr(config, "dtype", None)
    asked = stored if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return asked if isinstance(asked, torch.dtype) else torch.float32


def num_weight_bytes(model: torch.nn.Module) -> int:
    """Memory of parameters and buffers, of those that are packed what they are packed in."""
    return sum(map(_num_bytes, (*model.parameters(), *model.buffers())))


def _num_bytes(tensor: torch.Tensor) -> int:
    if not is_traceable_wrapper_subclass(tensor):
        state = getattr(tensor, "quant_state", None)  # bitsandbytes' scales
        return tensor.nbytes + (0 if state is None else int(state.absmax.nbytes))
    # torchao's weights: seen from outside, of the type that they stand for.
    names, _ = tensor.__tensor_flatten__()
    return sum(_num_bytes(getattr(tensor, name)) for name in names)


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
