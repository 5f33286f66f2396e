"""Whether a model's cache is one that slots can take the place of."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

FIT_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Keys and values of every token, by column. Exactly these: some subclasses hold more."""
POSITIONS_FROM_MASK = ("build_alibi_tensor", "build_mpt_alibi_tensor")
"""Methods of models that take no positions, as ALiBi gets them from the attention mask."""
MOVING_ROPE_TYPES = ("dynamic", "longrope")
"""Rotary frequencies that follow the longest row of a batch, so that rows change one another."""


def unsupported(model: PreTrainedModel) -> str | None:
    """Why a model must take the static engine, as the end of a sentence; None if it need not."""
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state"
    return _unfit_call(model) or _unfit_layers(config) or _moving_positions(config)


def _unfit_call(model: PreTrainedModel) -> str | None:
    parameters = inspect.signature(model.forward).parameters
    missing = {"attention_mask", "past_key_values"} - set(parameters)
    if missing:
        return f"it does not take {min(missing)}"
    has_alibi = any(hasattr(model.base_model, name) for name in POSITIONS_FROM_MASK)
    if "position_ids" not in parameters and not has_alibi:
        return "it does not take position_ids"
    return None


def _unfit_layers(config: PretrainedConfig) -> str | None:
    text_config = config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(text_config, "layer_types", None) or ()):
        return "its attention works in chunks of positions"
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as error:
        return f"its cache has layers of the kind {error}"
    unfit = {type(layer).__name__ for layer in layers if type(layer) not in FIT_LAYERS}
    return f"its cache has layers of the kind {min(unfit)}" if unfit else None


def _moving_positions(config: PretrainedConfig) -> str | None:
    moving = [str(part["rope_type"]) for part in _moving_ropes(config)]
    return f"its rope_type is {moving[0]}, which follows the longest row" if moving else None


def _moving_ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    rope: dict[str, Any] = (
        getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    )
    # Some models have one set of parameters for each type of layer.
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return [part for part in parts if part.get("rope_type") in MOVING_ROPE_TYPES]


def mixed_columns(config: PretrainedConfig) -> int | None:
    """Columns, padding included, up to which rows of different lengths do not change one another.

    Beyond them, only rows of one length go together. None if they do at any length.
    """
    text_config: Any = config.get_text_config(decoder=True)
    limits: list[int] = []
    for rope in _moving_ropes(config):
        original = rope.get("original_max_position_embeddings")
        # One less, as the frequencies of `dynamic` go back only below it.
        limits.append((original or text_config.max_position_embeddings) - 1)
    if getattr(text_config, "attn_temperature_tuning", False):
        limits.append(text_config.floor_scale - 1)  # Llama 4 counts padding as positions
    return min(limits, default=None)
