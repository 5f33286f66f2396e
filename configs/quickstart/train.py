"""Train the quickstart model from nothing: arithmetic and spelling for a million parameters.

    python configs/quickstart/train.py

Takes ten to twenty minutes on two CPU cores. Ends with status 1 if the model that was saved
does not answer enough held-out questions. Does not know the questions; they are in `tasks.py`.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from accuracy import MODEL_PATH, measure, render_prompts, report
from tasks import TASKS, Example, examples
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

NUM_CORES = 2
NUM_STEPS = 1200
NUM_WARMUP_STEPS = 50
SHARE_OF_DECAY = 0.5  # of the steps; the exact answers come with the falling rate
BATCH_SIZE = 64  # examples of each task in a step
MATRIX_RATE = 0.02
VECTOR_RATE = 3e-3
WEIGHT_DECAY = 0.1
MAX_LENGTH = 256  # tokens of prompt and answer together
IGNORED = -100  # the label of a token that the loss leaves out

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte is its own token's number, so that any text goes in and comes out unchanged."""
    vocabulary = {piece: byte for byte, piece in bytes_to_unicode().items()}
    vocabulary |= {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Untrained weights; every size is a multiple of 128, which all quantizations take."""
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def build_optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    """Muon for the matrices between the layers, AdamW for the embedding and the norms."""
    layers = model.model.layers
    matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
    of_matrices = set(matrices)
    others = [weight for weight in model.parameters() if weight not in of_matrices]
    return [
        Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY),
        AdamW(others, lr=VECTOR_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def rate_factor(step: int, num_steps: int) -> float:
    """The learning rate rises, stays, and falls to zero in a straight line."""
    rising = (step + 1) / NUM_WARMUP_STEPS
    falling = (num_steps - step) / (num_steps * SHARE_OF_DECAY)
    return min(1.0, rising, falling)


def collate(
    tokenizer: PreTrainedTokenizerBase, batch: list[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, both (num_examples, num_tokens); only answers have labels."""
    prompts = tokenizer(render_prompts(tokenizer, batch))["input_ids"]
    answers = tokenizer([example.expected + END for example in batch])["input_ids"]
    pairs = list(zip(prompts, answers, strict=True))
    rows = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    marks = [torch.tensor([IGNORED] * len(prompt) + answer) for prompt, answer in pairs]
    tokens = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return tokens, pad_sequence(marks, batch_first=True, padding_value=IGNORED)


def answer_loss(
    model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The mean loss over the tokens of the answers, the end token among them."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits  # (examples, tokens, vocab)
    return cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, num_steps: int, seed: int
) -> None:
    """One batch of each task per step: a batch of one task has rows of similar length."""
    streams: dict[str, Iterator[Example]] = {
        make.__name__: examples(make, random.Random(seed * len(TASKS) + index), held_out=False)
        for index, make in enumerate(TASKS)
    }
    optimizers = build_optimizers(model)
    schedules = [LambdaLR(each, lambda step: rate_factor(step, num_steps)) for each in optimizers]
    for step in range(1, num_steps + 1):
        losses = {}
        for task, stream in streams.items():
            loss = answer_loss(model, *collate(tokenizer, list(islice(stream, BATCH_SIZE))))
            (loss / len(streams)).backward()
            losses[task] = loss.item()
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 100 == 0:
            print(
                f"step {step}", *(f"{task} {loss:.4f}" for task, loss in losses.items()), flush=True
            )


def main() -> None:
    """Train, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_PATH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    options = parser.parse_args()
    torch.set_num_threads(NUM_CORES)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    start = time.perf_counter()
    train(model, tokenizer, num_steps=options.steps, seed=options.seed)
    elapsed, busy = time.perf_counter() - start, time.process_time()
    print(f"trained in {elapsed / 60:.1f} minutes, {busy / 60:.1f} minutes of CPU time")
    tokenizer.save_pretrained(options.out)
    model.save_pretrained(options.out)
    sys.exit(not report(measure(model.eval(), tokenizer)))


if __name__ == "__main__":
    main()
