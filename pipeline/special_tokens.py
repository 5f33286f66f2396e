"""The tokens that end and pad, and what stopping needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ModelError
from pipeline.stopping import Vocabulary


def eos_ids_of(config: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end-of-sequence tokens that generation config and tokenizer name, one or several."""
    named = config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    return frozenset(number for number in (*ids, tokenizer.eos_token_id) if number is not None)


def pad_id_of(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: frozenset[int],
    num_embeddings: int,
) -> tuple[int, list[str]]:
    """What to pad with, and a note if that is not the tokenizer's own padding token.

    Raises:
        ModelError: none of the model's tokens will do; `source` names the model in its text.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < num_embeddings:
        return tokenizer.pad_token_id, []
    usable = sorted(number for number in eos_ids if number < num_embeddings)
    if not usable:
        raise ModelError(
            f"model {source!r} has neither a padding nor an end-of-sequence token: set "
            "pad_token in its tokenizer_config.json."
        )
    return usable[0], [
        f"The tokenizer has no padding token that the model knows; batches are padded with "
        f"end-of-sequence token {usable[0]}, which changes no answer."
    ]


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, size: int, eos_ids: frozenset[int]
) -> Vocabulary:
    """The vocabulary with all ids below `size`."""

    def decode(ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    added = tokenizer.added_tokens_decoder.items()
    special_ids = {token.content: number for number, token in added if token.special}
    return Vocabulary(decode, size, special_ids, eos_ids)
