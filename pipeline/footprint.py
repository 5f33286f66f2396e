"""How much memory a worker will need, told from a checkpoint's files and configuration alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint import Checkpoint
from pipeline.gguf import read_header
from pipeline.model_files import read_tensors
from pipeline.settings import ModelSettings

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
QUANTIZED_BYTES = {
    "int8": 1.0,
    "nf4": 0.5625,
    "fp4": 0.5625,
    "torchao-int8": 1.0,
    "torchao-int4": 0.53,
    "torchao-fp8": 1.0,
}
"""Of a weight: 4 bits and a 32-bit scale for every 64 weights make 0.5625 bytes."""
DOUBLE_QUANTIZED_BYTES = 0.516
"""With 8-bit scales, and one of theirs for every 256."""
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
FP8_TYPES = ("F8_E4M3", "F8_E5M2")
PACKED_BYTES = {"I32": 4, "U8": 1, "I8": 1}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that one worker needs.

    Attributes:
        weights: after quantization, or unpacking; what is not a linear layer keeps its type.
        cache_per_token: keys and values of one token in all layers.
        is_mapped: the weights are used as they lie in their files, so that on CPU all workers of a
            machine have them in memory once.
    """

    weights: int
    cache_per_token: int
    is_mapped: bool = False


def estimate_footprint(
    checkpoint: Checkpoint, settings: ModelSettings, has_gpu: bool = False
) -> Footprint:
    """What the model will take: the weights to some percent, the cache without its padding.

    Args:
        has_gpu: whether it will run on one; on CPU, FP8 weights are unpacked.
    """
    text = _text_config(checkpoint.config)
    stored_type = str(text.get("dtype", text.get("torch_dtype")))
    stored = BYTES_OF.get(stored_type, 4)
    loaded = stored if settings.dtype == "auto" else BYTES_OF[settings.dtype]
    if checkpoint.quantization == "none":
        weights = _quantized_while_loading(checkpoint, settings, stored, loaded)
    elif checkpoint.quantization == "gguf":
        weights = float(read_header(checkpoint.weights[0]).num_weights * loaded)
    elif _is_unpacked(checkpoint, has_gpu):
        weights = float(_num_stored_weights(checkpoint) * loaded)
    else:
        weights = float(sum(path.stat().st_size for path in checkpoint.weights))
    if settings.adapter is not None and not settings.adapter.merge:
        weights += sum(adapter.num_bytes for adapter in checkpoint.adapters)
    is_plain = (settings.quantization.method, checkpoint.quantization) == ("none", "none")
    return Footprint(
        weights=int(weights),
        cache_per_token=_cache_per_token(text, loaded),
        is_mapped=is_plain and settings.dtype in ("auto", stored_type) and _is_safe(checkpoint),
    )


def _is_safe(checkpoint: Checkpoint) -> bool:
    return all(path.suffix == ".safetensors" for path in checkpoint.weights)


def _is_unpacked(checkpoint: Checkpoint, has_gpu: bool) -> bool:
    """Whether packed weights are unpacked while loading; of an old GPU that is not known here."""
    if checkpoint.quantization == "compressed-tensors":
        kinds = {kind for kind, _ in _tensors(checkpoint).values()}
        return not (has_gpu and kinds & set(FP8_TYPES))
    return checkpoint.quantization == "fp8" and not has_gpu


def _quantized_while_loading(
    checkpoint: Checkpoint, settings: ModelSettings, stored: int, loaded: int
) -> float:
    if _is_safe(checkpoint):
        num_weights = float(sum(math.prod(shape) for _, shape in _tensors(checkpoint).values()))
    else:
        num_weights = sum(path.stat().st_size for path in checkpoint.weights) / stored
    num_embeddings = _num_embeddings(_text_config(checkpoint.config))
    linear = QUANTIZED_BYTES.get(settings.quantization.method, loaded)
    if settings.quantization.bnb_4bit_use_double_quant:
        linear = DOUBLE_QUANTIZED_BYTES
    return num_embeddings * loaded + max(0.0, num_weights - num_embeddings) * linear


def _num_stored_weights(checkpoint: Checkpoint) -> int:
    """How many weights there are once those that are packed are unpacked."""
    return sum(
        _num_unpacked(name, kind, math.prod(shape), _num_bits(checkpoint.config))
        for name, (kind, shape) in _tensors(checkpoint).items()
    )


def _tensors(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in the files."""
    return {
        name: tensor for path in checkpoint.weights for name, tensor in read_tensors(path).items()
    }


def _num_unpacked(name: str, kind: str, size: int, num_bits: int) -> int:
    if name.endswith(".weight_packed"):
        return size * 8 * PACKED_BYTES.get(kind, 1) // num_bits
    is_weight = kind in (*FLOAT_TYPES, *FP8_TYPES, "I8") and "_scale" not in name
    return size if is_weight else 0


def _num_bits(config: Mapping[str, Any]) -> int:
    """Of the packed weights of compressed-tensors, which has groups of layers."""
    stored = config.get("quantization_config") or _text_config(config)["quantization_config"]
    groups = stored.get("config_groups", {}).values()
    packed = [group["weights"].get("num_bits", 8) for group in groups if group.get("weights")]
    return min(packed, default=8)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _num_embeddings(config: Mapping[str, Any]) -> int:
    tables = 1 if config.get("tie_word_embeddings", True) else 2
    return tables * _number(config, "vocab_size") * _hidden_size(config)


def _cache_per_token(config: Mapping[str, Any], num_bytes: int) -> int:
    num_layers = _num_attending(config)
    num_heads = _number(config, "num_attention_heads", "n_head") or 1
    head_size = _number(config, "head_dim") or _hidden_size(config) // num_heads
    num_kv_heads = _number(config, "num_key_value_heads") or num_heads
    return 2 * num_layers * num_kv_heads * head_size * num_bytes


def _num_attending(config: Mapping[str, Any]) -> int:
    """Layers that keep keys and values of every token; recurrent ones keep a state of one size."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if not isinstance(kinds, list):
        return _number(config, "num_hidden_layers", "n_layer")
    attending = [kind for kind in kinds if "attention" in kind or kind == "hybrid"]
    return len(attending) - attending.count("linear_attention")


def _hidden_size(config: Mapping[str, Any]) -> int:
    return _number(config, "hidden_size", "n_embd")


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that is a number; 0 if none is, as where layers differ."""
    return next((config[name] for name in names if type(config.get(name)) is int), 0)
