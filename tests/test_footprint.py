"""The memory estimate against what a loaded model really takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import fetch
from pipeline.footprint import estimate_footprint
from pipeline.model import load_model
from pipeline.settings import ModelSettings
from tests.models import make_llama


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_estimate_is_near_the_truth(tmp_path: Path, quantization: str) -> None:
    """Weights within a tenth, for each quantization, without loading anything."""
    folder = make_llama(
        tmp_path / "model", hidden_size=128, intermediate_size=512, num_hidden_layers=4
    )
    settings = ModelSettings(path=str(folder), quantization=quantization)
    checkpoint = fetch(settings)
    estimate = estimate_footprint(checkpoint, settings)
    loaded = load_model(checkpoint, settings)
    assert estimate.weights == pytest.approx(loaded.num_weight_bytes, rel=0.1)


def test_the_cache_is_counted_per_token(llama_folder: Path) -> None:
    """Keys and values of two layers with two heads of eight numbers of four bytes."""
    settings = ModelSettings(path=str(llama_folder))
    estimate = estimate_footprint(fetch(settings), settings)
    assert estimate.cache_per_token == 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("kinds", "num_attending"),
    [
        ({"layer_types": ["linear_attention", "linear_attention", "full_attention"]}, 1),
        ({"layer_types": ["sliding_attention", "full_attention"]}, 2),
        ({"layers_block_type": ["mamba", "attention", "hybrid"]}, 2),
        ({"layer_types": None}, 2),
    ],
)
def test_only_layers_that_attend_have_a_cache(
    tmp_path: Path, llama_folder: Path, kinds: dict[str, Any], num_attending: int
) -> None:
    """What a recurrent layer keeps does not grow with the tokens."""
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **kinds}))
    settings = ModelSettings(path=str(folder))
    estimate = estimate_footprint(fetch(settings), settings)
    assert estimate.cache_per_token == num_attending * 2 * 2 * 8 * 4


def test_weights_are_counted_as_they_are(tmp_path: Path) -> None:
    """A configuration may name another type than the files have, or none."""
    folder = make_llama(tmp_path / "model", dtype="float32")
    settings = ModelSettings(path=str(folder))
    plain = estimate_footprint(fetch(settings), settings).weights
    for name, share in (("bfloat16", 0.5), (None, 1.0)):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": name}))
        estimate = estimate_footprint(fetch(settings), settings)
        assert estimate.weights == pytest.approx(share * plain, rel=0.01)


def test_fp8_stays_packed_on_a_gpu(tmp_path: Path) -> None:
    """A model that a GPU holds packed must not be refused for what it would be unpacked."""
    folder = make_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    packed = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = ModelSettings(path=str(folder))
    estimates = [
        estimate_footprint(fetch(settings), settings, has_gpu).weights for has_gpu in (True, False)
    ]
    size = (folder / "model.safetensors").stat().st_size
    assert estimates[0] == size
    assert estimates[1] > 3.5 * size


@pytest.mark.parametrize(
    "odd",
    [
        {"num_attention_heads": [4, 8], "head_dim": None},
        {"num_attention_heads": None, "num_key_value_heads": "2", "head_dim": None},
        {"num_key_value_heads": [1, 2]},
        {"hidden_size": None, "head_dim": None},
        {"text_config": None},
    ],
)
def test_odd_configurations_are_no_error(tmp_path: Path, odd: dict[str, Any]) -> None:
    """What is not understood is not counted: an estimate must not keep a model from running."""
    folder = make_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **odd}))
    settings = ModelSettings(path=str(folder))
    assert estimate_footprint(fetch(settings), settings).weights > 0
