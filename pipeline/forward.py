"""One forward pass over the next columns of a `SlotCache`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from pipeline.attention import use_bands
from pipeline.model import Model
from pipeline.slots import SlotCache


class Forward:
    """Tokens -> logits of the last column, by a model that `cache_support` finds fit.

    Attributes:
        has_bands: whether rows of like length should stand together; see `bands`.
    """

    def __init__(self, model: Model) -> None:
        parameters = inspect.signature(model.model.forward).parameters
        self.device = model.device
        self.has_bands = use_bands(model.model)
        self.num_layers = len(DynamicCache(config=model.model.config))
        self._model = model.caller
        self._adapters_of = model.adapter_options
        self.pad_id = model.pad_id
        # Models with ALiBi take their positions from the attention mask.
        self._takes_positions = "position_ids" in parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def __call__(self, input_ids: Tensor, cache: SlotCache, adapters: Sequence[str] = ()) -> Tensor:
        """Works through new columns, which then belong to the cache's window.

        Args:
            input_ids: (rows, new columns) int64.
            adapters: of each row, the one that it has chosen; none of them if left out.

        Returns:
            (rows, vocabulary), in the model's type.
        """
        num_new = input_ids.shape[1]
        attention_mask, position_ids = cache.model_inputs(num_new, self.device)
        logits = self.logits(input_ids, attention_mask, position_ids, cache, adapters)
        cache.advance(num_new)
        return logits

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Cache,
        adapters: Sequence[str] = (),
    ) -> Tensor:
        """The model's call, and nothing else.

        Args:
            input_ids: (rows, new columns) int64, and so the positions.
            attention_mask: (rows, all columns) bool.
            adapters: as above.

        Returns:
            of the last column, (rows, vocabulary), in the model's type.
        """
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        logits: Tensor = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **self._adapters_of(adapters or [""] * len(input_ids)),
            **positions,
            **self._options,
        ).logits
        return logits[:, -1]

    def prefill(
        self,
        rows: Sequence[Sequence[int]],
        prefix: SlotCache | None = None,
        num_shared: int = 0,
        adapters: Sequence[str] = (),
    ) -> tuple[SlotCache, Tensor]:
        """Works through prompts that all begin with the first `num_shared` tokens of a prefix.

        A row shorter than the longest computes the last of the shared tokens again, in place of
        padding: so its columns stay without a gap.

        Args:
            rows: token ids; each has more than `num_shared`.
            prefix: its first row holds the shared tokens.
            adapters: as in a call.

        Returns:
            the rows' cache, and logits (rows, vocabulary).
        """
        lengths = [len(row) for row in rows]
        num_new = max(lengths) - num_shared
        cache = SlotCache(self.num_layers, num_slots=len(rows), capacity=max(lengths))
        cache.place(lengths, num_new)
        if prefix is not None:
            cache.fill(prefix)
        padded = [[self.pad_id] * (num_new - len(row)) + list(row[-num_new:]) for row in rows]
        return cache, self(torch.tensor(padded, device=self.device), cache, adapters)
