"""How much memory a worker will need, told from a checkpoint's files and configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint import Checkpoint
from pipeline.model_files import weight_files
from pipeline.settings import ModelSettings

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5625, "fp4": 0.5625}
"""Of a weight: 4 bits and a 32-bit scale for every 64 weights make 0.5625 bytes."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that one worker needs.

    Attributes:
        weights: after quantization; what is not a linear layer keeps its type.
        cache_per_token: keys and values of one token in all layers.
    """

    weights: int
    cache_per_token: int


def estimate_footprint(checkpoint: Checkpoint, settings: ModelSettings) -> Footprint:
    """What the model will take: the weights to some percent, the cache without its padding."""
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    stored = BYTES_OF.get(str(text.get("dtype", text.get("torch_dtype"))), 4)
    loaded = stored if settings.dtype == "auto" else BYTES_OF[settings.dtype]
    num_weights = sum(path.stat().st_size for path in weight_files(checkpoint.folder)) / stored
    num_embeddings = _num_embeddings(text)
    linear = QUANTIZED_BYTES.get(settings.quantization, loaded)
    weights = num_embeddings * loaded + max(0.0, num_weights - num_embeddings) * linear
    return Footprint(int(weights), _cache_per_token(text, loaded))


def _num_embeddings(config: Mapping[str, Any]) -> int:
    tables = 1 if config.get("tie_word_embeddings", True) else 2
    return int(tables * config.get("vocab_size", 0) * _hidden_size(config))


def _cache_per_token(config: Mapping[str, Any], num_bytes: int) -> int:
    num_layers = config.get("num_hidden_layers", config.get("n_layer", 0))
    num_heads = config.get("num_attention_heads", config.get("n_head", 1))
    head_size = config.get("head_dim") or _hidden_size(config) // num_heads
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    return int(2 * num_layers * num_kv_heads * head_size * num_bytes)


def _hidden_size(config: Mapping[str, Any]) -> int:
    return int(config.get("hidden_size", config.get("n_embd", 0)))
