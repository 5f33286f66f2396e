"""Left padding, and whether a model gives the same answers with and without it.

That it does is what every batch of unlike prompts rests on, and not every model keeps to it: some
ignore the attention mask, or count positions from the padding's first column. So it is tried on
the loaded model, with its own type, kernels and quantization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline.errors import describe
from pipeline.model import Model
from pipeline.room import is_out_of_memory

PROBE_LENGTHS = (33, 20, 6, 1)
"""Tokens of the probes. Padded lengths of 1 modulo 32 have been reported to go wrong on GPUs."""
NUM_STEPS = 2
"""The prompt, and a token after it, whose mask and position `generate` derives by other code."""
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest difference of two logits, as a share of the distance from a row's lowest logit to its
highest. Rounding in float32 stays below 1e-5; a model that sees padding is off by a tenth."""
ROUNDED_TOLERANCE = 5e-2
"""For types of two bytes: bfloat16 has 8 bits, and rounding adds up over the layers."""
QUANTIZED_TOLERANCE = 1e-1
"""int8 treats a column of activations by its largest value, which another row may bring."""


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (rows, longest row) int64, padded on the left."""
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def padding_problem(model: Model) -> str | None:
    """Why rows of unlike lengths must not share a batch, as a clause; None if they may.

    A few prompts of made-up tokens run alone and then padded together, through `generate` as the
    static engine calls it.

    Raises:
        torch.AcceleratorError: the device has failed; nothing works in this process any more.
    """
    probes = _probes(model)
    following = probes[0][0]
    try:
        alone = torch.cat([_logits(model, [probe], following) for probe in probes])
    except Exception as error:  # noqa: BLE001 - models raise anything; each row will tell
        return f"a prompt alone fails already ({_said(error)})"
    if not bool(alone.isfinite().all()):
        return "the model is broken: its output for a prompt alone is not a number"
    try:
        together = _logits(model, probes, following)
    except Exception as error:  # noqa: BLE001 - likewise; alone the rows have run
        return f"padded prompts fail in this model ({_said(error)})"
    if not bool(together.isfinite().all()):
        return "padded prompts make this model's output something that is not a number"
    return _difference(alone, together, _tolerance(model))


def _said(error: Exception) -> str:
    if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
        raise error
    return describe(error)


def _probes(model: Model) -> list[list[int]]:
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


def _logits(model: Model, rows: Sequence[Sequence[int]], following: int) -> Tensor:
    """Logits after each row, and after one more token: (rows, steps, vocabulary) float32."""
    input_ids, attention_mask = pad_left(rows, model.pad_id, model.device)
    recorder = _Recorder(following)
    generate: Any = model.model.generate
    generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=NUM_STEPS, do_sample=False, pad_token_id=model.pad_id
        ),
        logits_processor=LogitsProcessorList([recorder]),
    )
    return torch.stack(recorder.steps, dim=1)


class _Recorder(LogitsProcessor):
    """Keeps the logits of each step, and has `generate` go on with the same token in every row.

    With the most likely one, rounding could send a row another way.
    """

    def __init__(self, token: int) -> None:
        self.steps: list[Tensor] = []
        self._token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float())
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, min(self._token, scores.shape[-1] - 1)] = 0.0
        return chosen


def _tolerance(model: Model) -> float:
    if model.quantization != "none":
        return QUANTIZED_TOLERANCE
    return TOLERANCES.get(model.dtype, ROUNDED_TOLERANCE)


def _difference(alone: Tensor, together: Tensor, tolerance: float) -> str | None:
    """Both are (rows, steps, vocabulary)."""
    scale = (alone.amax(dim=-1) - alone.amin(dim=-1)).clamp_min(torch.finfo(torch.float32).tiny)
    shares = (together - alone).abs().amax(dim=-1) / scale
    worst = float(shares.max())
    if worst <= tolerance:
        return None
    return f"left padding changes this model's logits by {worst:.1%} of their range"
