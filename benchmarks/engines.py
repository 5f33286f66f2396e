"""The continuous engine against transformers' own ways, same model, same prompts, alternating.

    python -m benchmarks.engines --workload gsm8k --rows 512 --rounds 3 [--json]
    python -m benchmarks.engines --prompts train.jsonl --prompt question --answer answer

Random weights of 47M parameters in bfloat16, or `--model`. Printed are useful tokens per second:
the median of the rounds, and how many times faster the first engine of the list is. Of ours also
how full its slots were, before the last rows drained, and what part of the time went into choosing
the likeliest tokens and into bookkeeping, which is all that is neither that nor the model (on a
CPU, where a call ends when its work is done).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from benchmarks.random_model import VOCABULARY_SIZE, prototype_config, train_tokenizer
from benchmarks.rivals import TUNED, continuous_batching, generate, text_generation
from benchmarks.workloads import WORKLOADS, draw_requests, read_requests
from pipeline.checkpoint import fetch
from pipeline.continuous_engine import ContinuousEngine
from pipeline.model import Model, load_model
from pipeline.records import Request
from pipeline.sampling import greedy
from pipeline.settings import EngineSettings, ModelSettings
from pipeline.stepping import Stepping
from pipeline.stopping import Vocabulary

Engine = Callable[[Model, Sequence[Request]], "Report | None"]
Report = dict[str, float]
"""What our engine says of one round."""


def make_model() -> Model:
    """A model without a tokenizer and without an end-of-sequence token."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(prototype_config()).to(device, torch.bfloat16).eval()
    model.generation_config = GenerationConfig()
    return Model(
        model=model,
        tokenizer=None,  # type: ignore[arg-type] # nothing is decoded
        device=model.device,
        vocabulary=Vocabulary(lambda ids: "", VOCABULARY_SIZE, {}, frozenset()),
        pad_id=0,
        num_embeddings=VOCABULARY_SIZE,
        context_length=model.config.max_position_embeddings,
        num_parameters=model.num_parameters(),
        num_weight_bytes=0,
        dtype=torch.bfloat16,
        quantization="none",
        load_seconds=0.0,
    )


def continuous(
    model: Model, requests: Sequence[Request], num_slots: int, stepping: Stepping | None = None
) -> Report:
    """Ours."""
    engine = ContinuousEngine(model, num_slots, stepping=stepping)
    engine.add(requests)
    num_done, full = 0, engine.metrics
    started = time.perf_counter()
    with _timing(model) as in_model, _timing_choice() as choosing:
        while engine.num_waiting + engine.num_running:
            num_done += len(engine.step())
            if engine.num_waiting:
                full = engine.metrics
    seconds = time.perf_counter() - started
    assert num_done == len(requests), "every request ends once"
    return {
        "slot occupancy before the drain": full.slot_occupancy,
        "slot occupancy": engine.metrics.slot_occupancy,
        "prefill share": engine.metrics.prefill_seconds / seconds,
        "choosing tokens": sum(choosing) / seconds,
        "bookkeeping": 1 - (sum(in_model) + sum(choosing)) / seconds,
    }


def without_sharing(model: Model, requests: Sequence[Request], num_slots: int) -> None:
    """Ours, told that no prompts begin alike."""
    with mock.patch("pipeline.waiting.best_prefix", return_value=()):
        continuous(model, requests, num_slots)


@contextmanager
def _timing(model: Model) -> Iterator[list[float]]:
    """Collects the seconds of each call of the model."""
    seconds: list[float] = []
    started = 0.0

    def before(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    hooks = [
        model.model.register_forward_pre_hook(before),
        model.model.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - started)),
    ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _timing_choice() -> Iterator[list[float]]:
    """Collects the seconds of each choice of the likeliest tokens."""
    seconds: list[float] = []

    def timed(logits: Tensor) -> Tensor:
        started = time.perf_counter()
        tokens = greedy(logits)
        seconds.append(time.perf_counter() - started)
        return tokens

    with mock.patch("pipeline.decoder.greedy", timed), mock.patch("pipeline.batch.greedy", timed):
        yield seconds


def engines(num_slots: int) -> dict[str, Engine]:
    """By name; the first that is chosen is what the others are compared with."""
    called: dict[str, Engine] = {
        f"continuous, {num_slots} slots, no graphs": lambda m, r: continuous(
            m, r, num_slots, Stepping(reads_behind=True)
        )
    }
    return {
        f"continuous, {num_slots} slots": lambda m, r: continuous(m, r, num_slots),
        **(called if torch.cuda.is_available() else {}),
        "continuous, without sharing": lambda m, r: without_sharing(m, r, num_slots),
        "generate, 32, sorted": lambda m, r: generate(m, r, 32, True),
        "generate, 32, file order": lambda m, r: generate(m, r, 32, False),
        "generate, 8, file order": lambda m, r: generate(m, r, 8, False),
        'pipeline("text-generation"), 32': lambda m, r: text_generation(m, r, 32),
        "transformers' continuous": lambda m, r: continuous_batching(m, r, None),
        "transformers' continuous, tuned": lambda m, r: continuous_batching(m, r, TUNED),
    }


def measure(
    model: Model, requests: Sequence[Request], chosen: dict[str, Engine], rounds: int
) -> tuple[dict[str, list[float]], list[Report]]:
    """Useful tokens per second of each round, engine after engine in every round."""
    num_tokens = sum(request.sampling.max_new_tokens for request in requests)
    for run in chosen.values():
        model.model.set_attn_implementation("sdpa")
        run(model, requests[:4])  # warm-up
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    reports: list[Report] = []
    for _ in range(rounds):
        for name, run in chosen.items():
            model.model.set_attn_implementation("sdpa")  # ours chooses its own
            started = time.perf_counter()
            report = run(model, requests)
            rates[name].append(num_tokens / (time.perf_counter() - started))
            reports += [report] if report else []
    return rates, reports


def main() -> None:
    """Measures and prints."""
    options = _options()
    torch.set_num_threads(options.threads)
    chosen = {
        name: run
        for name, run in engines(options.slots).items()
        if not options.only or any(part in name for part in options.only)
    }
    model = _load(options.model) if options.model else make_model()
    requests = _requests(options, model)
    rates, reports = measure(model, requests, chosen, options.rounds)
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        print(json.dumps({"options": settings, "tokens_per_second": rates, "reports": reports}))
        return
    source = options.prompts.name if options.prompts else options.workload
    print(f"{source}, {len(requests)} rows, {options.rounds} rounds")
    first = statistics.median(next(iter(rates.values())))
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"  {name:<34} {median:7.0f} tokens/s   first / this {first / median:5.2f}")
    for fact in reports[0] if reports else ():
        print(f"  {fact:<34} {statistics.median(report[fact] for report in reports):7.1%}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="gsm8k")
    parser.add_argument("--prompts", type=Path, help="JSONL file to take lengths and words from")
    parser.add_argument("--prompt", default="question", help="its prompts' key")
    parser.add_argument("--answer", default="answer", help="its answers' key")
    parser.add_argument("--model", help="hub id or folder, instead of random weights")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=EngineSettings().batch_size)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", help="engines whose name contains one of these")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _load(path: str) -> Model:
    settings = ModelSettings(path=path)
    model = load_model(fetch(settings), settings)
    # Our own lengths end the rows, in every engine.
    model.model.generation_config = GenerationConfig()
    return replace(model, vocabulary=Vocabulary(lambda ids: "", 0, {}, frozenset()))


def _requests(options: argparse.Namespace, model: Model) -> list[Request]:
    if not options.prompts:
        return draw_requests(WORKLOADS[options.workload], options.rows, model.num_embeddings)
    tokenizer = model.tokenizer
    if tokenizer is None:
        tokenizer = train_tokenizer(options.prompts.read_text(encoding="utf-8").splitlines())
    return read_requests(
        options.prompts, options.prompt, options.answer, tokenizer.encode, options.rows
    )


if __name__ == "__main__":
    main()
