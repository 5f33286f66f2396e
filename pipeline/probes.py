"""Prompts of made-up tokens, and how much two ways of running them may differ.

What every batch rests on is tried with them on the loaded model, with its own type, kernels and
quantization, before the first row: see `self_check` and `stepping`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.model import Model

PROBE_LENGTHS = (33, 20, 6, 1)
"""Tokens of the probes. Padded lengths of 1 modulo 32 have been reported to go wrong on GPUs."""
NUM_STEPS = 2
"""The prompt, and a token after it, whose mask and position are derived by other code."""
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest difference of two logits, as a share of the distance from a row's lowest logit to its
highest. Rounding in float32 stays below 1e-5; a model that sees padding is off by a tenth."""
ROUNDED_TOLERANCE = 5e-2
"""For types of two bytes: bfloat16 has 8 bits, and rounding adds up over the layers."""
QUANTIZED_TOLERANCE = 1e-1
"""int8 treats a column of activations by its largest value, which another row may bring."""


def probes_for(model: Model) -> list[list[int]]:
    """Rows of ordinary tokens, the longest first; shorter ones where the context is tiny."""
    longest = PROBE_LENGTHS[0]
    if model.context_length is not None:
        longest = max(1, min(longest, model.context_length - NUM_STEPS))
    lengths = {max(1, length * longest // PROBE_LENGTHS[0]) for length in PROBE_LENGTHS}
    special = {model.pad_id, *model.eos_ids, *model.vocabulary.special_ids.values()}
    ordinary = [token for token in range(model.num_embeddings) if token not in special]
    tokens = ordinary or [model.pad_id]
    # Steps of 37 and 101 go all over the vocabulary, and give each row other tokens.
    return [
        [tokens[(101 * row + 37 * place) % len(tokens)] for place in range(length)]
        for row, length in enumerate(sorted(lengths, reverse=True))
    ]


def tolerance(model: Model) -> float:
    """The largest `difference` that is rounding."""
    if model.quantization not in ("none", "gguf"):
        return QUANTIZED_TOLERANCE
    return TOLERANCES.get(model.dtype, ROUNDED_TOLERANCE)


def difference(right: Tensor, changed: Tensor) -> float:
    """How far logits are from the right ones, as a share of a row's range of logits.

    Args:
        right: (rows, steps, vocabulary) float32, and so the others.
    """
    scale = (right.amax(dim=-1) - right.amin(dim=-1)).clamp_min(torch.finfo(torch.float32).tiny)
    shares = (changed - right).abs().amax(dim=-1) / scale
    return float(shares.max())


def difference_problem(model: Model, share: float, by: str) -> str | None:
    """Whether a `difference` is more than rounding, as a clause; None if it is not."""
    if share <= tolerance(model):
        return None
    return f"{by} changes this model's logits by {share:.1%} of their range"
