"""A model of random weights and a tokenizer trained on the prompts at hand: speed without a hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY_SIZE = 8192


def prototype_config() -> LlamaConfig:
    """12 layers, hidden 576, 9 heads, 3 KV heads, intermediate 1536, 8,192 tokens: 47M."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def make_random_llama(
    folder: Path, texts: Iterable[str], dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A folder with the prototype's model, and a tokenizer for texts like these."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(prototype_config()).to(dtype)
    # Larger than they come, so that answers differ and a change of one shows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.5)
    model.save_pretrained(folder)
    train_tokenizer(texts).save_pretrained(folder)
    return folder


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY_SIZE` byte pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
