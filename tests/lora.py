"""Small random LoRA adapters, made on the spot and strong enough to change every answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def make_lora(base: Path, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Saves an adapter as peft does."""
    random_lora(base, seed=seed, **changes).save_pretrained(folder)
    return folder


def random_lora(base: Path, *, seed: int = 0, **changes: Any) -> PeftModel:
    """A model with an adapter that has learned noise."""
    torch.manual_seed(seed)
    options = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "init_lora_weights": False,
    }
    model = AutoModelForCausalLM.from_pretrained(base)
    return get_peft_model(model, LoraConfig(**{**options, **changes}))


def make_two_loras(base: Path, folder: Path) -> dict[str, str]:
    """By name, which need not be a word: two adapters of other ranks and layers."""
    make_lora(base, folder / "one", seed=1)
    make_lora(base, folder / "two", seed=2, r=8, target_modules=["o_proj", "v_proj", "down_proj"])
    return {"one": str(folder / "one"), "a.b c": str(folder / "two")}
