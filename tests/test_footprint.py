"""The memory estimate against what a loaded model really takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.checkpoint import fetch
from pipeline.footprint import estimate_footprint
from pipeline.model import load_model
from pipeline.settings import ModelSettings, Quantization
from tests.models import make_llama


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_estimate_is_near_the_truth(tmp_path: Path, quantization: Quantization) -> None:
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
