"""The questions of the quickstart model, and which of them it never trains on.

A question belongs to the held-out tenth by a hash of its text alone, so training and prompts
agree on the split without sharing a file or a seed.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
SHARE_OF_VOWELS = 0.4  # as in English, so that words of the language look familiar
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question and the only answer that counts as right."""

    task: str
    question: str
    expected: str

    @property
    def held_out(self) -> bool:
        """Whether the question is kept for the prompts, away from training."""
        return zlib.crc32(self.question.encode()) % HELD_OUT_ONE_IN == 0


def add(rng: random.Random) -> Example:
    """Two numbers, each below ten, a hundred or a thousand equally often."""
    left, right = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    return Example(task="add", question=f"What is {left} + {right}?", expected=str(left + right))


def count(rng: random.Random) -> Example:
    """Two to fifteen numbers in a row, the longest answers of all."""
    first = rng.randrange(200)
    last = first + rng.randint(1, 14)
    return Example(
        task="count",
        question=f"Count from {first} to {last}.",
        expected=" ".join(str(number) for number in range(first, last + 1)),
    )


def reverse(rng: random.Random) -> Example:
    """A word from its last letter to its first."""
    word = random_word(rng)
    return Example(task="reverse", question=f"Spell {word} backwards.", expected=word[::-1])


def sort(rng: random.Random) -> Example:
    """The letters of a word in the order of the alphabet."""
    word = random_word(rng)
    return Example(
        task="sort", question=f"Sort the letters of {word}.", expected="".join(sorted(word))
    )


def random_word(rng: random.Random) -> str:
    """Three to ten letters; any word of that length can come up."""
    return "".join(
        rng.choice(VOWELS if rng.random() < SHARE_OF_VOWELS else CONSONANTS)
        for _ in range(rng.randint(3, 10))
    )


Task = Callable[[random.Random], Example]
TASKS: tuple[Task, ...] = (add, count, reverse, sort)


def examples(make: Task, rng: random.Random, *, held_out: bool) -> Iterator[Example]:
    """Endless examples of one task from one side of the split; they may repeat."""
    while True:
        example = make(rng)
        if example.held_out == held_out:
            yield example


def held_out_examples(num_per_task: int, seed: int = 0) -> list[Example]:
    """Different questions that training never asks, task after task; 250 of each can be had."""
    chosen: dict[str, Example] = {}
    for task_index, make in enumerate(TASKS, start=1):
        stream = examples(make, random.Random(f"{seed} {make.__name__}"), held_out=True)
        while len(chosen) < task_index * num_per_task:
            example = next(stream)
            chosen[example.question] = example
    return list(chosen.values())
