"""The continuous engine against transformers' own ways, same model, same prompts, alternating.

    python -m benchmarks.engines --workload gsm8k --rows 512 --rounds 3 [--json]

Random weights of 47M parameters in bfloat16. Every row asks for a number of tokens of its own and
no end-of-sequence token stops it earlier, so all engines owe the same tokens. Printed are useful
tokens per second: the median of the rounds, and the ratio to the first engine in the list.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.random_model import VOCABULARY_SIZE, prototype_config
from pipeline.continuous_engine import ContinuousEngine
from pipeline.model import Model
from pipeline.records import Request, RequestId, Sampling
from pipeline.stopping import Vocabulary

# Median, sigma and most of log-normal token counts, of prompts and of answers. gsm8k's fit the
# quantiles of that data set: 53/87/163 and 88/153/325 at the median, 90th percentile and maximum.
WORKLOADS = {
    "gsm8k": ((53, 0.39, 163), (88, 0.43, 325), 0),
    "long-tail": ((64, 0.8, 512), (48, 0.9, 384), 0),
    "few-shot": ((53, 0.39, 163), (32, 0.43, 64), 1000),
}


def draw_requests(workload: str, num_rows: int) -> list[Request]:
    """Random prompts; the same for the same arguments."""
    chance = random.Random(0)
    prompts, answers, num_shared = WORKLOADS[workload]
    shared = _tokens(chance, num_shared)
    return [
        Request(
            RequestId(0, row, 0),
            tuple(shared + _tokens(chance, _length(chance, *prompts))),
            Sampling(_length(chance, *answers)),
        )
        for row in range(num_rows)
    ]


def _length(chance: random.Random, median: int, sigma: float, most: int) -> int:
    return max(1, min(most, round(median * math.exp(chance.gauss(0, sigma)))))


def _tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(3, VOCABULARY_SIZE) for _ in range(count)]


def make_model() -> Model:
    """A model without a tokenizer and without an end-of-sequence token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(prototype_config()).to(torch.bfloat16).eval()
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


class _OwnLengths(StoppingCriteria):
    """Ends each row after the tokens it asked for."""

    def __init__(self, batch: Sequence[Request]) -> None:
        self._lengths = torch.tensor([request.sampling.max_new_tokens for request in batch])
        self._num_steps = 0

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        self._num_steps += 1
        return self._lengths <= self._num_steps


def continuous(model: Model, requests: Sequence[Request], num_slots: int) -> None:
    """Ours."""
    engine = ContinuousEngine(model, num_slots)
    engine.add(requests)
    num_done = 0
    while engine.num_waiting + engine.num_running:
        num_done += len(engine.step())
    assert num_done == len(requests), "every request ends once"


def generate(model: Model, requests: Sequence[Request], batch_size: int, is_sorted: bool) -> None:
    """`model.generate` on left-padded batches; sorted is what our static engine does."""
    todo = list(requests)
    if is_sorted:
        todo.sort(key=lambda request: -len(request.prompt_ids))
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        width = max(len(request.prompt_ids) for request in batch)
        padding = [width - len(request.prompt_ids) for request in batch]
        ids = [[0] * n + list(r.prompt_ids) for n, r in zip(padding, batch, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        most = max(request.sampling.max_new_tokens for request in batch)
        model.model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            generation_config=GenerationConfig(
                max_new_tokens=most, do_sample=False, pad_token_id=0
            ),
            stopping_criteria=StoppingCriteriaList([_OwnLengths(batch)]),
        )


def transformers_continuous(
    model: Model, requests: Sequence[Request], config: ContinuousBatchingConfig | None
) -> None:
    """transformers' ContinuousBatchingManager."""
    manager = model.model.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=400),
        config,
    )
    manager.start()
    try:
        for request in requests:
            most = request.sampling.max_new_tokens
            manager.add_request(list(request.prompt_ids), max_new_tokens=most, eos_token_id=-1)
        for _ in requests:
            result = manager.get_result(timeout=600)
            assert result is not None, "transformers' continuous batching has ended early"
    finally:
        manager.stop(block=True)


Engine = Callable[[Model, Sequence[Request]], None]


def engines(num_slots: int) -> dict[str, Engine]:
    """By name; the first is what the others are compared with."""
    tuned = ContinuousBatchingConfig(max_requests_per_batch=48, max_batch_tokens=1024, page_size=64)
    return {
        f"continuous, {num_slots} slots": lambda m, r: continuous(m, r, num_slots),
        "generate, 32, sorted": lambda m, r: generate(m, r, 32, True),
        "generate, 32, file order": lambda m, r: generate(m, r, 32, False),
        "generate, 8, file order": lambda m, r: generate(m, r, 8, False),
        "transformers' continuous": lambda m, r: transformers_continuous(m, r, None),
        "transformers' continuous, tuned": lambda m, r: transformers_continuous(m, r, tuned),
    }


def measure(
    model: Model, requests: Sequence[Request], chosen: dict[str, Engine], rounds: int
) -> dict[str, list[float]]:
    """Useful tokens per second of each round, engine after engine in every round."""
    num_tokens = sum(request.sampling.max_new_tokens for request in requests)
    for run in chosen.values():
        run(model, requests[:4])  # warm-up
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, run in chosen.items():
            started = time.perf_counter()
            run(model, requests)
            rates[name].append(num_tokens / (time.perf_counter() - started))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="gsm8k")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", help="engines whose name contains one of these")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = {
        name: run
        for name, run in engines(options.slots).items()
        if not options.only or any(part in name for part in options.only)
    }
    requests = draw_requests(options.workload, options.rows)
    rates = measure(make_model(), requests, chosen, options.rounds)
    if options.json:
        print(json.dumps({"options": vars(options), "tokens_per_second": rates}))
        return
    print(f"{options.workload}, {options.rows} rows, {options.rounds} rounds")
    first = statistics.median(next(iter(rates.values())))
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"  {name:<34} {median:7.0f} tokens/s   first / this {first / median:5.2f}")


if __name__ == "__main__":
    main()
