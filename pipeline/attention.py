"""Attention of one new token per row on a CPU, band by band of the rows' lengths.

transformers' own function for each band, so that every architecture which uses the attention
interface is served, and whatever does not use it goes on as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_in_bands"
BANDS = "shardmill_bands"
"""Attribute of a key tensor that names the `Band`s of its rows."""


def use_bands(model: PreTrainedModel) -> bool:
    """Makes a model attend band by band, if it is one that can; whether it does."""
    # A GPU would lose more by further calls than it gains by reading less.
    if model.device.type != "cpu":
        return False
    # Models without this have code of their own for each implementation that they know.
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(NAME, _attention_in_bands)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def _attention_in_bands(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`.

    Args:
        query: (rows, heads, new columns, head size).
        key: (rows, KV heads, columns, head size), and so `value`.
        attention_mask: (rows, 1, new columns, columns) bool.
    """
    bands = getattr(key, BANDS, None)
    if bands is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    num_columns = key.shape[2]
    if attention_mask is None:
        # Without a mask, transformers leaves grouped queries to a slow path of torch.
        attention_mask = query.new_ones((), dtype=torch.bool).expand(len(key), 1, 1, num_columns)
    outputs = []
    for band in bands:
        rows = slice(band.first, band.end)
        output, _ = sdpa_attention_forward(
            module,
            query[rows],
            key[rows, :, band.num_hidden :],
            value[rows, :, band.num_hidden :],
            attention_mask[rows, :, :, band.num_hidden :],
            **kwargs,
        )
        outputs.append(output)
    return torch.cat(outputs), None
