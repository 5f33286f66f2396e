"""How often the quickstart model gives exactly the expected answer to held-out questions.

    python configs/quickstart/accuracy.py --quantization nf4

Ends with status 1 where a task is answered right less often than `REQUIRED_ACCURACY`.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from tasks import TASKS, Example, held_out_examples
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

MODEL_PATH = Path(__file__).parent / "model"
REQUIRED_ACCURACY = 0.95
MAX_NEW_TOKENS = 64
QUANTIZATIONS: dict[str, BitsAndBytesConfig | None] = {
    "none": None,
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def render_prompts(tokenizer: PreTrainedTokenizerBase, asked: list[Example]) -> list[str]:
    """The questions as the model reads them, up to where its answer starts."""
    chats = [[{"role": "user", "content": example.question}] for example in asked]
    rendered = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return cast(list[str], rendered)  # tokens only with tokenize=True


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Example]
) -> list[str]:
    """Greedy answers to one left-padded batch; an answer without an end is cut."""
    prompts = tokenizer(render_prompts(tokenizer, asked), padding=True, return_tensors="pt")
    tokens = model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS)
    prompt_length = prompts["input_ids"].shape[1]
    return tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_per_task: int = 250
) -> dict[str, float]:
    """The share of exact matches for each task, on questions that training never asked."""
    asked = held_out_examples(num_per_task)
    num_right = {make.__name__: 0 for make in TASKS}
    for start in range(0, len(asked), 100):
        batch = asked[start : start + 100]
        for example, answered in zip(batch, answer(model, tokenizer, batch), strict=True):
            num_right[example.task] += answered == example.expected
    return {task: num / num_per_task for task, num in num_right.items()}


def report(accuracy: Mapping[str, float]) -> bool:
    """Print a line for each task and one for all; tell whether each of them is enough."""
    shares = {**accuracy, "all": sum(accuracy.values()) / len(accuracy)}
    for task, share in shares.items():
        print(f"{task:8}{share:8.1%}")
    return min(shares.values()) >= REQUIRED_ACCURACY


def main() -> None:
    """Measure a saved model, quantized as it is loaded if so asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=QUANTIZATIONS[options.quantization]
    )
    sys.exit(not report(measure(model, tokenizer)))


if __name__ == "__main__":
    main()
