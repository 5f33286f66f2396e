"""Requests whose prompts and answers have the lengths of real ones.

Every row asks for a number of tokens of its own and nothing ends it earlier, so that all engines
owe the same tokens.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.records import Request, RequestId, Sampling
from pipeline.sampling import random_key


@dataclass(frozen=True)
class Lengths:
    """Log-normal token counts: their median, their sigma, and the most there are."""

    median: int
    sigma: float
    most: int

    def draw(self, chance: random.Random) -> int:
        """One of them, at least 1."""
        drawn = self.median * math.exp(chance.gauss(0, self.sigma))
        return max(1, min(self.most, round(drawn)))


@dataclass(frozen=True)
class Workload:
    """What a set of requests is like.

    Attributes:
        num_shared: tokens that all prompts begin with.
        num_samples: completions of each prompt, drawn at temperature 1 if several.
    """

    prompts: Lengths
    answers: Lengths
    num_shared: int = 0
    num_samples: int = 1


# gsm8k's fit the quantiles of that data set: 53/87/163 and 88/153/325 tokens at the median, the
# 90th percentile and at most.
QUESTIONS, ANSWERS = Lengths(53, 0.39, 163), Lengths(88, 0.43, 325)
WORKLOADS = {
    "gsm8k": Workload(QUESTIONS, ANSWERS),
    "long-tail": Workload(Lengths(64, 0.8, 512), Lengths(48, 0.9, 384)),
    "few-shot": Workload(QUESTIONS, Lengths(32, 0.43, 64), num_shared=1000),
    "samples": Workload(QUESTIONS, ANSWERS, num_samples=4),
}


def draw_requests(workload: Workload, num_rows: int, num_tokens: int) -> list[Request]:
    """Random prompts of token ids below `num_tokens`; the same for the same arguments.

    Args:
        num_rows: requests, the samples of a prompt counted.
    """
    chance = random.Random(0)
    shared = _tokens(chance, workload.num_shared, num_tokens)
    requests: list[Request] = []
    while len(requests) < num_rows:
        prompt = shared + _tokens(chance, workload.prompts.draw(chance), num_tokens)
        for sample in range(workload.num_samples):
            length = workload.answers.draw(chance)
            requests.append(_request(len(requests), sample, prompt, length, workload.num_samples))
    return requests[:num_rows]


def read_requests(
    path: Path, prompt: str, answer: str, encode: Callable[[str], list[int]], num_rows: int
) -> list[Request]:
    """The first rows of a JSONL file: their prompts, to be answered at their answers' lengths."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(num_rows), strict=False)]
    return [
        _request(row, 0, encode(values[prompt]), max(1, len(encode(values[answer]))), 1)
        for row, values in enumerate(rows)
    ]


def _request(
    row: int, sample: int, prompt: Sequence[int], length: int, num_samples: int
) -> Request:
    temperature = 0.0 if num_samples == 1 else 1.0
    return Request(
        RequestId(0, row, sample),
        tuple(prompt),
        Sampling(length, ignore_eos=True, temperature=temperature),
        random_key(0, str(row), sample),
    )


def _tokens(chance: random.Random, count: int, num_tokens: int) -> list[int]:
    return [chance.randrange(3, num_tokens) for _ in range(count)]
