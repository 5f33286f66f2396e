"""What `bench` asks of the process in which it measures one model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from jobs.isolated import Service, Tell
from pipeline.bench_specs import CellQuestion, SampleSpec, SpeedSpec
from pipeline.checkpoint import fetch
from pipeline.errors import ModelError
from pipeline.measured import Cell, ModelFacts, Sampled
from pipeline.model import Model, load_model
from pipeline.peak_memory import peak_bytes, reset_peak, stay_within_free_memory
from pipeline.room import default_cache_bytes
from pipeline.sampled import run_sample
from pipeline.self_check import self_check
from pipeline.settings import EngineSettings
from pipeline.speed import SpeedMeter, set_attention


def open_service(spec: SpeedSpec | SampleSpec, tell: Tell) -> tuple[Service, ModelFacts]:
    """Loads a model; facts about it, and what measures it as the questions ask.

    Raises:
        ModelError: it cannot be loaded, or not be measured so.
        ResourceError: it does not fit into memory.
    """
    reset_peak(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(fetch(spec.model, local_files_only=True), spec.model)
    if isinstance(spec, SampleSpec):
        facts = _facts(model)
        stay_within_free_memory(model.device)
        return _sampling(model, spec), facts
    if spec.attention is not None:
        set_attention(model, spec.attention)
    facts = _facts(model)
    stay_within_free_memory(model.device)
    return _measuring(model, spec, facts)


def _sampling(model: Model, spec: SampleSpec) -> Service:
    def answer_rows(question: None, tell: Tell) -> Sampled:
        return run_sample(model, spec, tell)

    return answer_rows


def _measuring(model: Model, spec: SpeedSpec, facts: ModelFacts) -> tuple[Service, ModelFacts]:
    """The facts with the attention that a job would have, which may be another than it came with.

    Raises:
        ModelError: it is not the one that was asked for, since that changes answers.
    """
    check = self_check(model, EngineSettings()) if spec.model.self_check else None
    if check is not None and spec.attention not in (None, check.attention):
        raise ModelError(
            f"attention {spec.attention} cannot be used ({'; '.join(check.rejected)}): a job "
            f"takes {check.attention}"
        )
    meter = SpeedMeter(model, check)
    if check is not None:
        facts = replace(facts, attention=check.attention)

    def measure(question: CellQuestion, tell: Tell) -> Cell:
        return meter.measure(question.shape, question.max_seconds)

    return measure, facts


def _facts(model: Model) -> ModelFacts:
    config: Any = model.model.config
    return ModelFacts(
        architecture=type(model.model).__name__,
        num_parameters=model.num_parameters,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=model.quantization,
        attention=str(config._attn_implementation),
        device=model.device_name,
        num_threads=torch.get_num_threads(),
        num_weight_bytes=model.num_weight_bytes,
        loaded_bytes=peak_bytes(model.device),
        load_seconds=model.load_seconds,
        context_length=model.context_length,
        job_cache_bytes=sum(default_cache_bytes(model.devices).values()),
    )
