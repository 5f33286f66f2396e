"""A stand-in for `jobs.bench_child` without a model, whose shapes fail; and the commands with it.

    python -m tests.bench_faults bench …

It writes down what it was asked in the file that `TRIED` names.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from jobs.isolated import Service, Tell, serve
from pipeline.bench_specs import CellQuestion, SampleSpec, SpeedSpec
from pipeline.errors import ModelError
from pipeline.measured import Answer, Cell, ModelFacts, Sampled, Speed, State

CHILD = "tests.bench_faults"
TRIED = "SHARDMILL_TEST_TRIED"
FACTS = ModelFacts(
    architecture="NoModel",
    num_parameters=1,
    dtype="float32",
    quantization="none",
    attention="sdpa",
    device="cpu",
    num_threads=1,
    num_weight_bytes=1,
    loaded_bytes=1,
    load_seconds=0.0,
    context_length=None,
    job_cache_bytes=2**31,
)
KILLED, MEMORY, HANGING, RAISING, SLOW = 101, 102, 103, 104, 105
"""Batch sizes that end so."""


def open_service(spec: SpeedSpec | SampleSpec, tell: Tell) -> tuple[Service, ModelFacts]:
    """int8 cannot be loaded; fp4 kills; nf4 answers otherwise."""
    method = spec.model.quantization.method
    if method == "int8":
        raise ModelError("int8 is not for this model")
    if method == "fp4":
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(spec, SpeedSpec):
        return _measure, FACTS
    end = "b" if method == "nf4" else "a"
    answers = tuple(Answer(row.row_id(0), "p", f"a{end}", (1, ord(end))) for row in spec.rows)
    return lambda question, tell: Sampled(answers, 1, 1, 1.0, None, None, 1), FACTS


def _measure(question: CellQuestion, tell: Tell) -> Cell:
    shape = question.shape
    if TRIED in os.environ:
        with Path(os.environ[TRIED]).open("a") as file:
            file.write(f"{os.getpid()} {shape.batch} {shape.context}\n")
    if shape.batch == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if shape.batch == HANGING:
        time.sleep(600)
    if shape.batch == RAISING:
        raise KeyError("a bug")
    if shape.batch == MEMORY:
        return Cell(shape, State.MEMORY)
    seconds = question.max_seconds * 2 if shape.batch == SLOW else 0.1
    return Cell(shape, State.MEASURED, Speed(1.0, 1.0, 1.0, 1, 1, 1, seconds))


def use_faults(monkeypatch: Any) -> None:
    """Has bench start this in place of the real one."""
    monkeypatch.setattr("jobs.bench.CHILD", CHILD)
    monkeypatch.setattr("jobs.compare.CHILD", CHILD)


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        serve(int(sys.argv[1]), open_service)
    from jobs import bench, cli  # not in the process above, which is to start at once

    bench.CHILD = CHILD
    cli.main()
