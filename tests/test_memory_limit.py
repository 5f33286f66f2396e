from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.batch import Batch
from pipeline.continuous_engine import ContinuousEngine
from pipeline.errors import OutputError
from pipeline.memory_limit import KeptMemoryLimit
from tests.bare_models import answers, bare_llama, reference, texts, varied


def test_what_one_worker_learned_another_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second engine meets the same shortage, and never runs into it."""
    model, path = bare_llama(), tmp_path / "memory.json"
    decode = Batch.decode
    most_rows: list[int] = []

    def short_of_memory(batch: Batch) -> object:
        most_rows.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(batch)

    monkeypatch.setattr(Batch, "decode", short_of_memory)
    requests = varied(12)
    first = ContinuousEngine(model, num_slots=8, limit=KeptMemoryLimit(path, "cpu"))
    found = texts(answers(first, requests))
    assert first.metrics.num_out_of_memory > 0

    second = ContinuousEngine(model, num_slots=8, limit=KeptMemoryLimit(path, "cpu"))
    assert texts(answers(second, requests)) == found
    assert second.metrics.num_out_of_memory == 0

    monkeypatch.undo()
    other = ContinuousEngine(model, num_slots=8, limit=KeptMemoryLimit(path, "NVIDIA H200"))
    assert texts(answers(other, requests)) == texts(reference(model, requests)) == found
    assert max(most_rows) == 8


def test_the_lowest_limit_of_each_device_is_kept(tmp_path: Path) -> None:
    """Whoever writes last, and other devices keep theirs."""
    path = tmp_path / "memory.json"
    one, two = KeptMemoryLimit(path, "a"), KeptMemoryLimit(path, "a")
    one.lower(100)
    two.lower(300)
    KeptMemoryLimit(path, "b").lower(50)
    assert json.loads(path.read_text()) == {"a": 100, "b": 50}
    assert KeptMemoryLimit(path, "a").max_tokens == 100
    assert list(tmp_path.iterdir()) == [path]


def test_a_limit_that_cannot_be_kept_is_an_output_error(tmp_path: Path) -> None:
    """As with anything else that cannot be written to the run folder."""
    with pytest.raises(OutputError):
        KeptMemoryLimit(tmp_path / "gone" / "memory.json", "a").lower(5)
