"""Small random models and tokenizers, made on the spot: there is no network in a test.

The weights are scaled up so that answers differ from prompt to prompt and end at different times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.checkpoint import fetch
from pipeline.model import Model, load_model
from pipeline.settings import ModelSettings

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PAD_ID, BOS_ID, EOS_ID, IM_START_ID, IM_END_ID = range(5)
VOCABULARY_SIZE = 400
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "Question: If 12 apples cost 3 dollars, how much do 20 apples cost?\nAnswer: 5 dollars.\n\n",
    "Question: Wie heißt die Hauptstadt von Österreich?\nAnswer: Wien, natürlich.\n\n",
    "Question: 東京はどこですか?\nAnswer: 日本です 🗾🎉.\n\n",
    "The quick brown fox jumps over the lazy dog; then it rests, and the dog does too.\n",
)


def byte_level_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Like GPT-2's and most of today's: tokens are bytes, a character may be split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return _wrapped(tokenizer, special)


def sentencepiece_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Like Llama 2's: `▁` for a space, one stripped at the start, bytes as `<0xE2>`."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 256, show_progress=False, special_tokens=list(SPECIAL_TOKENS)
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trained.train_from_iterator(CORPUS[:2] * 4, trainer)
    vocabulary, merges = _with_bytes(trained)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=None, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    return _wrapped(tokenizer, special)


def make_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A Llama of two layers with grouped keys, saved with a byte-level tokenizer."""
    options = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    return make_model(folder, LlamaConfig(**{**options, **changes}), seed=seed)


def make_gpt2(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A GPT-2 of two layers, whose positions are a table that must not be left."""
    options = {
        "vocab_size": VOCABULARY_SIZE,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    return make_model(folder, GPT2Config(**{**options, **changes}), seed=seed)


def make_model(
    folder: Path,
    config: PretrainedConfig,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
) -> Path:
    """Saves a random model of this configuration and a tokenizer; returns the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scale_up(model)
    model.save_pretrained(folder)
    (tokenizer or byte_level_tokenizer()).save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> Model:
    """The model of a folder on one thread; `settings` are further ones of the model block."""
    block = ModelSettings(path=str(folder), **settings)
    return load_model(fetch(block), block, num_threads=1)


def scale_up(model: PreTrainedModel, factor: float = 8.0) -> None:
    """Makes the matrices larger: as initialized, a model repeats one token whatever the prompt."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


def _with_bytes(trained: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The trained vocabulary and merges, with the 256 byte tokens that follow the special ones."""
    names = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    num_special = len(SPECIAL_TOKENS)
    all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    names[num_special:num_special] = all_bytes
    merges = json.loads(trained.to_str())["model"]["merges"]
    return {name: number for number, name in enumerate(names)}, [tuple(pair) for pair in merges]


def _wrapped(tokenizer: Tokenizer, special: dict[str, str]) -> PreTrainedTokenizerFast:
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **special}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
