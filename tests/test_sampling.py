from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.records import Request, RequestId, Sampling
from pipeline.sampling import Sampler, draw, random_key, uniform
from pipeline.stopping import Vocabulary

CPU = torch.device("cpu")
NUM_TOKENS = 500
EOS_IDS = [3, 4]
# Some models can read a token, such as 900, that they cannot write.
VOCABULARY = Vocabulary(lambda ids: "", NUM_TOKENS, {"<|end|>": 7}, frozenset([*EOS_IDS, 900]))
SETTINGS = [
    Sampling(1, temperature=1.0),
    Sampling(1, temperature=0.7, top_k=50),
    Sampling(1, temperature=1.3, top_p=0.9),
    Sampling(1, temperature=0.6, min_p=0.1),
    Sampling(1, temperature=0.9, top_k=1),
    Sampling(1, temperature=0.8, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
    Sampling(1, temperature=1.0, top_k=10_000, top_p=0.01),
    Sampling(1, temperature=1.0, top_p=1e-9),
    Sampling(1, temperature=2.0, min_p=1.0, repetition_penalty=0.8),
    Sampling(1, temperature=0.0, repetition_penalty=1.2),
    Sampling(1),
]


def sampler(*rows: Sampling, keys: list[int] | None = None) -> Sampler:
    """A sampler of rows with these settings and keys."""
    numbers = keys or list(range(len(rows)))
    requests = [
        Request(RequestId(0, row, 0), (1,), sampling, key)
        for row, (sampling, key) in enumerate(zip(rows, numbers, strict=True))
    ]
    return Sampler(requests, VOCABULARY, CPU)


def reference(sampling: Sampling) -> LogitsProcessorList:
    """What `generate` puts together for one row, in its order."""
    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
        steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        steps += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p > 0 else []
    return LogitsProcessorList(steps)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_filters_equal_those_of_transformers(seed: int, dtype: torch.dtype) -> None:
    """In a batch of unlike rows, each keeps exactly the tokens and scores it gets by itself."""
    torch.manual_seed(seed)
    # As bfloat16, many logits are equal, and ties at a limit must be treated alike.
    logits = (torch.randn(len(SETTINGS), NUM_TOKENS) * 4).to(dtype).float()
    logits[:, :9] -= 300  # probability 0 in float32, yet not filtered out unless asked
    seen_ids = torch.randint(NUM_TOKENS, (len(SETTINGS), 60))
    seen = torch.zeros(len(SETTINGS), NUM_TOKENS, dtype=torch.bool).scatter_(1, seen_ids, True)
    scores = sampler(*SETTINGS).process(logits, seen=seen)
    for row, sampling in enumerate(SETTINGS):
        expected = reference(sampling)(seen_ids[row : row + 1], logits[row : row + 1])
        assert torch.equal(scores[row], expected[0]), sampling


def test_nothing_ends_a_row_too_early() -> None:
    """Until `min_new_tokens` are there, as in `generate`; then the scores are left alone."""
    rows = [
        Sampling(9, min_new_tokens=2),
        Sampling(9, min_new_tokens=3, stop_token_ids=(8,), stop=("<|end|>", "text")),
        Sampling(9, min_new_tokens=3, stop_token_ids=(8,), ignore_eos=True),
        Sampling(9),
    ]
    endings = [EOS_IDS, [*EOS_IDS, 7, 8], [8], []]
    logits = torch.randn(len(rows), NUM_TOKENS)
    for steps in (
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([1, 2, 3, 0]),
        torch.tensor([2, 3, 1, 1]),
    ):
        scores = sampler(*rows).process(logits, steps)
        for row, step in enumerate(steps.tolist()):
            processor = MinNewTokensLengthLogitsProcessor(
                prompt_length_to_skip=5,
                min_new_tokens=rows[row].min_new_tokens,
                eos_token_id=endings[row] or [0],
                device="cpu",
            )
            ids = torch.zeros(1, 5 + step, dtype=torch.int64)
            assert torch.equal(scores[row], processor(ids, logits[row : row + 1])[0])


@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 3}])
def test_nothing_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    """A tensor that is made there at once would; so would a list of places to write to."""
    vocabulary = Vocabulary(lambda ids: "", 8, {}, frozenset([1, 2, 9]))
    requests = [Request(RequestId(0, row, 0), (3,), Sampling(9, **options)) for row in range(3)]

    def strict(*args: Any, device: object = None, **kwargs: Any) -> Tensor:
        assert device is None, "this copy waits"
        return tensor(*args, **kwargs)

    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", strict)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__setitem__", None)
        scores = Sampler(requests, vocabulary, torch.device("cpu")).process(torch.zeros(3, 8))
    is_early = bool(options)
    assert scores.isinf().sum().item() == is_early * 3 * 2


def test_top_p_at_its_limit() -> None:
    """Tokens that are together exactly what is to be cut are cut, as in transformers."""
    logits = torch.zeros(1, 4)
    scores = sampler(Sampling(1, temperature=1.0, top_p=0.5)).process(logits)
    assert torch.equal(scores, TopPLogitsWarper(0.5)(torch.zeros(1, 1).long(), logits))
    assert scores.isfinite().sum() == 2


def test_greedy_takes_the_highest_score() -> None:
    """Temperature 0 is argmax, also beside sampled rows and whatever the key."""
    torch.manual_seed(0)
    logits = torch.randn(3, NUM_TOKENS)
    chooser = sampler(Sampling(1), Sampling(1, temperature=1.0), Sampling(1), keys=[7, 8, 9])
    picked = chooser.pick(chooser.process(logits), 4)
    assert picked[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()


def test_draws_follow_the_distribution() -> None:
    """The frequencies of many draws fit the probabilities (chi-square, far from its tail)."""
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.0625, 0.0625])
    keys = torch.tensor([signed(random_key(0, f"rows#{row}", 0)) for row in range(20_000)])
    tokens = draw(probabilities.expand(len(keys), -1), uniform(keys, 3))
    counts = torch.bincount(tokens, minlength=6).double()
    assert counts[1] == 0
    expected = probabilities.double() * len(keys)
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.5  # of 4 degrees of freedom, 99.9 % are below


def test_chance_depends_on_nothing_else_in_the_batch() -> None:
    """A row draws the same tokens alone and in any company and place."""
    torch.manual_seed(1)
    rows = [Sampling(1, temperature=1.0, top_k=20), Sampling(1, temperature=2.0, top_p=0.9)] * 4
    keys = [random_key(3, f"rows#{row}", 0) for row in range(8)]
    logits = torch.randn(8, NUM_TOKENS)
    together = sampler(*rows, keys=keys)
    order = [5, 0, 7, 2]
    others = sampler(*[rows[row] for row in order], keys=[keys[row] for row in order])
    for step in range(20):
        expected = together.pick(together.process(logits), step)[order]
        picked = others.pick(others.process(logits[order]), step)
        assert picked.tolist() == expected.tolist()


def test_step_may_differ_between_rows() -> None:
    """A vector of steps draws for each row what its own step draws."""
    keys = torch.tensor([11, 12, 13])
    steps = torch.tensor([0, 5, 2])
    alone = [uniform(keys[row : row + 1], int(steps[row])).item() for row in range(3)]
    assert uniform(keys, steps).tolist() == alone


def test_numbers_are_splitmix64() -> None:
    """The numbers are those of the published generator, in whole 64-bit arithmetic."""
    for key in (0, 1, 2**63, 2**64 - 1, random_key(0, "a", 0)):
        number = uniform(torch.tensor([signed(key)]), 4).item()
        assert number == (split_mix(key, 5) >> 11) * 2.0**-53


@pytest.mark.parametrize("number", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_never_a_token_of_probability_0(number: float) -> None:
    """Not even with the smallest and largest number, beside zeros, with sums that round."""
    torch.manual_seed(2)
    probabilities = torch.rand(50, NUM_TOKENS).softmax(-1)
    probabilities[:, :100] = 0
    probabilities[:, -100:] = 0
    probabilities[::2, 150:350] = 0
    tokens = draw(probabilities, torch.full((50,), number, dtype=torch.float64))
    assert (probabilities.gather(1, tokens[:, None]) > 0).all()


def test_sums_that_are_not_monotonic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in parallel may rise a little where the probability is 0: such a token is not drawn."""
    cumsum = torch.Tensor.cumsum

    def uneven(probabilities: torch.Tensor, **options: Any) -> torch.Tensor:
        return cumsum(probabilities, **options) + 1e-9 * (probabilities == 0)

    monkeypatch.setattr(torch.Tensor, "cumsum", uneven)
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for number in (0.0, 0.5, 1 - 2.0**-53):
        token = draw(probabilities, torch.tensor([number], dtype=torch.float64))
        assert token.item() in (1, 3)


def test_random_keys() -> None:
    """Seed, row and sample each make another key; the keys stay as they are from run to run."""
    keys = {
        random_key(seed, row, sample)
        for seed in (0, 1, 12)
        for row in ("a#1", "a#12", "1 a")
        for sample in (0, 1, 2)
    }
    assert len(keys) == 27
    assert all(0 <= key < 2**64 for key in keys)
    assert random_key(0, "rows.parquet#0", 0) == 10871979990465473533


def signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - 2**64 if value >= 2**63 else value


def split_mix(seed: int, number: int) -> int:
    """The `number`-th output, from 1, of SplitMix64, as its authors write it."""
    mixed = (seed + number * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)
